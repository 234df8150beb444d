"""Test the decoders: teacher-forced scores equal those of a plain float64 decoder, with and without a cache."""

import pytest
import torch
import torch.nn.functional as F

from opt_ds.data.batch import PackedBatch
from opt_ds.data.modalities import AUDIO, IMAGE, TEXT
from opt_ds.data.samples import SampleReader
from opt_ds.errors import UserError
from opt_ds.model.opt import OPT
from opt_ds.nn.autoregressive import AutoregressiveDecoder
from opt_ds.nn.inputs import DecoderBatch
from opt_ds.ops.sequences import Sequences
from opt_ds.store import FeatureStore
from tests.tiny import make_config, make_model, make_packer, read_samples

PARTS = ("text", "image", "image grid")  # with 2-D positions


def setup(store: FeatureStore, part: str, norm: str = "post") -> tuple[OPT, PackedBatch, torch.Tensor]:
    model = {"norm": norm, "image_positions": "grid" if part == "image grid" else "sequence"}
    config = make_config(model=model, tasks={"sampling_weights": {"modality": 1.0}}, batch={"size": 12})
    model = make_model(config)
    batch = make_packer(config, [store]).pack(read_samples(config, [store]))
    with torch.no_grad():
        return model, batch, model.encode(batch.inputs)


def decoder_of(model: OPT, part: str) -> AutoregressiveDecoder:
    return model.text_decoder if part == "text" else model.image_decoder


def targets_of(batch: PackedBatch, part: str) -> DecoderBatch:
    return getattr(batch.parts["modality"], part.split(" ")[0])


def reference(decoder: AutoregressiveDecoder, norm: str, ids: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """Return the scores of one sequence, computed in float64."""
    w = {name: value.detach().double() for name, value in decoder.named_parameters()}
    heads, eps = 2, decoder.norm.eps
    words, shift = (w["word.weight"], 0) if "word.weight" in w else (w["code.weight"], 1)

    def layer_norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(0, 1) for part in (q, k, v))
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        if causal:
            scores = scores + torch.full(scores.shape[1:], float("-inf"), dtype=torch.float64).triu(1)
        return (torch.softmax(scores, dim=-1) @ v).transpose(0, 1).flatten(1)

    if "position.weight" in w:
        positions = w["position.weight"]
    else:  # rows of the grid one below the other, each read from left to right
        positions = torch.stack([row + column for row in w["position.row.weight"] for column in w["position.column.weight"]])
    x = layer_norm(words[ids + shift] + positions[: len(ids)], "norm")
    stream, memory = x, memory.double()
    for i in range(len(decoder.decoder.layers)):
        at = f"decoder.layers.{i}"

        def self_attention(x: torch.Tensor, at: str = at) -> torch.Tensor:
            return linear(attend(*linear(x, f"{at}.attention.qkv").chunk(3, -1), True), f"{at}.attention.output")

        def cross_attention(x: torch.Tensor, at: str = at) -> torch.Tensor:
            k, v = linear(memory, f"{at}.cross.key_value").chunk(2, -1)
            return linear(attend(linear(x, f"{at}.cross.query"), k, v, False), f"{at}.cross.output")

        def feed(x: torch.Tensor, at: str = at) -> torch.Tensor:
            return linear(F.gelu(linear(x, f"{at}.ffn.up")), f"{at}.ffn.down")

        for sublayer, after in (
            (self_attention, "attention_norm"),
            (cross_attention, "cross_norm"),
            (feed, "ffn_norm"),
        ):
            total = stream + sublayer(x)
            x = layer_norm(total, f"{at}.{after}")
            stream = total if norm == "pre" else x
    return x @ words[shift:].T + w["bias"]


@torch.no_grad()
@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("part", PARTS)
def test_teacher_forced_scores_are_their_formula(ragged: FeatureStore, part: str, norm: str) -> None:
    model, batch, hidden = setup(ragged, part, norm)
    decoder, decoder_batch = decoder_of(model, part), targets_of(batch, part)
    found = decoder.scores(decoder_batch, hidden).split(decoder_batch.sequences.lengths.tolist())
    ids = decoder_batch.input_ids.split(decoder_batch.sequences.lengths.tolist())
    memories = hidden[decoder_batch.memory_index].split(decoder_batch.memory.lengths.tolist())
    assert len(found) > 3 and len({len(m) for m in memories}) > 3, "ragged memories"
    for own, own_ids, memory in zip(found, ids, memories, strict=True):
        assert (own - reference(decoder, norm, own_ids, memory)).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("part", PARTS)
def test_decoding_with_a_cache_gives_the_teacher_forced_scores(ragged: FeatureStore, part: str, norm: str) -> None:
    model, batch, hidden = setup(ragged, part, norm)
    decoder, decoder_batch = decoder_of(model, part), targets_of(batch, part)
    truth = decoder.scores(decoder_batch, hidden)
    caches = decoder.start(hidden[decoder_batch.memory_index], decoder_batch.memory)
    inputs, valid = decoder_batch.sequences.pad(decoder_batch.input_ids), decoder_batch.sequences.valid
    steps = [decoder.decode(inputs[:, place], place, caches) for place in range(inputs.shape[1])]
    found = torch.stack(steps, dim=1)[valid]
    assert (found - truth).abs().max() <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("part", PARTS)
