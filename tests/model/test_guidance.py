"""Test classifier-free guidance: both passes with their own caches, the formula at every position, in any batch."""

import numpy as np
import pytest
import torch

from opt_ds.model.generation import DecodingConfig, write
from opt_ds.model.guidance import GuidedDecoder
from opt_ds.model.opt import OPT
from opt_ds.nn.inputs import DecoderBatch
from opt_ds.ops.sequences import Sequences
from tests.tiny import make_config, make_model

LENGTHS = [2, 4, 1]
SAMPLING = DecodingConfig(method="sample", seed=3, temperature=0.7)


@pytest.fixture(scope="module", params=["sequence", "grid"])
def model(request: pytest.FixtureRequest) -> OPT:
    return make_model(make_config(model={"num_image_codes": 9, "image_positions": request.param})).eval()


@pytest.fixture(scope="module")
def memory() -> tuple[torch.Tensor, Sequences]:
    torch.manual_seed(1)
    return 3 * torch.randn(sum(LENGTHS), 16), Sequences.from_lengths(LENGTHS)


@pytest.fixture(scope="module")
def null() -> torch.Tensor:
    torch.manual_seed(2)
    return 3 * torch.randn(1, 16)


@torch.no_grad()
def full_scores(model: OPT, memory_ue: torch.Tensor, codes: list[int]) -> torch.Tensor:
    """Return the scores [codes, v] of one sequence by a forward pass over the complete sequence, without a cache."""
    own, targets = Sequences.from_lengths([len(codes)]), torch.tensor(codes)
    batch = DecoderBatch(
        torch.cat([torch.tensor([-1]), targets[:-1]]), targets, torch.arange(len(codes)), own,
        torch.arange(len(memory_ue)), Sequences.from_lengths([len(memory_ue)]),
    )  # fmt: skip
    return model.image_decoder.scores(batch, memory_ue)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 4.0])
@torch.inference_mode()
def test_the_scores_are_the_formula_of_two_full_passes(model: OPT, memory: tuple, null: torch.Tensor, scale: float) -> None:
    codes_bs = np.random.default_rng(0).integers(0, 16, (3, 9))
    guided = GuidedDecoder(model.image_decoder, null, scale)
    caches, last = guided.start(*memory), torch.full((3,), -1)
    found = []
    for position in range(9):
        found.append(guided.decode(last, position, caches))
        last = torch.from_numpy(codes_bs[:, position])
    found_bsv = torch.stack(found, 1)
    for own, codes, rows in zip(found_bsv, codes_bs.tolist(), memory[0].split(LENGTHS), strict=True):
        conditional, unconditional = full_scores(model, rows, codes), full_scores(model, null, codes)
        assert (conditional - unconditional).abs().max() > 0.1, "the condition matters"
        torch.testing.assert_close(own, unconditional + scale * (conditional - unconditional), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [SAMPLING, DecodingConfig(), DecodingConfig(method="beam", beam_size=3)])
def test_scale_0_writes_what_no_input_gives(
    model: OPT, memory: tuple, null: torch.Tensor, options: DecodingConfig
) -> None:
    nothing = null.repeat(3, 1), Sequences.from_lengths([1, 1, 1])
    expected = write(model.image_decoder, *nothing, -1, None, options)
    assert write(GuidedDecoder(model.image_decoder, null, 0.0), *memory, -1, None, options) == expected
    assert expected != write(model.image_decoder, *memory, -1, None, options)


def test_the_batch_changes_nothing(model: OPT, memory: tuple, null: torch.Tensor) -> None:
    guided = GuidedDecoder(model.image_decoder, null, 2.5)
    together = write(guided, *memory, -1, None, SAMPLING)
    assert together != write(model.image_decoder, *memory, -1, None, SAMPLING)
    for number, rows in enumerate(memory[0].split(LENGTHS)):
        alone = write(guided, rows, Sequences.from_lengths([len(rows)]), -1, None, SAMPLING, np.array([number]))
        assert alone == [together[number]]
