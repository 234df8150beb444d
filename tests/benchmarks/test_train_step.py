"""The methods of benchmarks/train_step.py do the same work and compute the same loss."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import train_step
from benchmarks.step import compare
from benchmarks.step.baselines import MaskedBert, PaddedBert, UnpaddedBert, copy_weights
from benchmarks.step.compare import build_methods, check_losses, compare_methods, mlm_data
from benchmarks.step.data import Mix, MixData, length_buckets, packed_micro_batches
from benchmarks.step.methods import BASELINES, OURS
from benchmarks.step.work import Work, check_same_work
from opt_ds.data.batch import PackedBatch
from opt_ds.model.opt import OPT

TINY = Mix((2, 12), (1, 9), (2, 9), 4, (
    "model.hidden_size=16", "model.num_heads=2", "model.ffn_size=24", "model.num_layers=3", "model.vocab_size=40",
    "model.image_feature_dim=8", "model.image_num_classes=7", "model.image_codebook_size=16",
    "model.audio_feature_dim=6", "ops.backend=torch",
))  # fmt: skip
ALL = tuple(BASELINES)
NO_DROPOUT = ["model.dropout=0", "model.attention_dropout=0"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("benchmark") / "store"


@pytest.fixture(scope="module")
def data(store: Path) -> MixData:
    return mlm_data(store, TINY, 3, 2, [], torch.device("cpu"))


@pytest.fixture
def opt(data: MixData) -> OPT:
    """A model whose biases and norms are random too, so that a forgotten one shows."""
    torch.manual_seed(3)
    model = OPT(data.config.model, data.config.tasks)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def ragged_batch(data: MixData, count: int = 7) -> PackedBatch:
    batch = data.pack(np.arange(count))
    assert batch.inputs.sequences.min_length < batch.inputs.sequences.max_length, "padding must matter"
    return batch


def baseline(kind: type[MaskedBert], opt: OPT) -> MaskedBert:
    model = kind(opt.config, "sdpa" if kind is PaddedBert else "sdpa_by_sample")
    copy_weights(opt, model)
    return model.eval()


def plain_loss(model: OPT, batch: PackedBatch) -> torch.Tensor:
    """Summed masked-LM loss from the weights of `model`, sample by sample, in plain products."""
    rows, head = model.embeddings(batch.inputs)[0], model.head("mlm")
    masked, sequences, width = batch.parts["mlm"], batch.inputs.sequences, rows.shape[1]
    targets = dict(zip(masked.index.tolist(), masked.targets.tolist(), strict=True))

    def norm(x: torch.Tensor, module: nn.Module) -> torch.Tensor:
        return F.layer_norm(x, (width,), module.weight, module.bias, model.config.layer_norm_eps)

    def linear(x: torch.Tensor, module: nn.Module) -> torch.Tensor:
        return x @ module.weight.t() + module.bias

    total, first = torch.zeros(()), 0
    for length in sequences.host_lengths.tolist():
        x = rows[first : first + length]
        for layer in model.encoder.layers:
            q, k, v = linear(x, layer.attention.qkv).chunk(3, dim=1)
            heads = []
            for own in torch.arange(width).chunk(model.config.num_heads):
                scores = q[:, own] @ k[:, own].t() / len(own) ** 0.5
                heads.append(scores.softmax(1) @ v[:, own])
            x = norm(x + linear(torch.cat(heads, 1), layer.attention.output), layer.attention_norm)
            x = norm(x + linear(F.gelu(linear(x, layer.ffn.up)), layer.ffn.down), layer.ffn_norm)
        for place in range(length):
            if (target := targets.get(first + place)) is not None:
                state = norm(F.gelu(linear(x[place], head.transform)), head.norm)
                total = total - (model.embeddings.word.weight @ state + head.bias).log_softmax(0)[target]
        first += length
    return total


@torch.no_grad()
def test_every_method_computes_the_loss_of_a_plain_reference(data: MixData, opt: OPT) -> None:
    batch = ragged_batch(data)
    expected = plain_loss(opt.eval(), batch)
    losses = [baseline(UnpaddedBert, opt)(batch), baseline(PaddedBert, opt)(batch), opt(batch)["mlm"].sum]
    assert len(batch.parts["mlm"].targets) > 7
    torch.testing.assert_close(torch.stack(losses), expected.expand(3), rtol=1e-5, atol=0)


def test_a_baseline_without_padding_has_the_gradients_of_the_padded_one(data: MixData, opt: OPT) -> None:
    unpadded, padded = baseline(UnpaddedBert, opt), baseline(PaddedBert, opt)
    batch = ragged_batch(data)
    for model in (unpadded, padded):
        model(batch).backward()
    for (name, own), theirs in zip(unpadded.named_parameters(), padded.parameters(), strict=True):
        assert (own.grad is None) == (theirs.grad is None), name
        if own.grad is not None:
            torch.testing.assert_close(own.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)
    assert sum(p.grad is not None for p in unpadded.parameters()) > 40


@torch.no_grad()
def test_a_sample_attends_to_itself_only(data: MixData, opt: OPT) -> None:
    model, whole = baseline(UnpaddedBert, opt), ragged_batch(data, 2)
    apart = [model(data.pack(np.array([index]))) for index in range(2)]
    torch.testing.assert_close(model(whole), sum(apart), rtol=1e-5, atol=0)


def test_steps_have_the_same_samples_for_every_method(data: MixData) -> None:
    steps = data.steps(4, 2)
    for step in steps:
        packed = packed_micro_batches(step.indices, data.lengths, 2)
        for parts in (step.buckets, step.random(), packed):
            assert len(parts) == 2
            np.testing.assert_array_equal(np.sort(np.concatenate(parts)), step.indices)
    everything = np.concatenate([step.indices for step in steps])
    assert len(np.unique(everything)) == len(everything), "no sample is in two steps"


def test_buckets_have_hardly_any_padding(data: MixData) -> None:
    budget = int(data.lengths.sum() / data.pool)
    buckets = length_buckets(data.lengths, budget)
    padded = sum(len(bucket) * data.lengths[bucket].max() for bucket in buckets)
    assert data.lengths[np.concatenate(buckets)].sum() / padded > 0.95
    assert all(len(bucket) * data.lengths[bucket].max() <= budget for bucket in buckets)


def test_all_methods_do_the_same_work(data: MixData) -> None:
    methods = build_methods(data, "fp32", ALL, 1, 2)
    works = {name: method.counted_step() for name, method in methods.items()}
    check_same_work(works)
    assert works[OURS].scored == works[OURS].masked > 0
    assert works["hf"].positions == works[OURS].positions == works[OURS].tokens
    for name in ("uniter", "hf_padded"):
        parts = methods[name].micro_batches(methods[name].samples[0])
        assert works[name].positions == sum(len(part) * data.lengths[part].max() for part in parts)
    assert works["hf_padded"].positions > works["hf"].positions
    assert works[OURS].flops < works["hf"].flops < works["hf_padded"].flops


def test_the_counted_operations_are_those_of_the_model(data: MixData) -> None:
    """Without padding, a method computes the needed operations, and the last layer at positions that nobody reads."""
    method = build_methods(data, "fp32", ["hf"], 1, 2)["hf"]
    model, samples = data.config.model, method.samples[0].indices
    width, lengths = model.hidden_size, data.lengths[samples].astype(float)
    layer = 2 * (4 * width**2 + 2 * width * model.ffn_size) + 4 * width * lengths
    keys_and_values = 4 * width**2
    masked = np.array([len(data.pack(np.array([index])).parts["mlm"].targets) for index in samples])
    unread = ((lengths - masked) * (layer - keys_and_values)).sum()
    assert method.counted_step().flops == data.flops(samples) + 3 * unread


class ScoresEverywhere(UnpaddedBert):
    def encode(self, rows_te, sequences, index_m):
        everywhere = torch.arange(len(rows_te))
        self.head(super().encode(rows_te, sequences, everywhere))
        return super().encode(rows_te, sequences, index_m)


def test_a_method_that_scores_other_positions_is_refused(data: MixData) -> None:
    methods = build_methods(data, "fp32", ["hf"], 1, 2)
    methods["hf"].model.__class__ = ScoresEverywhere
    works = {name: method.counted_step() for name, method in methods.items()}
    with pytest.raises(ValueError, match="scored is"):
        check_same_work(works)


@pytest.mark.parametrize("name", ["samples", "tokens", "masked", "updates", "parameters"])
def test_other_work_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is"):
        check_same_work({"hf": Work(), "ours": Work(**{name: 1})}, (name,))


def test_a_method_with_another_loss_is_refused(data: MixData) -> None:
    methods = build_methods(data, "fp32", ["hf", "uniter"], 1, 2)
    check_losses(methods, data, "fp32")
    methods = build_methods(data, "fp32", ["hf", "uniter"], 1, 2)
    with torch.no_grad():
        methods["uniter"].model.head.bias[0] += 3.0
    with pytest.raises(ValueError, match="same loss"):
        check_losses(methods, data, "fp32")


def test_a_method_that_does_not_learn_is_refused(data: MixData) -> None:
    methods = build_methods(data, "fp32", ["hf"], 1, 2)
    methods["hf"].trained.update = lambda: None
    with pytest.raises(ValueError, match="does not reduce"):
        check_losses(methods, data, "fp32")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [OURS, *ALL])
def test_every_method_learns(store: Path, name: str, precision: str) -> None:
    data = mlm_data(store, TINY, 3, 2, NO_DROPOUT, torch.device("cpu"))
    method = build_methods(data, precision, [] if name == OURS else [name], 1, 2)[name]
    batch = method.steps[0][0]
    losses = [method.mean_loss(batch)]
    for _ in range(20):
        method.micro_batch(0, 0)
        method.trained.update()
        losses.append(method.mean_loss(batch))
    assert losses[0] == pytest.approx(np.log(40), rel=0.05)
    assert losses[-1] < losses[10] < losses[0]


def small_products(dtype: torch.dtype, device: torch.device) -> tuple:
    left = torch.ones(64, 64, dtype=dtype, device=device)
    return lambda _: left @ left, 2.0 * 64**3


def test_figures_of_a_comparison(data: MixData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "matmul", small_products)
    figures = compare_methods(data, "fp32", ["hf", "uniter"], 3, 2)
    assert list(figures["methods"]) == ["hf", "uniter", OURS]
    for method in figures["methods"].values():
        rates = method["tokens_per_s"]
        assert len(method["seconds_per_step"]) == 3
        assert 0 < rates["min"] <= rates["median"] <= rates["max"]
    assert figures["methods"][OURS]["opt_ds_faster_by"] == {"median": 1.0, "min": 1.0, "max": 1.0}


def test_the_script_prints_work_and_speed_for_every_number_of_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "matmul", small_products)
    monkeypatch.setitem(train_step.MIXES, "emoji", TINY)
    arguments = ["--layers", "1", "2", "--mix", "emoji", "--precision", "fp32", "--part", "peers", "--repeats", "1",
                 "--micro-batches", "2", "--baseline", *ALL,
                 "--backend", "torch", "--output", str(tmp_path / "out.json")]  # fmt: skip
    assert train_step.main(arguments) == 0
    printed = capsys.readouterr().out
    for layers in (1, 2):
        assert f"emoji mix, {layers} layers, fp32" in printed
    for text in ("command: ", "processor: ", "vocabulary rows scored"):
        assert text in printed
    written = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert written["emoji mix, 2 layers, fp32"]["baselines"]["methods"]["hf"]["work"]["updates"] == 1


def test_options() -> None:
    assert train_step.parse([]).layers == [12]
    assert train_step.parse(["--layers", "4", "12", "24"]).layers == [4, 12, 24]
    assert train_step.parse(["--part", "peers"]).part == train_step.parse(["--part", "baselines"]).part == ["baselines"]
    assert train_step.parse(["--part", "peers", "engine"]).part == ["baselines", "engine"]


@pytest.mark.parametrize("arguments", [["--layers", "0"], ["--part", "peer"], ["--baseline", "bert"]])
def test_wrong_options_are_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_step.parse(arguments)
    assert arguments[0] in capsys.readouterr().err
