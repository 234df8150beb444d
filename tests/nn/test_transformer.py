"""The layers: packed equals alone, order matters where it should, both norm placements train."""

import pytest
import torch
import torch.nn.functional as F

from opt_ds.config import ModelConfig
from opt_ds.data.batch import PackedBatch
from opt_ds.data.modalities import AUDIO, IMAGE
from opt_ds.data.pretraining_plan import PretrainingPlan
from opt_ds.data.samples import SampleReader
from opt_ds.model.opt import OPT
from opt_ds.nn.transformer import EncoderLayer
from opt_ds.ops.sequences import Sequences
from opt_ds.store import FeatureStore
from opt_ds.tasks.base import total_loss
from tests.tiny import make_batches, make_config, make_model, make_packer, read_samples


def encoder_layer(config: ModelConfig, layer: EncoderLayer, x: torch.Tensor) -> torch.Tensor:
    """Return one sequence after one layer, computed in float64."""
    w = {name: value.detach().double() for name, value in layer.named_parameters()}

    def norm(rows: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(rows, (config.hidden_size,), w[f"{name}.weight"], w[f"{name}.bias"], config.layer_norm_eps)

    def attend(rows: torch.Tensor) -> torch.Tensor:
        projected = rows @ w["attention.qkv.weight"].T + w["attention.qkv.bias"]
        q, k, v = (part.unflatten(-1, (config.num_heads, -1)).transpose(0, 1) for part in projected.chunk(3, dim=-1))
        weights = torch.softmax(q @ k.transpose(1, 2) / config.head_dim**0.5, dim=-1)
        return (weights @ v).transpose(0, 1).flatten(1) @ w["attention.output.weight"].T + w["attention.output.bias"]

    def feed(rows: torch.Tensor) -> torch.Tensor:
        return F.gelu(rows @ w["ffn.up.weight"].T + w["ffn.up.bias"]) @ w["ffn.down.weight"].T + w["ffn.down.bias"]

    x = x.double()
    if config.norm == "post":
        x = norm(x + attend(x), "attention_norm")
        return norm(x + feed(x), "ffn_norm")
    middle = x + attend(x)  # the norm of the sublayer before has been taken already
    return norm(middle + feed(norm(middle, "attention_norm")), "ffn_norm")


@torch.no_grad()
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_a_layer_is_its_formula(norm: str) -> None:
    config = make_config(model={"norm": norm}).model
    model = make_model(make_config(model={"norm": norm}))
    lengths = [1, 7, 3]
    x = torch.randn(11, 16, generator=torch.Generator().manual_seed(0))
    layer = model.encoder.layers[0]
    found, _ = layer(x, x, Sequences.from_lengths(lengths))
    truth = torch.cat([encoder_layer(config, layer, part) for part in x.split(lengths)])
    assert (found - truth).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_a_packed_sample_is_encoded_as_if_alone(ragged: FeatureStore, norm: str) -> None:
    config = make_config(model={"norm": norm})
    model, packer, samples = make_model(config), make_packer(config, [ragged]), read_samples(config, [ragged])
    together = model.encode(packer.pack(samples).inputs)
    alone = torch.cat([model.encode(packer.pack([sample]).inputs) for sample in samples])
    assert (together - alone).abs().max() < 1e-5


@torch.no_grad()
def test_regions_are_a_set_and_frames_a_sequence(complete: FeatureStore) -> None:
    config = make_config()
    model, packer = make_model(config), make_packer(config, [complete])
    sample = SampleReader(config, [complete]).read_unmasked(0, 0)
    assert min(len(sample.items[IMAGE].features), len(sample.items[AUDIO].features)) > 2
    cls = model.encode(packer.pack([sample]).inputs)[0]
    regions, frames = sample.of(IMAGE), sample.of(AUDIO)
    regions.features, regions.boxes = regions.features[::-1].copy(), regions.boxes[::-1].copy()
    assert (model.encode(packer.pack([sample]).inputs)[0] - cls).abs().max() < 1e-5
    frames.features = frames.features[::-1].copy()
    assert (model.encode(packer.pack([sample]).inputs)[0] - cls).abs().max() > 1e-3


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_both_norm_placements_train(complete: FeatureStore, norm: str) -> None:
    """A few steps on one batch: the total falls far, and every loss with it."""
    config = make_config(model={"norm": norm, "layer_norm_eps": 1e-5}, batch={"size": 24})
    torch.manual_seed(0)
    model = OPT(config.model, config.tasks)
    step_plan = PretrainingPlan(config, [complete]).step(0)
    ((batch, *more),) = make_batches(config, [complete], step_plan)
    batches: list[PackedBatch] = [batch, *more]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    history = []
    for _ in range(30):
        optimizer.zero_grad()
        sums: dict[str, float] = {}
        for part in batches:
            terms = model(part)
            total_loss(terms, step_plan.counts, config.tasks, 1).backward()
            for loss, term in terms.items():
                sums[loss] = sums.get(loss, 0.0) + term.sum.item() / step_plan.counts[loss]
        optimizer.step()
        history.append(sums)
    for loss in step_plan.counts:
        assert history[-1][loss] < 0.9 * history[0][loss], loss
    assert sum(history[-1].values()) < 0.6 * sum(history[0].values())
