"""Test the complete model in a step: every parameter learns, idle parts are harmless, and the split of a batch is irrelevant."""

from dataclasses import replace

import pytest
import torch

from opt_ds.config import Config
from opt_ds.data.batch import PackedBatch
from opt_ds.data.pretraining_plan import PretrainingPlan
from opt_ds.data.samples import SampleReader
from opt_ds.data.step_plan import StepPlan
from opt_ds.model.opt import OPT
from opt_ds.nn.inputs import OutputPositions
from opt_ds.ops import backend
from opt_ds.store import FeatureStore
from opt_ds.tasks.base import total_loss
from tests.tiny import make_batches, make_config, make_model, make_packer, read_samples

#: Gradients of these are 0 in exact arithmetic: a key's bias shifts all scores of a softmax alike.
WITHOUT_EFFECT = ("qkv.bias", "key_value.bias")


def gradients(model: OPT, config: Config, batches: list[PackedBatch], counts: dict, world_size: int = 1) -> float:
    """Accumulate the gradient of a rank's micro-batches and return the sum of their losses."""
    total = 0.0
    for batch in batches:
        loss = total_loss(model(batch), counts, config.tasks, world_size)
        loss.backward()
        total += loss.item()
    return total


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_every_parameter_learns_from_a_mixed_batch(ragged: FeatureStore, norm: str) -> None:
    config = make_config(model={"norm": norm}, batch={"size": 80})
    model, step_plan = make_model(config), PretrainingPlan(config, [ragged]).step(0)
    gradients(model, config, make_batches(config, [ragged], step_plan)[0], step_plan.counts)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > (0 if name.endswith(WITHOUT_EFFECT) else 1e-7), name


@pytest.mark.parametrize("kernels", ["torch", "fused"])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_the_last_layer_at_the_rows_that_are_read_is_the_whole_layer(
    ragged: FeatureStore, norm: str, kernels: str, request: pytest.FixtureRequest
) -> None:
    """Losses and gradients; samples of which nothing is read lie between the others."""
    backend.choose(kernels, "cpu")
    request.addfinalizer(lambda: backend.choose("auto", "cpu"))
    config = make_config(model={"norm": norm}, batch={"size": 40})
    model, samples = make_model(config), read_samples(config, [ragged])
    samples[3:3] = [SampleReader(config, [ragged]).read_unmasked(0, i) for i in range(2)]
    batch = make_packer(config, [ragged]).pack(samples)
    assert batch.read.sequences.min_length == 0 and 0 < len(batch.read.index) < batch.inputs.sequences.total
    everything = OutputPositions(torch.arange(batch.inputs.sequences.total), batch.inputs.sequences)
    counts = dict.fromkeys(config.tasks.active_losses, 10.0)
    found = []
    for read in (batch.read, everything):
        model.zero_grad()
        loss = gradients(model, config, [replace(batch, read=read)], counts)
        found.append((loss, torch.cat([p.grad.flatten() for p in model.parameters()])))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert (found[0][1] - found[1][1]).norm() <= 1e-5 * found[1][1].norm()


HEADS = {  # task -> the parameters that only it trains
    "mlm": ("mlm.",),
    "mvm": ("mvm.",),
    "mam": ("mam.",),
    "modality": ("text_decoder.", "image_decoder."),
    "matching": ("matching.",),
}


@pytest.mark.parametrize("draw", HEADS)
def test_a_head_without_work_has_gradients_of_zero(complete: FeatureStore, draw: str) -> None:
    config = make_config(tasks={"sampling_weights": {draw: 1.0}})
    model, step_plan = make_model(config), PretrainingPlan(config, [complete]).step(0)
    gradients(model, config, make_batches(config, [complete], step_plan)[0], step_plan.counts)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        others = [part for other, parts in HEADS.items() if other != draw for part in parts]
        if name.startswith(tuple(others)) and ".word." not in name:
            assert not parameter.grad.any(), name
    for part in HEADS[draw]:
        assert any(p.grad.abs().max() > 0 for n, p in model.named_parameters() if n.startswith(part))


