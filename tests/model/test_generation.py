import numpy as np
import pytest
import torch

from opt_ds.model import generation
from opt_ds.model.generation import DecodingConfig, sample_scores, write
from opt_ds.model.opt import OPT
from opt_ds.ops.sequences import Sequences
from tests.tiny import make_config, make_model

BEGIN, END = 2, 3


@pytest.fixture(scope="module")
def model() -> OPT:
    return make_model(make_config(model={"max_text_tokens": 6})).eval()


@pytest.fixture(scope="module")
def memory() -> tuple[torch.Tensor, Sequences]:
    torch.manual_seed(1)
    return torch.randn(9, 16), Sequences.from_lengths([2, 4, 3])


def log_likelihood(model: OPT, memory_ue: torch.Tensor, ids: list[int], ends: bool) -> float:
    """Return the score of items in this order, one decoded position at a time."""
    memory = Sequences.from_lengths([len(memory_ue)])
    caches, last, total = model.text_decoder.start(memory_ue, memory), BEGIN, 0.0
    with torch.inference_mode():
        for position, item in enumerate([*ids, END] if ends else ids):
            scores = model.text_decoder.decode(torch.tensor([last]), position, caches)
            total += float(torch.log_softmax(scores, -1)[0, item])
            last = item
    return total


def test_greedy_takes_the_best_item_each_time(model: OPT, memory: tuple) -> None:
    written = write(model.text_decoder, *memory, BEGIN, END, DecodingConfig())
    assert len(written) == 3
    for b, ids in enumerate(written):
        rows = memory[0][memory[1].cu_seqlens[b] : memory[1].cu_seqlens[b + 1]]
        caches, last = model.text_decoder.start(rows, Sequences.from_lengths([len(rows)])), BEGIN
        for position, item in enumerate(ids):
            with torch.inference_mode():
                assert int(model.text_decoder.decode(torch.tensor([last]), position, caches).argmax()) == item
            last = item


@pytest.mark.parametrize("looks", [1, 3])
def test_sequences_that_end_early_leave_the_batch_and_the_others_go_on(
    model: OPT, looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each sequence is generated as it is alone, whatever the other sequences and the check for finished ones."""
    monkeypatch.setattr(generation, "_LOOK_EVERY", {"cpu": looks})
    torch.manual_seed(3)
    lengths = [3, 5, 2, 4, 4, 1, 6, 2, 3, 5]
    rows, options = 3 * torch.randn(sum(lengths), 16), DecodingConfig(method="sample", seed=2, temperature=0.5)
    with torch.no_grad():
        bias = model.text_decoder.bias.clone()
        model.text_decoder.bias[END] += 2.5
    try:
        together = write(model.text_decoder, rows, Sequences.from_lengths(lengths), BEGIN, END, options)
        for number, own in enumerate(rows.split(lengths)):
            one, key = Sequences.from_lengths([len(own)]), np.array([number])
            assert write(model.text_decoder, own, one, BEGIN, END, options, key) == [together[number]]
    finally:
        with torch.no_grad():
            model.text_decoder.bias.copy_(bias)
    assert len({len(text) for text in together}) >= 3, "some end early, some late"


def test_a_wide_beam_finds_the_most_likely_text(model: OPT, memory: tuple) -> None:
    """Two items at most: all texts can be tried."""
    options = DecodingConfig(method="beam", beam_size=40, length_penalty=0.0, max_length=2)
    written = write(model.text_decoder, *memory, BEGIN, END, options)
    rows = memory[0][:2]
    texts = [[], *([a] for a in range(40) if a != END)]
    best = max(texts, key=lambda ids: log_likelihood(model, rows, ids, ends=True))
    assert written[0] == best


def test_beam_search_is_at_least_as_likely_as_greedy(model: OPT, memory: tuple) -> None:
    greedy = write(model.image_decoder, *memory, -1, None, DecodingConfig(max_length=5))
    beam = write(model.image_decoder, *memory, -1, None, DecodingConfig(method="beam", beam_size=8, max_length=5))

    def likelihood(rows: torch.Tensor, ids: list[int]) -> float:
        caches, last, total = model.image_decoder.start(rows, Sequences.from_lengths([len(rows)])), -1, 0.0
        with torch.inference_mode():
            for position, item in enumerate(ids):
                scores = model.image_decoder.decode(torch.tensor([last]), position, caches)
                total, last = total + float(torch.log_softmax(scores, -1)[0, item]), item
        return total

    for b in range(3):
        rows = memory[0][memory[1].cu_seqlens[b] : memory[1].cu_seqlens[b + 1]]
        assert likelihood(rows, beam[b]) >= likelihood(rows, greedy[b]) - 1e-5


def test_sampling_depends_on_seed_and_key_but_not_on_the_batch(model: OPT, memory: tuple) -> None:
    options = DecodingConfig(method="sample", seed=5)
    keys = np.array([10, 11, 12])
    together = write(model.image_decoder, *memory, -1, None, options, keys)
    alone = write(model.image_decoder, memory[0][2:6], Sequences.from_lengths([4]), -1, None, options, keys[1:2])
    assert together[1] == alone[0]
    assert together != write(model.image_decoder, *memory, -1, None, DecodingConfig(method="sample", seed=6), keys)


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        (DecodingConfig(method="sample", top_k=2), {0, 1}),
        (DecodingConfig(method="sample", top_p=0.5), {0}),
        (DecodingConfig(method="sample", top_p=0.7), {0, 1}),
        (DecodingConfig(method="sample"), {0, 1, 2}),
        (DecodingConfig(method="sample", temperature=1e-3), {0}),
    ],
)
def test_top_k_and_top_p_bound_the_outcomes(options: DecodingConfig, allowed: set[int]) -> None:
    scores = torch.log(torch.tensor([[0.6, 0.25, 0.15]])).expand(1000, -1)
    drawn = sample_scores(scores, torch.linspace(0, 1, 1001)[:1000], options)
    assert set(drawn.tolist()) == allowed


def test_sampling_has_the_model_s_distribution() -> None:
    scores = torch.log(torch.tensor([[0.15, 0.6, 0.25]])).expand(2000, -1)
    drawn = sample_scores(scores, torch.linspace(0, 1, 2001)[:2000], DecodingConfig(method="sample"))
    shares = torch.bincount(drawn, minlength=3) / 2000
    torch.testing.assert_close(shares, torch.tensor([0.15, 0.6, 0.25]), atol=2e-3, rtol=0)


def test_nothing_to_write_from_writes_nothing(model: OPT) -> None:
    assert write(model.text_decoder, torch.empty(0, 16), Sequences.from_lengths([]), BEGIN, END, DecodingConfig()) == []
