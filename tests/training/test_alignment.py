"""Alignment in the engine: exact over the global batch, whatever the ranks, ZeRO's stage and micro-batches; it resumes, and
learns."""

import json
import signal
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from opt_ds.config import Config
from opt_ds.data.batch import Packer
from opt_ds.data.modalities import AUDIO, IMAGE, TEXT
from opt_ds.data.pretraining_plan import PretrainingPlan
from opt_ds.data.samples import SampleReader
from opt_ds.model.initial import initial_model
from opt_ds.ops import backend
from opt_ds.store.reader import FeatureStore
from opt_ds.tasks.base import total_loss
from opt_ds.training import checkpoint
from opt_ds.training.finetuning import finetune_config
from tests.training.runs import FITTED, free_port, hashes, losses, rank_environment, tensors, tiny_config, train
from tests.training.test_init_from import STILL, resolved
from tests.training.test_pretrain import SCRIPT
from tests.warm import WarmProcess

pytestmark = pytest.mark.timeout(600)

ALONE = ("tasks.alignment.weight=2", "tasks.sampling_weights={alignment: 1}")
BESIDE = ("tasks.alignment.weight=2", "tasks.sampling_weights={alignment: 2, mlm: 1, modality: 1}")
# More samples than the training split has, so that some are in the step twice and are no negatives of each other.
ONE_STEP = ("ops.backend=fused", "model.dropout=0.1", "model.attention_dropout=0.1", "model.max_regions=8",
            "model.max_frames=4", "model.num_image_codes=64", "batch.size=64", "optimizer.clip_norm=0",
            "train.max_steps=1")  # fmt: skip
STAGES = (0, 1, 2, 3)


class Layout(NamedTuple):
    """How a step is distributed, and its tasks."""

    ranks: int
    max_tokens: int
    micro_batches: int
    first_pass: int
    tasks: tuple[str, ...]
    stages: tuple[int, ...] = STAGES


LAYOUTS = {
    "1x1": Layout(1, 100_000, 1, 1, ALONE), "1x8": Layout(1, 375, 8, 3, BESIDE), "2x3": Layout(2, 475, 3, 3, ALONE),
    "2x3 beside others": Layout(2, 525, 3, 1, BESIDE, (2,)),
    "sigmoid": Layout(1, 100_000, 1, 1, (*ALONE, "tasks.alignment.loss=sigmoid"), (1,)),
}  # fmt: skip

Gradients = dict[str, torch.Tensor]


@pytest.fixture(autouse=True, scope="module")
def choose_again() -> Iterator[None]:
    yield
    backend.choose("auto", "cpu")


def config_of(store: Path, layout: str, stage: int) -> Config:
    max_tokens = LAYOUTS[layout].max_tokens
    return tiny_config(store, *ONE_STEP, *LAYOUTS[layout].tasks, f"batch.max_tokens={max_tokens}", f"zero.stage={stage}")