@pytest.mark.parametrize("modality", [0, 1, 2])
def test_a_micro_batch_of_one_modality(complete: FeatureStore, modality: int) -> None:
    """As evaluation packs it: nothing to learn, embedders without rows."""
    config = make_config()
    model, reader = make_model(config), SampleReader(config, [complete])
    batch = make_packer(config, [complete]).pack([reader.read_unmasked(0, i, (modality,)) for i in range(3)])
    loss = total_loss(model(batch), dict.fromkeys(config.tasks.active_losses, 5.0), config.tasks, 1)
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("training", [False, True])
def test_a_micro_batch_of_no_samples(complete: FeatureStore, training: bool) -> None:
    config = make_config(model={"dropout": 0.1, "attention_dropout": 0.1})
    model = make_model(config).train(training)
    batch = make_packer(config, [complete]).pack([])
    terms = model(batch)
    assert set(terms) == set(config.tasks.active_losses) and all(t.count == 0 and t.sum.item() == 0 for t in terms.values())
    total_loss(terms, dict.fromkeys(terms, 3.0), config.tasks, 2).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_infinite_scores_elsewhere_do_not_reach_a_head_without_work(complete: FeatureStore) -> None:
    """0 · NaN is NaN: the anchor of an idle head must be an empty sum, not a product with 0."""
    config = make_config(tasks={"sampling_weights": {"mlm": 1.0}})
    model, step_plan = make_model(config), PretrainingPlan(config, [complete]).step(0)
    with torch.no_grad():
        for idle in (model.mvm, model.mam, model.matching, model.image_decoder):
            for parameter in idle.parameters():
                parameter.fill_(float("inf"))
    loss = total_loss(model(make_batches(config, [complete], step_plan)[0][0]), step_plan.counts, config.tasks, 1)
    loss.backward()
    assert torch.isfinite(loss)
    shared = [p for n, p in model.named_parameters() if n.startswith(("embeddings.", "encoder."))]
    assert all(torch.isfinite(p.grad).all() for p in shared)


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("store", ["complete", "ragged"])
def test_ranks_and_micro_batches_do_not_change_loss_and_gradients(request: pytest.FixtureRequest, store: str, norm: str) -> None:
    """1 rank × 1 micro-batch, 1 × 8, 2 × 3: what DeepSpeed's mean over ranks and our global counts make of each."""
    stores = [request.getfixturevalue(store)]
    found = {}
    for world_size, rounds in ((1, 1), (1, 8), (2, 3)):
        config, step_plan = step_plan_with(stores, norm, world_size, rounds)
        model = make_model(config)
        losses = [
            gradients(model, config, rank, step_plan.counts, world_size)
            for rank in make_batches(config, stores, step_plan)
        ]
        loss = sum(losses) / world_size
        found[world_size, rounds] = (loss, {n: p.grad / world_size for n, p in model.named_parameters()})
    loss, truth = found.pop((1, 1))
    size = torch.cat([g.flatten() for g in truth.values()]).norm()
    assert loss > 1 and size > 0.1
    for other, grads in found.values():
        assert other == pytest.approx(loss, rel=1e-5)
        difference = torch.cat([(grads[n] - truth[n]).flatten() for n in truth]).norm()
        assert difference <= 1e-5 * size
        for name, gradient in grads.items():
            allowed = 1e-5 * max(truth[name].norm().item(), 1e-2 * size.item())
            assert (gradient - truth[name]).norm() <= allowed, name


def step_plan_with(stores: list[FeatureStore], norm: str, world_size: int, rounds: int) -> tuple[Config, StepPlan]:
    """Return the same step split into this many micro-batches per rank, by the smallest sufficient token budget."""
    budget = 100
    while True:
        config = make_config(model={"norm": norm}, batch={"size": 48, "max_tokens": budget})
        step_plan = PretrainingPlan(config, stores).step(0, world_size)
        if len(step_plan.micro_batches[0]) <= rounds:
            assert all(len(rank) == rounds for rank in step_plan.micro_batches)
            return config, step_plan
        budget = int(budget * 1.06)


