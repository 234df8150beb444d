"""Bugs put into the sources on purpose: each must be caught, or the checks prove nothing. Three of them run in `make test`, the
others in `make test-kernels`, which prints the table."""

import shutil
from pathlib import Path

import pytest

from tests.csrc.emulated import CSRC, Builder, run

FORWARD, BACKWARD = "kernels/attention_forward.cu", "kernels/attention_backward.cu"
LN_FORWARD, LN_BACKWARD = "kernels/layer_norm_forward.cu", "kernels/layer_norm_backward.cu"
ROWS, TILE, SM70, SM75 = (f"include/opt_ds/{name}.h" for name in ("row_layout", "attention_tile", "mma_sm70", "mma_sm75"))
DEVICE, DROPOUT, SIMT = "include/opt_ds/device.h", "include/opt_ds/dropout.h", "emulator/simt.cpp"
BLOCK = "include/opt_ds/attention_block.h"

# what, file, this text, becomes, found by, running
BUGS = [
    ("missing barrier between the warps' sums of a row", ROWS, "__syncthreads();  // BARRIER row_sum", "", "tsan", "layer_norm"),
    ("missing barrier before adding partial rows", LN_BACKWARD,
     "__syncthreads();  // BARRIER partials", "", "tsan", "layer_norm"),
    ("missing barrier between warps that pass sums on", LN_BACKWARD,
     "__syncthreads();  // BARRIER pass_on", ";", "tsan", "layer_norm"),
    ("one buffer for the sums of successive rows", LN_BACKWARD, "buffer ^= 1", "buffer ^= 0", "tsan", "layer_norm"),
    ("half of a warp left out of a sum", DEVICE, "distance = kWarp / 2", "distance = kWarp / 4", "plain", "layer_norm"),
    ("a row's tail overrun", LN_FORWARD, "if (column >= width) continue;", "", "asan", "layer_norm"),
    ("backward draws another row's dropout", LN_BACKWARD,
     "keep8(dropout, row_keys + 2 * row, column)", "keep8(dropout, row_keys, column)", "plain", "layer_norm"),
    ("average of g * xhat forgotten", LN_BACKWARD, "xhat[chunk][i] * avg_gx", "avg_gx", "plain", "layer_norm"),
    ("missing barrier between tiles, forward", FORWARD, "__syncthreads();  // BARRIER tile", "", "tsan", "attention"),
    ("missing barrier before the first tile, forward", FORWARD,
     "__syncthreads();  // BARRIER first_tile", "", "tsan", "attention"),
    ("missing barrier after loading queries", FORWARD, "__syncthreads();  // BARRIER queries\n", "\n", "tsan", "attention"),
    ("tiles overwrite queries that others still read", FORWARD,
     "__syncthreads();  // BARRIER queries_read", "", "plain", "attention"),
    ("missing barrier between tiles, backward", BACKWARD, "__syncthreads();  // BARRIER tile", "", "tsan", "attention"),
    ("a single buffer overwritten while in use", BACKWARD,
     "if (Memory::kBuffers == 1) __syncthreads();", "", "tsan", "attention"),
    ("a sequence's tail overrun", TILE, "if (row + n * kRowsApart < num_rows)", "if (true)", "asan", "attention"),
    ("keys past the end not masked", FORWARD, "key0 + kTileRows > num_keys || ", "", "plain", "attention"),
    ("a tile on the diagonal skipped", FORWARD,
     "key0 < warp_row + Shape::kWarpRows", "key0 + kTileRows < warp_row + Shape::kWarpRows", "plain", "attention"),
    ("the wrong shuffle partner", SM70, "second ? row0 : row1, 2)", "second ? row0 : row1, 1)", "plain", "attention"),
    ("the wrong shuffle, other half's columns", SM70, "own[g][e], 4)", "own[g][e], 8)", "plain", "attention"),
    ("a maximum over half of a row", SM70, "kRowLanesB = 4", "kRowLanesB = 8", "plain", "attention"),
    ("a shuffle with the wrong mask", FORWARD,
     "__shfl_xor_sync(kAllLanes, maximum, M::kRowLanesA)",
     "__shfl_xor_sync(0xffffu, maximum, M::kRowLanesA)", "plain", "attention"),
    ("values read in the keys' order of the other half", SM70,
     "4 * (right ^ who) + quad", "4 * who + quad", "plain", "attention"),
    ("the wrong Philox counter in the backward pass", BACKWARD,
     "tile0 + mma.drawn_column()", "tile0 + 1 + mma.drawn_column()", "plain", "attention"),
    ("dropout bits given to the wrong lanes", SM70, "trade_bits<3, 3>", "trade_bits<3, 4>", "plain", "attention"),
    ("dropout of the wrong head", FORWARD, "query, sample, head)", "query, sample, 0)", "plain", "attention"),
    ("delta forgotten", BACKWARD, "column_delta[j][e] : row_delta[mt][r]", "0.f : row_delta[mt][r]", "plain", "attention"),
    ("causal edge off by one", BACKWARD, "own_row > other :", "own_row >= other :", "plain", "attention"),
    ("bf16 sent to tensor cores that only take fp16", BLOCK,
     "a.type == kOptDsBFloat16 && compiled_architecture() >= 80", "a.type == kOptDsBFloat16", "plain", "plain"),
    ("accumulator layout of another instruction", SIMT, "n = (i & 4) + (lane & 2) + (i & 1)", "n = i", "plain", "attention"),
]  # fmt: skip
# Found by the emulator of a later architecture.
BUGS_SM80 = [
    ("ldmatrix not transposed for the values", SM75, "ldmatrix<true>", "ldmatrix<false>", "plain", "attention"),
    ("halves of a B operand exchanged", SM75, "instruction(c, a, b.x, b.y)", "instruction(c, a, b.y, b.x)", "plain", "attention"),
    ("dropout bits given to the wrong lanes, m16n8", SM75, "trade_bits<2, 0>", "trade_bits<1, 0>", "plain", "attention"),
    ("rows stored without the transposition", SM75, "swap_words(word[0], word[2], 2);", "", "plain", "attention"),
]
QUICK = ("backward draws another row's dropout", "the wrong Philox counter in the backward pass", "keys past the end not masked")


