"""The static model: what the kernels must move, against the least possible and against PyTorch's unfused sequence."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "csrc" / "verify"))
import sass  # noqa: E402
import static_model as model  # noqa: E402


@pytest.mark.parametrize("gpu", model.GPUS, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("shape", model.LAYER_NORM_SHAPES)
def test_layer_norm_moves_hardly_more_than_it_must(gpu: model.Gpu, shape: tuple[int, int]) -> None:
    least, ours, eager = model.layer_norm_least(*shape), model.layer_norm_fused(*shape, gpu), model.layer_norm_unfused(*shape)
    total = sum(c.bytes for c in ours)
    assert total <= 1.15 * sum(c.bytes for c in least)
    assert 1.8 * total <= sum(c.bytes for c in eager)


@pytest.mark.parametrize("length", [128, 256, 512])
def test_attention_moves_a_quarter_of_the_unfused_sequence_at_most(length: int) -> None:
    ours, eager = (
        sum((c.bytes for c in count(32, 12, length, 64)), 0.0) for count in (model.attention_fused, model.attention_unfused)
    )
    assert 4 * ours <= eager


def test_two_blocks_of_each_attention_kernel_fit_a_multiprocessor_of_the_v100() -> None:
    for size in (32, 64, 128):
        for backward in (False, True):
            assert model.blocks_per_multiprocessor(model.GPUS[0], 255, 128, model.attention_shared_bytes(size, backward)) >= 2


def test_the_tables_in_the_benchmarks_are_these() -> None:
    readme = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    missing = [line for line in model.tables().splitlines() if line not in readme]
    assert missing == [], "run python csrc/verify/static_model.py and bring benchmarks/README.md up to date"


def test_a_loop_is_weighed_by_its_units() -> None:
    """Two tensor steps, a wide load, a special function and an edge-only mask, in a loop."""
    code = [
        ("HMMA.884.F32.F32.STEP0", ""),
        ("HMMA.884.F32.F32.STEP1", ""),
        ("LDS.U.128", ""),
        ("MUFU.EX2", ""),
        ("IMAD.WIDE", ""),
    ]
    code += [("BRA", " `(.L_2)")] + [("FSEL", "")] * 24 + [("FADD", ""), ("BRA", " `(.L_1)")]
    kernel = sass.Kernel("k", [sass.Instruction(o, rest, False) for o, rest in code], {".L_1": 0, ".L_2": 30})
    units = sass.tile_loop(kernel)
    assert units == {"tensor": 4, "issue": 8, "shared memory": 16, "special": 8, "multiply": 6, "logic": 0}
    assert sass.tensor_bound(units) == (0.25, "shared memory")
