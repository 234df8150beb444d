"""Every batch calls the same modules in the same order, forward and backward.

ZeRO 3 gathers weights at these calls: ranks whose micro-batches differ in tasks, modalities or size would otherwise wait
for different collectives.
"""

from typing import Any

import pytest
import torch
from torch import nn

from opt_ds.config import Config
from opt_ds.data.batch import PackedBatch
from opt_ds.data.pretraining_plan import PretrainingPlan
from opt_ds.data.samples import SampleReader
from opt_ds.model.opt import OPT
from opt_ds.store import FeatureStore
from opt_ds.tasks.base import total_loss
from tests.tiny import TASK_NAMES, make_config, make_model, make_packer

Calls = list[tuple[str, str]]


def batches(config: Config, store: FeatureStore) -> dict[str, PackedBatch]:
    """A step's samples in one batch; those of one task alone; one sample alone; none."""
    step_plan, reader, packer = (
        PretrainingPlan(config, [store]).step(0),
        SampleReader(config, [store]),
        make_packer(config, [store]),
    )
    samples = [reader.read(step_plan.samples, index) for index in range(step_plan.num_samples)]
    found = {"all": packer.pack(samples), "none": packer.pack([])}
    for draw in sorted(set(step_plan.samples.task.tolist())):
        found[TASK_NAMES[draw]] = packer.pack(
            [s for s, own in zip(samples, step_plan.samples.task, strict=True) if own == draw]
        )
    found |= {f"{sample.name} alone": packer.pack([sample]) for sample in samples[:8]}
    return found


def tensors(value: Any) -> list[torch.Tensor]:
    """All tensors of a module's output."""
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for item in items for tensor in tensors(item)]


def calls(model: OPT, config: Config, batch: PackedBatch) -> Calls:
    """(event, module) in the order in which ZeRO 3 gathers: before a forward, and when an output's gradient comes."""
    events: Calls = []

    def hear(name: str) -> tuple[Any, Any]:
        def before(module: nn.Module, arguments: Any) -> None:
            events.append(("forward", name))

        def after(module: nn.Module, arguments: Any, output: Any) -> None:
            for number, tensor in enumerate(tensors(output)):
                if tensor.requires_grad:
                    events.append((f"output {number}", name))
                    tensor.register_hook(lambda grad, number=number: events.append((f"backward {number}", name)))

        return before, after

    handles = []
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            before, after = hear(name)
            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    counts = {loss: 10.0 for loss in config.tasks.active_losses}
    total_loss(model(batch), counts, config.tasks, 1).backward()
    for handle in handles:
        handle.remove()
    return events


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_batch_without_a_task_calls_what_a_batch_with_all_calls(
    recompute: bool, dropout: float, ragged: FeatureStore
) -> None:
    labels = {"names": ("a", "b")}
    config = make_config(batch={"size": 60, "max_tokens": 4096}, model={"dropout": dropout, "attention_dropout": dropout},
                         tasks={"labels": labels})  # fmt: skip
    model = make_model(config).recompute_layers(recompute)
    owners = {name for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None}
    found = batches(config, ragged)
    assert set(found) >= {"mlm", "mvm", "mam", "modality", "matching"}
    expected = calls(model, config, found.pop("all"))
    not_called = owners - {name for _, name in expected}
    assert not_called == {"embeddings.modality"}, "its owner reads its weight, in every batch"
    for name, batch in found.items():
        assert calls(model, config, batch) == expected, name
        for parameter_name, parameter in model.named_parameters():
            assert parameter.grad is not None, (name, parameter_name)
        model.zero_grad()


def test_a_batch_of_no_samples_adds_nothing(ragged: FeatureStore) -> None:
    config = make_config()
    model = make_model(config)
    terms = model(batches(config, ragged)["none"])
    assert all(float(term.sum) == 0 and term.count == 0 for term in terms.values())
    total_loss(terms, {}, config.tasks, 2).backward()
    assert all(not p.grad.count_nonzero() for p in model.parameters())