def caught(builder: Builder, tmp_path: Path, bug: tuple[str, ...], arch: int) -> None:
    what, file, text, becomes, checker, running = bug
    csrc = Path(shutil.copytree(CSRC, tmp_path / "csrc", ignore=shutil.ignore_patterns("__pycache__")))
    source = (csrc / file).read_text(encoding="utf-8")
    assert text in source, f"{file} has no {text!r} any more: bring the bug up to date"
    (csrc / file).write_text(source.replace(text, becomes), encoding="utf-8")
    found = run(builder.build(checker=checker, arch=arch, csrc=csrc, changed=file), running, "quick", seed=3)
    assert found.returncode != 0, f"{what}: nobody noticed"
    how = {"tsan": "ThreadSanitizer", "asan": "AddressSanitizer"}.get(checker)
    if how:
        summary = next((line for line in found.stderr.splitlines() if line.startswith("SUMMARY: ")), "")
        assert how in summary and "simt::" not in summary, f"not found in the kernel itself: {found.stderr[-2000:]}"
    else:
        how = found.stderr.strip().splitlines()[-1] if found.stderr.startswith("simt:") else "comparison with float64"
    print(f"| {what} | {file} | {how} |")


def named(bugs: list[tuple[str, ...]], quick: bool) -> list:
    return [pytest.param(bug, id=bug[0]) for bug in bugs if (bug[0] in QUICK) == quick]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("bug", named(BUGS, quick=True))
def test_a_seeded_bug_is_caught(builder: Builder, tmp_path: Path, bug: tuple[str, ...]) -> None:
    caught(builder, tmp_path, bug, 70)


@pytest.mark.kernels
@pytest.mark.timeout(900)
@pytest.mark.parametrize("bug", named(BUGS, quick=False))
def test_every_seeded_bug_is_caught(builder: Builder, tmp_path: Path, bug: tuple[str, ...]) -> None:
    caught(builder, tmp_path, bug, 70)


@pytest.mark.kernels
@pytest.mark.timeout(900)
@pytest.mark.parametrize("bug", named(BUGS_SM80, quick=False))
def test_every_seeded_bug_of_sm_80_is_caught(builder: Builder, tmp_path: Path, bug: tuple[str, ...]) -> None:
    caught(builder, tmp_path, bug, 80)


FAULTS = {
    "missing barrier": ("tsan", "ThreadSanitizer"),
    "missing syncwarp": ("tsan", "ThreadSanitizer"),
    "race between blocks": ("tsan", "ThreadSanitizer"),
    "tail overrun": ("asan", "AddressSanitizer"),
    "shuffle outside its mask": ("plain", "a shuffle reads a lane outside its mask"),
    "wrong shuffle mask": ("plain", "a lane is not in its own mask"),
    "divergent barrier": ("plain", "deadlock"),
    "misaligned ldmatrix": ("plain", "not aligned to 16 bytes"),
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("checker", ["plain", "asan", "tsan"])
def test_sound_kernels_pass_the_emulator(builder: Builder, checker: str) -> None:
    found = run(builder.build("check_emulator", checker), "none")
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.timeout(300)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_emulator_sees_a_faulty_kernel(builder: Builder, fault: str) -> None:
    checker, message = FAULTS[fault]
    found = run(builder.build("check_emulator", checker), fault, seed=3)
    assert found.returncode != 0 and message in found.stderr, found.stdout + found.stderr
