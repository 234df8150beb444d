"""The kernels compiled for GPUs that are not here: within their budget of registers and shared memory, without spills, and made
of the instructions that they are written for. NVRTC compiles for all four architectures (its environment is made on first use,
from PyPI); nvcc, where it is on PATH, for its own, and links the extension."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "csrc" / "verify"))
import budget  # noqa: E402
import sass  # noqa: E402
import toolchain  # noqa: E402

NVCC = shutil.which("nvcc")
#: Share of the tensor cores' peak that no unit of sm_70 may keep the kernels from, dropout on or off, by head size.
LEAST_BOUND = {"64": 0.85, "128": 0.60}


@pytest.mark.kernels
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("architecture", toolchain.NVRTC_ARCHITECTURES)
def test_kernels_stay_within_their_budget(architecture: str) -> None:
    measured = budget.measure(architecture)
    print(budget.table(measured))
    assert len(measured) >= sum(len(toolchain.instances(file, architecture)) for file in toolchain.FILES), (
        "every instance is looked at"
    )
    assert {f"{m.name}: {fault}" for m in measured for fault in m.faults()} == set()
    if architecture == "70":
        bounds = {m.name: sass.tensor_bound(sass.tile_loop(m.code))[0] for m in measured if m.code and sass.tile_loop(m.code)}
        assert len(bounds) == 18
        for name, bound in bounds.items():
            assert bound >= LEAST_BOUND.get(name.split()[2], 0.0), f"{name}: {bound:.0%}"


@pytest.mark.kernels
@pytest.mark.timeout(1800)
@pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH: NVRTC's check is the one that always runs")
def test_nvcc_compiles_them_without_spills() -> None:
    assert NVCC is not None
    spilled = []
    for architecture in toolchain.nvcc_architectures(NVCC):
        measured = budget.measure(architecture, nvcc=NVCC)
        print(budget.table(measured))
        spilled += [f"{m.name} sm_{architecture}: {m.resources}" for m in measured if m.resources.spilled_bytes]
    assert spilled == []


@pytest.mark.kernels
@pytest.mark.timeout(1800)
@pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH: the extension cannot be linked with CUDA objects")
def test_the_extension_links_and_imports_with_the_cuda_objects_in(tmp_path: Path) -> None:
    for name in ("opt_ds", "csrc", "setup.py", "pyproject.toml"):
        source, target = ROOT / name, tmp_path / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.so", "_build.json"))
        else:
            shutil.copy(source, target)
    environment = os.environ | {"OPT_DS_CUDA_ARCHITECTURES": "80", "CUDACXX": NVCC or ""}
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tmp_path,
        env=environment,
        check=True,
        capture_output=True,
    )
    record = json.loads((tmp_path / "opt_ds" / "_build.json").read_text())
    built_for = record.pop("torch")
    assert record == {"cpu": "built", "cuda": "built", "architectures": ["80"], "emulator": "built"}, record
    assert built_for.startswith(importlib.metadata.version("torch"))
    code = (
        "import torch\nfrom opt_ds.ops import compiled\nassert compiled.load() == '', compiled.load()\n"
        "dump = torch._C._dispatch_dump('opt_ds::attention')\nassert 'CUDA: ' in dump and 'CPU: ' in dump, dump\n"
        "x, w = torch.randn(3, 64), torch.ones(64)\n"
        "y = torch.ops.opt_ds.layer_norm(x, None, None, w, w, 1e-5, None, 0.0, 0, 0)[0]\n"
        "assert torch.allclose(y, torch.nn.functional.layer_norm(x, (64,), w, w), atol=1e-5)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH: a seeded bug shows the same in the emulator")
@pytest.mark.parametrize(("architecture", "stops"), [("75", True), pytest.param("80", False, marks=pytest.mark.kernels)])
def test_a_kernel_without_its_instruction_stops_instead_of_returning(tmp_path: Path, architecture: str, stops: bool) -> None:
    """sm_75 has no bf16 product: an empty kernel would leave the output as it was."""
    assert NVCC is not None
    source, ptx = ROOT / "csrc" / "kernels" / "attention_forward.cu", tmp_path / "forward.ptx"
    subprocess.run([NVCC, "-ptx", "-std=c++17", f"-arch=compute_{architecture}", f"-I{ROOT / 'csrc' / 'include'}", "-o", ptx,
                    source], check=True)  # fmt: skip
    kernels = {kernel.split("(")[0]: kernel for kernel in ptx.read_text().split(".visible .entry ")[1:]}
    assert len(kernels) == 12
    for name, text in kernels.items():
        assert ("trap;" in text) == (stops and "__nv_bfloat16" in name), name


def test_an_architecture_that_nvcc_does_not_know_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/packaging has the other mistakes, with an nvcc made up."""
    sys.path.insert(0, str(ROOT / "csrc"))
    import build_nvcc

    if NVCC is None:
        with pytest.raises(build_nvcc.NotBuiltError, match="no nvcc on PATH"):
            build_nvcc.find_nvcc("13.0", "g++")
        return
    told = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    nvcc = build_nvcc.find_nvcc(told.split("release ")[1].split(",")[0], "g++")
    monkeypatch.setenv("OPT_DS_CUDA_ARCHITECTURES", "72")
    with pytest.raises(build_nvcc.NotBuiltError, match="does not compile for sm_72"):
        build_nvcc.choose_architectures(nvcc, ())
    with pytest.raises(build_nvcc.NotBuiltError, match="their major versions must agree"):
        build_nvcc.find_nvcc("10.1", "g++")