@pytest.fixture(scope="module")
def folder(store: Path, tmp_path_factory: pytest.TempPathFactory, group: Any) -> Path:
    """One step of each layout and stage: those of one rank here, those of two by `job_ranks.py`."""
    folder = tmp_path_factory.mktemp("alignment")
    jobs = []
    for name, layout in LAYOUTS.items():
        for stage in layout.stages:
            config, output = config_of(store, name, stage), folder / f"{name}-{stage}"
            if layout.ranks == 1:
                assert train(config, output, group) == 0
            else:
                jobs.append({"config": config.model_dump(mode="json"), "output": str(output)})
    # `job_ranks` expects that rank 0 uses a plan of rank 1, which plans the second step.
    two_steps = tiny_config(store, *BESIDE, "train.max_steps=2", "batch.size=20").model_dump(mode="json")
    jobs.append({"config": two_steps, "output": str(folder / "two steps")})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    port = free_port()
    command = ["-m", "tests.training.job_ranks", str(folder / "jobs.json")]
    ranks = [WarmProcess(command, rank_environment(rank, 2, port)) for rank in range(2)]
    outcomes = [rank.communicate(timeout=280) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outcomes
    return folder


@pytest.fixture(scope="module")
def references(store: Path) -> dict[str, tuple[float, Gradients]]:
    return {layout: reference(config_of(store, layout, 1)) for layout in LAYOUTS}


def reference(config: Config) -> tuple[float, Gradients]:
    """Loss and gradients of the first step as one batch in float64, with the contrast in plain PyTorch."""
    stores = [FeatureStore(path) for path in config.data.stores]
    step_plan = PretrainingPlan(config, stores).step(0)
    reader, packer = SampleReader(config, stores), Packer(config, stores[0].description.tokenizer)
    samples = [reader.read(step_plan.samples, index) for index in range(len(step_plan.samples))]
    backend.choose("fused", "cpu")
    model = initial_model(config, stores).double().train()
    batch = packer.pack(samples)
    backend.seed_dropout(config.seed, 0, 0, 0)
    total = total_loss(model(batch), step_plan.counts, config.tasks, 1)  # alignment without its second pass is 0
    hidden_te, _ = model._encode(batch.inputs, batch.read)
    vectors: dict[tuple[int, ...], dict[tuple[int, int], torch.Tensor]] = {}
    names = {(TEXT,): "text", (IMAGE,): "image", (AUDIO,): "audio", (TEXT, AUDIO): "text_audio"}
    for index, (sample, cls) in enumerate(zip(samples, batch.inputs.cls_index.tolist(), strict=True)):
        if "alignment" in sample.targets:
            view = tuple(sorted(sample.items))
            projected = model.alignment.projections[names[view]](hidden_te[cls])
            number = (int(step_plan.samples.sample[index]), int(step_plan.samples.epoch[index]))
            vectors.setdefault(view, {})[number] = projected / projected.norm()
    numbers = sorted(vectors[TEXT,])
    sums = [plain_contrast(model.alignment, *([of_view[n] for n in numbers] for of_view in (vectors[a], vectors[b])), numbers)
            for a, b in (((IMAGE,), (TEXT,)), ((AUDIO,), (TEXT,)), ((IMAGE,), (AUDIO,)), ((TEXT, AUDIO), (IMAGE,)))]  # fmt: skip
    total = total + config.tasks.alignment.weight * sum(sums) / (len(sums) * len(numbers))
    total.backward()
    return float(total), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def plain_contrast(
    head: Any, first: list[torch.Tensor], second: list[torch.Tensor], numbers: list[tuple[int, int]]
) -> torch.Tensor:
    """Sum over the samples of the loss of one pair of views. The same sample in two epochs is no negative."""
    scores = torch.stack(first) @ torch.stack(second).T * head.log_scale.exp()
    same = torch.zeros(scores.shape, dtype=torch.bool)
    for i, j in combinations(range(len(numbers)), 2):
        same[i, j] = same[j, i] = numbers[i][0] == numbers[j][0]
    assert same.any() and not same.all(), "the step has a sample twice"
    right = torch.arange(len(numbers))
    if head.bias is not None:
        signs = 2 * torch.eye(len(numbers), dtype=torch.float64) - 1
        return -(F.logsigmoid(signs * (scores + head.bias)) * ~same).sum()
    allowed = scores.masked_fill(same, -torch.inf)
    return (F.cross_entropy(allowed, right, reduction="sum") + F.cross_entropy(allowed.T, right, reduction="sum")) / 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_are_those_of_one_float64_batch(
    layout: str, store: Path, folder: Path, references: dict[str, tuple[float, Gradients]]
) -> None:
    own = LAYOUTS[layout]
    step_plan = PretrainingPlan(config_of(store, layout, 1), [FeatureStore(store)]).step(0, own.ranks)
    assert (len(step_plan.micro_batches[0]), step_plan.first_pass) == (own.micro_batches, own.first_pass)
    loss, gradients = references[layout]
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert all(gradients[name].norm() > 0 for name in ("alignment.log_scale", "alignment.projections.image.weight"))
    for stage in own.stages:
        assert losses(folder / f"{layout}-{stage}")[1] == pytest.approx(loss, rel=1e-5)
        moments = tensors(folder / f"{layout}-{stage}", 1, "moments")
        for name, expected in gradients.items():  # after one step from moments of 0, exp_avg is 0.1 × the gradient
            error = (moments[f"{name}.exp_avg"].double() * 10 - expected).norm()
            assert error <= 1e-5 * max(expected.norm(), 1e-3 * norm), (name, stage)


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp16"), (2, "fp16"), (3, "fp16"), (1, "bf16"), (3, "bf16")])
def test_half_precision_differs_by_its_rounding_only(
    stage: int, precision: str, store: Path, tmp_path: Path, group: Any, monkeypatch: pytest.MonkeyPatch,
    references: dict[str, tuple[float, Gradients]],
) -> None:  # fmt: skip
    """With a loss scale, and with the weights of stage 3 gathered for the first pass too."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
    (tmp_path / "ds.json").write_text(json.dumps({"fp16": {"initial_scale_power": 10}} if precision == "fp16" else {}))
    config = config_of(store, "1x8", stage).model_copy(update={"deepspeed_config": str(tmp_path / "ds.json")})
    assert train(config, tmp_path / "run", group, precision) == 0
    loss, gradients = references["1x8"]
    assert losses(tmp_path / "run")[1] == pytest.approx(loss, rel=0.02)
    moments = tensors(tmp_path / "run", 1, "moments")
    found = torch.cat([10 * moments[f"{name}.exp_avg"].double().flatten() for name in gradients])
    expected = torch.cat([gradient.flatten() for gradient in gradients.values()])
    assert (found - expected).norm() < (0.02 if precision == "fp16" else 0.1) * expected.norm()


def test_two_ranks_that_are_killed_resume_to_the_same_weights(store: Path, tmp_path: Path) -> None:
    """With PyTorch's dropout, which repeats itself in the second pass because its seed does."""
    settings = (*FITTED, *BESIDE, "train.max_steps=6", "schedule.total_steps=100", "batch.max_tokens=400", "batch.size=40",
                "model.max_regions=8", "model.max_frames=4", "checkpoint.every_steps=2", "zero.stage=2")  # fmt: skip
    command = [str(SCRIPT), "--config", "opt-tiny", "--store", str(store)]
    command += [part for setting in settings for part in ("--set", setting)]

    def start(output: Path) -> list[WarmProcess]:
        port = free_port()
        given = [*command, "--output", str(output)]
        return [WarmProcess(given, rank_environment(rank, 2, port), cwd="/") for rank in range(2)]

    def finish(started: list[WarmProcess]) -> None:
        for process in started:
            _, error = process.communicate(240)
            assert process.returncode == 0, error

    straight = start(tmp_path / "straight")
    finish(straight)
    killed = start(tmp_path / "killed")
    while not (tmp_path / "killed" / "checkpoints" / "step-00000002").is_dir():
        assert all(process.poll() is None for process in killed)
    for process in killed:
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    finish(start(tmp_path / "killed"))
    assert hashes(tmp_path / "killed", 6) == hashes(tmp_path / "straight", 6)
    lines = [json.loads(line) for line in (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/alignment/loss" in line]
    assert len(steps) == 6 and all(0 < line["train/alignment/chance"] < 0.2 for line in steps)
    assert all(line["train/alignment/scale"] == pytest.approx(1 / 0.07, rel=0.1) for line in steps)


@pytest.fixture(scope="module")
def trained(store: Path, tmp_path_factory: pytest.TempPathFactory, group: Any) -> Path:
    """A run that learns its few samples by heart. It is validated on them."""
    output = tmp_path_factory.mktemp("trained") / "run"
    settings = ("tasks.alignment.width=16", "tasks.sampling_weights={alignment: 3, modality: 1}", "data.valid_split=train",
                "train.validate_samples=48", "model.dropout=0", "model.attention_dropout=0", "batch.size=32",
                "optimizer.lr=0.003", "schedule.total_steps=200", "train.max_steps=120")  # fmt: skip
    assert train(tiny_config(store, *settings), output, group) == 0
    return output


def test_it_learns_and_is_validated_beside_chance(trained: Path) -> None:
    table = json.loads((trained / "validation.json").read_text())
    count = 48
    assert table["baselines"]["alignment"] == pytest.approx(np.log(count), rel=1e-6)
    assert table["losses"]["alignment"] < 0.5 * np.log(count)
    assert table["accuracies"]["alignment"] > 10 / count, "R@1 by chance is 1 / 48"
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    accuracy = [line["train/alignment/accuracy"] for line in lines if "train/alignment/accuracy" in line]
    assert np.mean(accuracy[-5:]) > 3 * np.mean(accuracy[:5])


def test_its_weights_are_carried_to_new_runs_and_to_fine_tuning(
    trained: Path, store: Path, tmp_path: Path, group: Any
) -> None:
    weights = tensors(trained, 120, "model")
    own = {name for name in weights if name.startswith("alignment.")}
    assert "alignment.log_scale" in own and len(own) == 9
    new = resolved(trained, tmp_path / "new", *STILL, "tasks.alignment.width=16", "train.max_steps=1",
                   "tasks.sampling_weights={alignment: 1}")  # fmt: skip
    tuned = finetune_config("captioning", trained, [str(store)], settings=("train.max_steps=1", *STILL))
    for config, output in ((new, tmp_path / "new"), (tuned, tmp_path / "tuned")):
        assert train(config, output, group) == 0
        found = tensors(output, 1, "model")
        assert all(torch.allclose(found[name], weights[name], rtol=1e-6, atol=1e-9) for name in own)
    assert checkpoint.load_model(tmp_path / "tuned")[1].tasks.alignment.weight == 0
    without = resolved(trained, tmp_path / "without", *STILL, "train.max_steps=1")
    assert train(without, tmp_path / "without", group) == 0
    assert not [name for name in tensors(tmp_path / "without", 1, "model") if name.startswith("alignment.")]