def test_a_cache_can_be_reordered(ragged: FeatureStore, part: str) -> None:
    """A beam's survivors: sequence 2 twice, then sequence 0."""
    model, batch, hidden = setup(ragged, part)
    decoder, decoder_batch = decoder_of(model, part), targets_of(batch, part)
    count = len(decoder_batch.memory)
    begin = torch.full((count,), int(decoder_batch.input_ids[0]))
    caches = decoder.start(hidden[decoder_batch.memory_index], decoder_batch.memory)
    decoder.decode(begin, 0, caches)
    second = torch.arange(count) % 10 + 5
    truth = decoder.decode(second, 1, [cache.select(torch.arange(count)) for cache in caches])
    survivors = torch.tensor([2, 2, 0])
    found = decoder.decode(second[survivors], 1, [cache.select(survivors) for cache in caches])
    assert (found - truth[survivors]).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("part", PARTS)
def test_what_is_written_later_is_not_seen(ragged: FeatureStore, part: str) -> None:
    model, batch, hidden = setup(ragged, part)
    decoder, decoder_batch = decoder_of(model, part), targets_of(batch, part)
    before = decoder.scores(decoder_batch, hidden)
    last = decoder_batch.sequences.cu_seqlens[1:].long() - 1
    earlier = torch.ones(len(before), dtype=torch.bool)
    earlier[last] = False
    decoder_batch.input_ids[last] = (decoder_batch.input_ids[last] + 3).clamp(max=15)
    after = decoder.scores(decoder_batch, hidden)
    assert torch.equal(before[earlier], after[earlier]) and not torch.allclose(before[last], after[last])


def test_a_text_decoder_that_writes_nothing_asks_for_no_table_of_zeros() -> None:
    model = make_model(make_config())
    words, nothing = model.text_decoder.word, torch.empty(0, dtype=torch.int64)
    found = model.text_decoder._embed(nothing)
    assert found.shape == (0, words.embedding_dim) and found.dtype == words.weight.dtype
    found.sum().backward()  # possible, as ZeRO 3 hears the call in backward too
    assert words.weight.grad is None, "30,522 rows of zeros would cost as much as a gradient"
    model.text_decoder._embed(torch.tensor([1, 5])).sum().backward()
    assert words.weight.grad is not None


@torch.no_grad()
def test_every_modality_and_only_the_own_sample_is_seen(complete: FeatureStore) -> None:
    config = make_config()
    model, reader = make_model(config), SampleReader(config, [complete])
    samples = [reader.read_unmasked(0, i) for i in (1, 2, 3)]
    inputs = make_packer(config, [complete]).pack(samples).inputs
    hidden = model.encode(inputs)
    memory_index = torch.arange(len(hidden))
    lengths = inputs.sequences.lengths.tolist()
    decoder_batch = DecoderBatch(
        input_ids=torch.tensor([2, 7, 2, 7, 2, 7]), target_ids=torch.zeros(6, dtype=torch.long),
        positions=torch.tensor([0, 1] * 3), sequences=Sequences.from_lengths([2, 2, 2]),
        memory_index=memory_index, memory=inputs.sequences,
    )  # fmt: skip
    before = model.text_decoder.scores(decoder_batch, hidden)
    for modality in (inputs.parts[TEXT].index, inputs.parts[IMAGE].index, inputs.parts[AUDIO].index):
        own = modality[(modality >= lengths[0]) & (modality < lengths[0] + lengths[1])]
        changed = hidden.clone()
        changed[own] += 1.0
        after = model.text_decoder.scores(decoder_batch, changed)
        assert not torch.allclose(after[2:4], before[2:4])
        assert torch.equal(after[:2], before[:2]) and torch.equal(after[4:], before[4:])


def test_codes_that_form_no_square_have_no_grid() -> None:
    with pytest.raises(UserError, match="image_positions grid requires a square number of codes, num_image_codes is 60"):
        make_config(model={"num_image_codes": 60, "image_positions": "grid"})
    assert make_config(model={"num_image_codes": 60}).model.image_positions == "sequence"


def test_rows_and_columns_are_shared_and_nothing_else_changes() -> None:
    """The grid has 8 + 8 positions, not 64; a model without it has the parameters and initial weights as ever."""
    sequence, grid = (make_model(make_config(model={"image_positions": kind})) for kind in ("sequence", "grid"))
    shapes = {name: tuple(value.shape) for name, value in sequence.named_parameters()}
    other = {name: tuple(value.shape) for name, value in grid.named_parameters()}
    assert shapes.items() - other.items() == {("image_decoder.position.weight", (64, 16))}
    own = "image_decoder.position"
    assert other.items() - shapes.items() == {(f"{own}.row.weight", (8, 16)), (f"{own}.column.weight", (8, 16))}
    assert grid.image_decoder.position.row.weight.std().item() == pytest.approx(0.2, rel=0.2), "as every other table"
