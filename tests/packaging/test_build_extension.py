"""csrc/build_extension.py with compilers that fail in every way: what can be built is built, and the record says why the rest is
not. Small scripts stand in for g++ and nvcc, so that a build takes a moment; they log their arguments and write empty files."""

import json
import sys
from pathlib import Path

import pytest

from tests.packaging.declared import ROOT

sys.path.insert(0, str(ROOT / "csrc"))
import build_extension
import build_nvcc
import build_torch
from setuptools import Distribution
from setuptools.errors import SetupError

TORCH = build_torch.Torch(version="2.14.1+cu130", folder="/torch", cuda="13.0", cxx11_abi=True, gpus=())
_COMPILE = """
echo "$0 $*" >> "{log}"
while (($#)); do [[ $1 == -o ]] && out=$2; [[ $1 == *.o ]] && {{ [[ $last == -o || -f $1 ]] || exit 4; }}; last=$1; shift; done
> "$out"
"""
_NVCC = """
case "$*" in
  *--version*) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
  *--list-gpu-arch*) printf "compute_%s\\n" 75 80 86 90 ;;
  *--dryrun*) echo "#$ TOP={toolkit}" >&2 ;;
  *) {compile} ;;
esac
"""


class Machine:
    """A folder with compilers, and builds that use them."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.log, self.monkeypatch = folder, folder / "log", monkeypatch
        self.toolkit = folder / "cuda"
        (self.toolkit / "lib64").mkdir(parents=True)
        (self.toolkit / "lib64" / "libcudart_static.a").touch()
        self.compile = _COMPILE.format(log=self.log)
        for name in ("CUDACXX", "OPT_DS_BUILD_KERNELS", "MAX_JOBS"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")
        monkeypatch.setenv("OPT_DS_CUDA_ARCHITECTURES", "80")
        monkeypatch.setenv("CXX", str(self.program("my-g++", self.compile)))
        monkeypatch.setattr(build_extension, "find_torch", lambda: TORCH)
        self.nvcc = self.program("nvcc", self.nvcc_that(self.compile))

    def program(self, name: str, text: str) -> Path:
        path = self.folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)
        return path

    def nvcc_that(self, compile_: str) -> str:
        return _NVCC.format(toolkit=self.toolkit, compile=compile_)

    def build(self) -> dict:
        """The record of a build, checked against the files that are there."""
        command = build_extension.BuildKernels(Distribution({"name": "x", "ext_modules": build_extension.kernel_extensions()}))
        command.build_lib, command.build_temp = str(self.folder / "lib"), str(self.folder / "temp")
        command.ensure_finalized()
        command.run()
        package = self.folder / "lib" / "opt_ds"
        record = json.loads((package / "_build.json").read_text())
        for part, name in (("cpu", "_C"), ("emulator", "_emulator")):
            assert bool(list(package.glob(f"{name}.*.so"))) == (record[part] == "built"), record
        for reason in (record["cpu"], record["cuda"], record["emulator"]):
            assert reason and "\n" not in reason
        assert sorted(command.get_outputs()) == sorted(map(str, package.iterdir())), "an installation knows all its files"
        return record

    def commands(self, program: str) -> list[str]:
        lines = self.log.read_text().splitlines()
        return [line.partition(" ")[2] for line in lines if line.split()[0].endswith(f"/{program}")]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_all_parts_are_built_against_torch(machine: Machine) -> None:
    record = {"cpu": "built", "cuda": "built", "architectures": ["80"], "emulator": "built", "torch": TORCH.version}
    assert machine.build() == record
    kernels = machine.commands("nvcc")
    assert len(kernels) == len(build_extension.KERNELS)
    assert all(f"-ccbin={machine.folder}/bin/my-g++ " in line for line in kernels), "nvcc uses the compiler that CXX names"
    bindings = [line for line in machine.commands("my-g++") if line.endswith("binding.cpp -o " + line.split()[-1])]
    assert ["-DOPT_DS_WITH_CUDA" in line for line in bindings].count(True) == 1


@pytest.mark.parametrize("abi", [True, False])
def test_the_abi_of_torch_is_taken_over(machine: Machine, abi: bool) -> None:
    torch = build_torch.Torch(**vars(TORCH) | {"cxx11_abi": abi})
    machine.monkeypatch.setattr(build_extension, "find_torch", lambda: torch)
    machine.build()
    lines = [line for line in machine.commands("my-g++") if "/torch/include" in line]
    assert len(lines) == 6 and all(f"-D_GLIBCXX_USE_CXX11_ABI={int(abi)} " in line for line in lines)


@pytest.mark.parametrize(
    ("compile_", "reason"),
    [
        ('echo "x.cu(3): error: no such thing" >&2; exit 1', "nvcc failed: x.cu(3): error: no such thing"),
        ("exit 3", "nvcc failed: exit code 3, without a message"),
        ("kill -9 $$", "nvcc failed: exit code -9, without a message"),
        ('printf "\\xff\\xfe error" >&2; exit 1', "nvcc failed: "),
        ("true", "my-g++ failed: exit code 4"),  # reports success and writes nothing
    ],
)
def test_a_failing_nvcc_leaves_the_cpu_operators_and_the_emulator(machine: Machine, compile_: str, reason: str) -> None:
    machine.program("nvcc", machine.nvcc_that(compile_))
    record = machine.build()
    assert (record["cpu"], record["emulator"], record["architectures"]) == ("built", "built", [])
    assert record["cuda"].startswith(reason), record
    linked = [line for line in machine.commands("my-g++") if "-shared" in line and "_C." in line][-1]
    assert "cuda" not in linked.replace(str(machine.folder), "")


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("missing", 'CUDACXX is "{path}", which is no program that can be run: set it to the path of nvcc'),
        ("folder", 'CUDACXX is "{path}", which is no program that can be run: set it to the path of nvcc'),
        ("not executable", 'CUDACXX is "{path}", which is no program that can be run: set it to the path of nvcc'),
        ("no interpreter", "{path} cannot be run: No such file or directory"),
        ("no format", "{path} cannot be run: Exec format error"),
        ("fails", "broken failed: line 1: oops"),
        ("silent", "{path} is of an unknown version (its --version names no release), torch was built with CUDA 13.0: "
                   "their major versions must agree"),
        ("old", "{path} is CUDA 12.4, torch was built with CUDA 13.0: their major versions must agree"),
    ],
)  # fmt: skip
def test_a_broken_cudacxx_is_one_line(machine: Machine, what: str, reason: str) -> None:
    path = machine.folder / "bin" / "broken"
    texts = {"not executable": "true", "fails": "echo 'line 1: oops' >&2; exit 1", "silent": "true", "old": "echo release 12.4"}
    if what in texts:
        machine.program("broken", texts[what])
    if what == "folder":
        path.mkdir()
    if what == "not executable":
        path.chmod(0o644)
    if what in ("no interpreter", "no format"):
        path.write_bytes(b"#!/no/such/interpreter\n" if what == "no interpreter" else b"\x7fELFnonsense")
        path.chmod(0o755)
    machine.monkeypatch.setenv("CUDACXX", str(path))
    record = machine.build()
    assert record["cuda"] == reason.format(path=path)
    assert (record["cpu"], record["emulator"]) == ("built", "built")


@pytest.mark.parametrize(
    ("text", "built", "flag"),
    [
        ("8.0+PTX", ["80+PTX"], "-gencode=arch=compute_80,code=[sm_80,compute_80]"),
        ("90a", ["90a"], "-gencode=arch=compute_90a,code=sm_90a"),
        ("9.0A", ["90a"], "-gencode=arch=compute_90a,code=sm_90a"),
        ("8.0;9.0", ["80", "90"], "-gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90,code=sm_90"),
        (" sm_90, 80 80+ptx;", ["80+PTX", "90"], "code=[sm_80,compute_80] -gencode=arch=compute_90,code=sm_90"),
    ],
)
def test_architectures_as_people_write_them(machine: Machine, text: str, built: list[str], flag: str) -> None:
    machine.monkeypatch.setenv("OPT_DS_CUDA_ARCHITECTURES", text)
    assert machine.build()["architectures"] == built
    assert all(f"{flag} " in line for line in machine.commands("nvcc"))


@pytest.mark.parametrize("text", ["nonsense", "8", "8 0", "Ampere", "-80", "80+", "80+PTX+PTX", "none,80", "9.0b", "８0", "1e3"])
def test_an_architecture_that_is_none_is_named(machine: Machine, text: str) -> None:
    machine.monkeypatch.setenv("OPT_DS_CUDA_ARCHITECTURES", text)
    record = machine.build()
    assert record["cuda"].startswith("OPT_DS_CUDA_ARCHITECTURES: ") and "is no GPU architecture" in record["cuda"]
    assert (record["cpu"], record["emulator"]) == ("built", "built")


@pytest.mark.parametrize(("text", "reason"), [
    ("", "no GPU on this machine: to build for another, set OPT_DS_CUDA_ARCHITECTURES"),
    (" ;, ", "no GPU on this machine"),
    ("None", "OPT_DS_CUDA_ARCHITECTURES is none"),
    ("6.1", 'OPT_DS_CUDA_ARCHITECTURES: "6.1" is too old: the kernels need sm_70 (V100) or later'),
    ("70", "this nvcc does not compile for sm_70 (it knows 75, 80, 86, 90)"),
    ("12.0", "this nvcc does not compile for sm_120"),
])  # fmt: skip
def test_what_nothing_can_be_compiled_for_has_its_reason(machine: Machine, text: str, reason: str) -> None:
    machine.monkeypatch.setenv("OPT_DS_CUDA_ARCHITECTURES", text)
    record = machine.build()
    assert record["cuda"].startswith(reason) and record["cpu"] == "built"


def test_the_gpus_of_this_machine_are_the_default(machine: Machine) -> None:
    machine.monkeypatch.setattr(build_extension, "find_torch", lambda: build_torch.Torch(**vars(TORCH) | {"gpus": ("80", "90")}))
    machine.monkeypatch.setenv("OPT_DS_CUDA_ARCHITECTURES", "")
    assert machine.build()["architectures"] == ["80", "90"]


def test_a_toolkit_without_its_runtime_library(machine: Machine) -> None:
    (machine.toolkit / "lib64" / "libcudart_static.a").unlink()
    record = machine.build()
    assert "has no libcudart_static.a" in record["cuda"] and record["cpu"] == "built"


@pytest.mark.parametrize(("source", "parts"), [("simt.cpp", {"emulator"}), ("reference.cpp", {"cpu", "cuda"})])
def test_a_part_that_does_not_compile_leaves_the_other(machine: Machine, source: str, parts: set[str]) -> None:
    machine.build()
    machine.program("my-g++", f'[[ "$*" == *{source}* ]] && echo "{source}:1: error: broken" >&2 && exit 1\n{machine.compile}')
    record = machine.build()
    assert {part for part in ("cpu", "cuda", "emulator") if record[part] != "built"} == parts, record
    assert all(record[part] == f"my-g++ failed: {source}:1: error: broken" for part in parts)


@pytest.mark.parametrize(("cxx", "host"), [("ccache {gxx}", "{gxx}"), ("{gxx} -m64", "{gxx}"), ("my-g++", "{gxx}")])
def test_cxx_may_be_a_command(machine: Machine, cxx: str, host: str) -> None:
    machine.program("ccache", 'exec "$@"')
    gxx = machine.folder / "bin" / "my-g++"
    machine.monkeypatch.setenv("CXX", cxx.format(gxx=gxx))
    assert machine.build()["cuda"] == "built"
    assert all(f"-ccbin={host.format(gxx=gxx)} " in line for line in machine.commands("nvcc"))


@pytest.mark.parametrize("cxx", ["no-such-compiler", "'unbalanced", "/"])
def test_a_cxx_that_is_no_program_is_one_line(machine: Machine, cxx: str) -> None:
    machine.monkeypatch.setenv("CXX", cxx)
    assert machine.build()["cpu"].startswith("CXX is ")


@pytest.mark.parametrize("jobs", ["0", "many", "-1", "1"])
def test_a_number_of_jobs_that_is_none_is_reported(machine: Machine, capsys: pytest.CaptureFixture[str], jobs: str) -> None:
    machine.monkeypatch.setenv("MAX_JOBS", jobs)
    assert machine.build()["cpu"] == "built"
    assert ("which is no number of jobs" in capsys.readouterr().err) == (jobs != "1")


def test_without_kernels_on_request(machine: Machine) -> None:
    machine.build()
    machine.monkeypatch.setenv("OPT_DS_BUILD_KERNELS", "0")
    reason = "opt_ds was installed with OPT_DS_BUILD_KERNELS=0"
    assert machine.build() == {"cpu": reason, "cuda": reason, "architectures": [], "emulator": reason, "torch": None}
    machine.monkeypatch.setenv("OPT_DS_BUILD_KERNELS", "perhaps")
    with pytest.raises(SetupError, match=r'^OPT_DS_BUILD_KERNELS is "perhaps": use 0'):
        machine.build()


def test_without_torch_the_build_stops_with_the_right_command(machine: Machine) -> None:
    machine.monkeypatch.setattr(build_extension, "find_torch", lambda: None)
    with pytest.raises(SetupError, match=r"install it first .* pip install --no-build-isolation -e \. .*OPT_DS_BUILD_KERNELS=0"):
        machine.build()


def test_architectures_are_sorted_and_each_is_there_once() -> None:
    assert list(map(str, build_nvcc.parse_architectures("120;9.0,sm_100 90 9.0+PTX 100f"))) == ["90+PTX", "100", "100f", "120"]
