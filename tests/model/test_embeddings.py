"""The embedders: what their sums hold, what a mask hides, how features are standardised."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from opt_ds.config import STANDARD_LIMIT
from opt_ds.data.batch import PackedBatch
from opt_ds.data.modalities import AUDIO, IMAGE, TEXT
from opt_ds.modalities.features import FeatureStandardizer
from opt_ds.model.opt import OPT
from opt_ds.store import FeatureStore
from opt_ds.store.schema import Statistics
from tests.tiny import make_config, make_model, make_packer, make_store, read_samples


@pytest.fixture(scope="module")
def batch(ragged: FeatureStore) -> PackedBatch:
    config = make_config(batch={"size": 60})
    return make_packer(config, [ragged]).pack(read_samples(config, [ragged]))


@torch.no_grad()
def test_every_row_is_the_norm_of_its_sum(batch: PackedBatch) -> None:
    model, inputs = make_model(make_config()), batch.inputs
    e, found = model.embeddings, model.embeddings(inputs)[0]

    def norm(rows: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
        return F.layer_norm(rows, (16,), layer.weight, layer.bias, layer.eps)

    types = e.modality.weight
    text = e.text.word.weight[inputs.parts[TEXT].ids] + e.text.position.weight[inputs.parts[TEXT].positions] + types[0]
    region_shown = inputs.parts[IMAGE].features.float() * ~inputs.parts[IMAGE].masked[:, None]
    regions = region_shown @ e.regions.feature.weight.T + e.regions.feature.bias
    regions = regions + inputs.parts[IMAGE].boxes @ e.regions.box.weight.T + e.regions.box.bias + types[1]
    regions = regions + inputs.parts[IMAGE].masked[:, None] * e.regions.mask
    audio = inputs.parts[AUDIO]
    frame_shown = audio.features.float() * ~audio.masked[:, None]
    frames = frame_shown @ e.frames.feature.weight.T + e.frames.feature.bias + types[2]
    frames = frames + e.frames.position.weight[audio.positions] + audio.masked[:, None] * e.frames.mask
    assert inputs.parts[IMAGE].masked.any() and inputs.parts[AUDIO].masked.any()
    for index, rows, layer in (
        (inputs.parts[TEXT].index, text, e.text.norm),
        (inputs.parts[IMAGE].index, regions, e.regions.norm),
        (inputs.parts[AUDIO].index, frames, e.frames.norm),
    ):
        assert (found[index] - norm(rows, layer)).abs().max() < 1e-5


NORMALIZED = {"normalize_embedding_summands": True}


@torch.no_grad()
def test_normalised_summands_are_those_of_plain_pytorch(batch: PackedBatch) -> None:
    model, inputs = make_model(make_config(model=NORMALIZED)), batch.inputs
    e, found = model.embeddings, model.embeddings(inputs)[0]

    def norm(rows: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
        return F.layer_norm(rows, (16,), layer.weight, layer.bias, layer.eps)

    types, image, audio = e.modality.weight, inputs.parts[IMAGE], inputs.parts[AUDIO]
    assert image.masked.any() and audio.masked.any()
    for part, embedder, other, number in (
        (image, e.regions, norm(F.linear(image.boxes, e.regions.box.weight, e.regions.box.bias), e.regions.box_norm), 1),
        (audio, e.frames, norm(e.frames.position.weight[audio.positions], e.frames.position_norm), 2),
    ):
        shown = part.features.float() * ~part.masked[:, None]
        feature = F.linear(shown, embedder.feature.weight, embedder.feature.bias) + part.masked[:, None] * embedder.mask
        rows = norm(feature, embedder.feature_norm) + other + types[number]
        assert (found[part.index] - norm(rows, embedder.norm)).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("embedding_range", [None, 0.07])
def test_normalised_summands_start_with_the_deviation_of_the_tables(
    batch: PackedBatch, embedding_range: float | None
) -> None:
    sizes = {"hidden_size": 512, "initializer_range": 0.02, "embedding_range": embedding_range}
    expected = embedding_range or 0.02
    inputs, deviations = batch.inputs, {}
    for name, more in (("added", {}), ("normalised", NORMALIZED)):
        torch.manual_seed(0)
        config = make_config(model={**sizes, **more})
        e = OPT(config.model, config.tasks).embeddings
        image, audio = inputs.parts[IMAGE], inputs.parts[AUDIO]
        deviations[name] = {
            "region": e.regions.feature_norm(e.regions.feature(image.features.float())),
            "box": e.regions.box_norm(e.regions.box(image.boxes)),
            "masked region": e.regions.feature_norm(e.regions.mask[None]),
            "frame": e.frames.feature_norm(e.frames.feature(audio.features.float())),
            "position": e.frames.position_norm(e.frames.position(audio.positions)),
            "type": e.modality.weight,
        }
        deviations[name] = {part: float(rows.std(-1).mean()) for part, rows in deviations[name].items()}
    assert all(found == pytest.approx(expected, rel=0.1) for found in deviations["normalised"].values()), deviations
    added = deviations["added"]
    assert embedding_range or added["region"] > 2 * added["box"], "without the norms the feature drowns the box"


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_norms_of_summands_learn_and_rows_of_zeros_do_no_harm(batch: PackedBatch, norm: str) -> None:
    model = OPT(make_config(model={**NORMALIZED, "norm": norm, "layer_norm_eps": 1e-12}).model, make_config().tasks)
    features = batch.inputs.parts[IMAGE].features
    kept = features.clone()
    features[:3] = 0.0
    hidden = model.encode(batch.inputs)
    (hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    features.copy_(kept)
    for name, parameter in model.embeddings.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name
    largest = {name: p.grad.norm() for name, p in model.embeddings.regions.named_parameters()}
    assert largest["feature.bias"] < 1e4 * largest["box.bias"]


def test_a_model_without_norms_of_summands_has_the_weights_that_it_had() -> None:
    config, other = make_config(), make_config(model=NORMALIZED)
    without, names = (set(OPT(c.model, c.tasks).state_dict()) for c in (config, other))
    assert names - without == {
        f"embeddings.{part}.{kind}" for part in ("regions.feature_norm", "regions.box_norm", "frames.feature_norm",
                                                 "frames.position_norm") for kind in ("weight", "bias")
    }  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("standardize", [False, True])
def test_a_masked_feature_never_reaches_the_encoder(batch: PackedBatch, standardize: bool) -> None:
    model = make_model(make_config(model={"standardize_features": standardize}))
    before = model.encode(batch.inputs)
    for features, masked in (
        (batch.inputs.parts[IMAGE].features, batch.inputs.parts[IMAGE].masked),
        (batch.inputs.parts[AUDIO].features, batch.inputs.parts[AUDIO].masked),
    ):
        kept = features.clone()
        features[masked] = 777.0
        assert torch.equal(model.encode(batch.inputs), before)
        features[masked] = float("inf")
        assert torch.equal(model.encode(batch.inputs), before)
        features.copy_(kept)
        features[~masked] += 1.0
        assert not torch.allclose(model.encode(batch.inputs), before)
        features.copy_(kept)


def test_standardised_features_have_mean_0_and_deviation_1_and_are_clamped() -> None:
    generator = torch.Generator().manual_seed(0)
    stored = torch.randn(5000, 4, generator=generator) * torch.tensor([1.0, 5.0, 0.1, 0.0]) + torch.tensor(
        [3.0, -2, 0, 7]
    )
    standardizer = FeatureStandardizer(4, repeat=2, enabled=True)
    assert torch.equal(standardizer(torch.ones(1, 8)), torch.ones(1, 8)), "the identity until statistics are set"
    standardizer.set_statistics(stored.mean(0), stored.std(0))
    found = standardizer(torch.cat([stored, stored.flip(0)], dim=1))
    assert found.mean(0).abs().max() < 1e-3
    assert torch.allclose(found.std(0), torch.tensor([1.0, 1, 1, 0] * 2), atol=1e-2)
    assert standardizer(stored.new_full((1, 8), 1e6))[0, 0] == STANDARD_LIMIT
    assert set(standardizer.state_dict()) == {"mean", "std"}, "they travel with the weights"
    half = standardizer(stored.new_full((1, 8), 2.0).half())
    assert half.dtype == torch.float32


@pytest.mark.parametrize("others", [0, 1])
def test_a_modality_that_a_store_lacks_leaves_no_nan(others: int, tmp_path: Path, complete: FeatureStore) -> None:
    silent = FeatureStore(complete.path)
    description = silent.description
    nothing = Statistics(mean=[0.0] * 6, std=[1.0] * 6, count=0)  # the values of a store without audio in "train"
    silent.__dict__["description"] = description.model_copy(update={"statistics": {**description.statistics, "audio": nothing}})
    config = make_config(model={"standardize_features": True})
    model = OPT(config.model, config.tasks)
    model.set_feature_statistics([silent, *[complete] * others])
    frames, known = model.embeddings.frame_standardizer, description.statistics["audio"]
    assert torch.allclose(frames.mean, torch.tensor(known.mean) if others else torch.zeros(6), atol=1e-6)
    assert torch.allclose(frames.std, torch.tensor(known.std) if others else torch.ones(6), atol=1e-6)
    assert all(buffer.isfinite().all() for buffer in model.buffers())


@pytest.mark.parametrize("constant", [0.0, 7.0, 60_000.0])
def test_a_dimension_that_never_varies_is_not_blown_up(constant: float, complete: FeatureStore) -> None:
    stores = []
    for count in (3, 1000):
        store = FeatureStore(complete.path)
        flat = Statistics(mean=[constant] * 6, std=[0.0] * 6, count=count)
        store.__dict__["description"] = store.description.model_copy(update={"statistics": {"audio": flat}})
        stores.append(store)
    config = make_config(model={"standardize_features": True})
    model = OPT(config.model, config.tasks)
    model.set_feature_statistics(stores)
    standardizer = model.embeddings.frame_standardizer
    assert torch.equal(standardizer.std, torch.ones(6))
    assert standardizer(torch.full((1, 12), constant)).abs().max() < 1e-2


def test_statistics_of_several_stores_are_pooled(tmp_path, complete: FeatureStore) -> None:
    small = make_store(tmp_path / "s", 12, seed=9)
    config = make_config(model={"standardize_features": True})
    model = OPT(config.model, config.tasks)
    model.set_feature_statistics([complete, small])
    own = []
    for store in (complete, small):
        samples = store.split_samples("train")
        own += [torch.from_numpy(store.regions(row).features.copy()).double() for row in store.rows[samples, 1]]
    vectors = torch.cat(own)
    standardizer = model.embeddings.region_standardizer
    assert torch.allclose(standardizer.mean.double(), vectors.mean(0), atol=1e-4)
    assert torch.allclose(standardizer.std.double(), vectors.std(0, unbiased=False), atol=1e-3)
