"""Installing for real: archive and wheel into an environment with the base requirements alone, and into an empty one. Each takes
minutes, since the operators are compiled."""

import json
import re
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.packaging.declared import ROOT
from tests.packaging.environments import Environment, base_packages
from tests.serving.conftest import raw, raw_store, run  # noqa: F401 - a tiny trained run

_PROBE = """
import json, torch, opt_ds
from opt_ds.ops import compiled
x, w = torch.randn(3, 64), torch.ones(64)
reason = compiled.load() or compiled.load("opt_ds_emulator")
assert reason == "", reason
for library in (torch.ops.opt_ds, torch.ops.opt_ds_emulator):
    y = library.layer_norm(x, None, None, w, w, 1e-5, None, 0.0, 0, 0)[0]
    assert torch.allclose(y, torch.nn.functional.layer_norm(x, (64,), w, w), atol=1e-4)
print(json.dumps([opt_ds.__file__, compiled.build_record(), torch.__version__]))
"""
pytestmark = pytest.mark.timeout(3000)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_packages(tmp_path_factory.mktemp("packages") / "base")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive of the checkout's tracked files."""
    folder = tmp_path_factory.mktemp("archive")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for file in filter(None, files):
        (folder / "checkout" / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / "checkout" / file).write_bytes((ROOT / file).read_bytes())
    code = f"import build_backend; build_backend.build_sdist({str(folder)!r})"
    environment = Environment(folder / "venv")
    done = environment.run("python", "-c", code, cwd=folder / "checkout", PYTHONPATH=str(ROOT / "csrc"))
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.tar.gz"))


def test_the_archive_is_complete(archive: Path) -> None:
    with tarfile.open(archive) as opened:
        inside = {name.partition("/")[2] for name in opened.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [name for name in tracked if name not in inside and not name.startswith(".")] == []
    assert "opt_ds/py.typed" in inside
    assert [name for name in inside if name.endswith((".so", "_build.json", ".pyc"))] == []


def _works(environment: Environment, run: Path, raw: Path, tmp_path: Path) -> dict:  # noqa: F811
    """Import, operators, help, the environment report and `generate`, as installed, and return the build's record."""
    probe = environment.run("python", "-c", _PROBE)
    assert probe.returncode == 0, probe.stderr
    where, record, version = json.loads(probe.stdout.splitlines()[-1])
    assert Path(where).is_relative_to(environment.folder) and record["torch"] == version
    assert environment.run("opt-ds", "--help").returncode == 0
    doctor = environment.run("opt-ds", "doctor")
    assert re.search(r"ok +kernels +.*compiled: cpu, emulator", doctor.stdout), doctor.stdout + doctor.stderr
    assert doctor.returncode == 0, doctor.stdout
    output, given = tmp_path / "text.txt", ("--audio", raw / "0.wav", "--to", "text")
    done = environment.run("opt-ds", "generate", "--checkpoint", run, *given, "--output", output)
    assert done.returncode == 0 and output.is_file(), done.stderr
    return record


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["archive", "wheel"])
def test_archive_and_wheel_install_beside_the_torch_that_is_there(
    archive: Path, packages: Path, run: Path, raw: Path, tmp_path: Path, kind: str  # noqa: F811
) -> None:
    environment = Environment(tmp_path / "venv", packages)
    wanted = archive
    if kind == "wheel":
        built = environment.run("python", "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, archive, seconds=3000)
        assert built.returncode == 0, built.stderr
        wanted = next(tmp_path.glob("*.whl"))
        names = zipfile.ZipFile(wanted).namelist()
        assert {"opt_ds/_build.json", "opt_ds/py.typed", "opt_ds/serving/page.html", "opt_ds/presets/opt-base.yaml"} <= set(names)
    done = environment.pip_install(wanted)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Downloading torch" not in done.stdout
    assert _works(environment, run, raw, tmp_path)["cpu"] == "built"


@pytest.mark.faults
def test_without_torch_and_isolation_the_installation_stops_in_one_line(archive: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv")
    done = environment.pip_install("--no-deps", "--no-build-isolation", archive)
    if "cannot make wheels" in done.stderr:  # Python 3.11's own setuptools; 3.12's environments have none
        assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
        assert "python -m pip install --upgrade setuptools, then install opt_ds again" in done.stderr
        assert environment.pip_install("--upgrade", "setuptools").returncode == 0
        done = environment.pip_install("--no-deps", "--no-build-isolation", archive)
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    assert "error: opt_ds compiles its kernels against your torch, and this environment has none" in done.stdout + done.stderr
    without = environment.pip_install("--no-deps", "--no-build-isolation", archive, OPT_DS_BUILD_KERNELS="0")
    assert without.returncode == 0, without.stderr


@pytest.mark.faults
def test_the_archive_installs_into_an_empty_environment(
    archive: Path, run: Path, raw: Path, tmp_path: Path  # noqa: F811
) -> None:
    """Everything from the package registry: some 3 GB to download, and twice 6 GB of disk while it is built."""
    environment = Environment(tmp_path / "venv")
    done = environment.pip_install(archive, "-c", ROOT / "requirements.txt", PIP_CONSTRAINT=str(ROOT / "requirements.txt"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert _works(environment, run, raw, tmp_path)["cpu"] == "built"