def test_losses_are_bit_equal_when_repeated(ragged: FeatureStore) -> None:
    config = make_config()
    model = make_model(config)
    batch = make_packer(config, [ragged]).pack(read_samples(config, [ragged]))
    first, second = model(batch), model(batch)
    assert all(first[loss].sum.item() == second[loss].sum.item() for loss in first)


@pytest.mark.parametrize("kernels", ["torch", "fused"])
def test_recomputed_layers_give_the_same_bits(ragged: FeatureStore, kernels: str, request: pytest.FixtureRequest) -> None:
    """With dropout: recomputation must return the same masks, and so must random numbers that follow."""
    backend.choose(kernels, "cpu")
    request.addfinalizer(lambda: backend.choose("auto", "cpu"))
    config = make_config(model={"dropout": 0.1, "attention_dropout": 0.1}, batch={"size": 40})
    model, step_plan = make_model(config), PretrainingPlan(config, [ragged]).step(0)
    batches, found = make_batches(config, [ragged], step_plan)[0], []
    for recompute in (False, True):
        model.recompute_layers(recompute).zero_grad()
        backend.seed_dropout(1, 0, 0, 0)
        runs: list[int] = []
        hooks = []
        for layer in model.encoder.layers:
            hooks.append(layer.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1)))
        loss = gradients(model, config, batches, step_plan.counts)
        found.append((loss, [p.grad.clone() for p in model.parameters() if p.grad is not None], len(runs)))
        for hook in hooks:
            hook.remove()
    (loss, kept, once), (again, recomputed, twice) = found
    assert loss == again
    assert all(map(torch.equal, kept, recomputed))
    assert twice == 2 * once


def test_dropout_acts_in_training_only(ragged: FeatureStore) -> None:
    config = make_config(model={"dropout": 0.1, "attention_dropout": 0.1})
    model = make_model(config)
    inputs = make_packer(config, [ragged]).pack(read_samples(config, [ragged])).inputs
    with torch.no_grad():
        assert not torch.equal(model.encode(inputs), model.encode(inputs))
        model.eval()
        assert torch.equal(model.encode(inputs), model.encode(inputs))


def test_cls_alone_is_what_the_whole_encoding_has_there(ragged: FeatureStore) -> None:
    config = make_config()
    model = make_model(config).eval()
    inputs = make_packer(config, [ragged]).pack(read_samples(config, [ragged])).inputs
    rows: list[int] = []
    hook = model.encoder.layers[-1].ffn.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
    with torch.no_grad():
        cls = model.encode(inputs).index_select(0, inputs.cls_index)
        assert (model.encode_cls(inputs) - cls).abs().max() <= 1e-5
    hook.remove()
    assert rows == [inputs.sequences.total, len(inputs.sequences)], "the last layer's feed-forward sees [CLS] alone"


def test_initialisation_makes_the_summands_of_an_embedding_equally_large() -> None:
    wide = {"hidden_size": 256, "image_feature_dim": 512, "audio_feature_dim": 64, "embedding_range": 0.07}
    config = make_config(model=wide)
    torch.manual_seed(0)
    model = OPT(config.model, config.tasks)
    e = model.embeddings
    unit = torch.randn(400, 512), torch.randn(400, 128)
    with torch.no_grad():
        summands = [e.regions.feature(unit[0]), e.frames.feature(unit[1]), e.frames.position.weight, e.modality.weight,
                    e.text.word.weight, e.regions.mask, e.frames.mask]  # fmt: skip
    assert all(s.std().item() == pytest.approx(0.07, rel=0.2) for s in summands)
    assert model.encoder.layers[0].ffn.up.weight.std().item() == pytest.approx(0.2, rel=0.05)
