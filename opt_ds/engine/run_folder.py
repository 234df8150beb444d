"""A run's output directory: what makes it this run and no other, its lock, and the record of each launch.

config.yaml   the resolved configuration of the last launch
run.json      identity (what may not change between launches), stores, the start that --init-from gave, and one entry per launch:
              versions, device, …
processor/    what the model needs to read raw files (see store/processor_files.py)
"""

import errno
import fcntl
import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from opt_ds.config import Config, InitConfig, dump_config
from opt_ds.engine.metrics import VALIDATION_FILE
from opt_ds.errors import UserError
from opt_ds.store.files import atomic_file, remove_leftovers, write_json
from opt_ds.store.processor_files import PROCESSOR_FOLDER, copy_processor_files
from opt_ds.store.reader import FeatureStore
from opt_ds.version import PACKAGE_FOLDER, __version__

RUN_FILE, CONFIG_FILE = "run.json", "config.yaml"
#: What training replaces as a whole, by folder.
_WRITTEN = {"": (RUN_FILE, CONFIG_FILE, VALIDATION_FILE), "checkpoints": ("latest", "best"), "guard": ("step-*",)}

#: What makes the run. All else (batch.max_tokens, zero.*, train.*, precision …) may change on resume.
_IDENTITY = (
    "seed", "model", "tasks", "optimizer", "schedule", "batch.size", "batch.unit",
    "data.mix", "data.train_split", "data.valid_split", "data.frame_offset",
    "finetune.task", "finetune.weights_sha256", "finetune.inputs", "finetune.negative_share", "finetune.donor_candidates",
    "finetune.same_group_donors", "init.weights_sha256", "init.moments",
)  # fmt: skip
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # Lustre mounted without flock, some NFS
_PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "h5py", "safetensors", "pydantic")


def identity(config: Config, stores: list[FeatureStore]) -> dict[str, Any]:
    """Flat key -> value of all that makes a run this run."""
    flat = _flatten(config.model_dump(mode="json"))
    own = {k: v for k, v in flat.items() if any(k == key or k.startswith(key + ".") for key in _IDENTITY)}
    return {**own, "data.stores": [store.fingerprint for store in stores]}


def check_same_run(output: Path, config: Config, stores: list[FeatureStore]) -> None:
    """Raise UserError, naming the first key that differs, if `output` holds another run; or anything that is no run."""
    path = output / RUN_FILE
    try:
        is_file = output.exists() and not output.is_dir()
        has_run, has_checkpoints = path.is_file(), (output / "checkpoints").exists()
    except OSError as error:
        raise _unusable(output, error) from None
    if is_file:
        raise UserError(f"--output {output} is a file: name a directory")
    if not has_run:
        if has_checkpoints:
            raise UserError(f"{output} has checkpoints but no {RUN_FILE}: use another --output")
        return
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        saved, launches = record["identity"], record["launches"]
        is_damaged = not (isinstance(saved, dict) and isinstance(launches, list) and all(isinstance(x, dict) for x in launches))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        is_damaged = True
    if is_damaged:
        raise UserError(f"{path}: damaged, it does not hold a run's identity and launches: restore it, or use another --output")
    wanted = json.loads(json.dumps(identity(config, stores)))
    for key in sorted({*saved, *wanted}):
        if saved.get(key) != wanted.get(key):
            was, now = _short(saved.get(key)), _short(wanted.get(key))
            text = "its stores' contents differ" if key == "data.stores" else f"{key} was {was} there and is {now} now"
            raise UserError(
                f"{output} holds another run ({text}): use another --output, or the same settings to resume"
            )


def recorded_init(output: Path) -> InitConfig | None:
    """Return the start that --init-from gave the run in `output`; None without one, or where run.json cannot tell."""
    try:
        return InitConfig.model_validate(json.loads((output / RUN_FILE).read_text(encoding="utf-8"))["init_from"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # no run, a run without it, or a damaged file, which check_same_run names


def lock(output: Path, say: Callable[[str], None]) -> IO[str]:
    """Make the output directory and hold it while the file returned is open. What a killed run left half-written is removed.

    Raises UserError if it cannot be written to or another process trains there. Says so where the file system has no locks.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        file = open(output / ".lock", "w")  # noqa: SIM115 - open for as long as the run lasts
    except OSError as error:
        raise _unusable(output, error) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{output}: another process is training there: wait for it, or use another --output") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        say(f"{output}: no file locks there ({error.strerror}): see to it that only one run trains in it")
        return file
    for folder, names in _WRITTEN.items():
        for name in names:
            remove_leftovers(output / folder, name)
    return file


def _unusable(output: Path, error: OSError) -> UserError:
    return UserError(f"--output {output}: cannot be used ({error.strerror}): name a directory that can be written to")


def record_launch(output: Path, config: Config, stores: list[FeatureStore], launch: dict[str, Any]) -> None:
    """Write config.yaml and processor/, and run.json with this launch appended."""
    copy_processor_files(stores[0], output / PROCESSOR_FOLDER)
    with atomic_file(output / CONFIG_FILE) as temporary:
        temporary.write_text(dump_config(config), encoding="utf-8")
    path = output / RUN_FILE
    launches = json.loads(path.read_text(encoding="utf-8"))["launches"] if path.is_file() else []
    described = [
        {"path": str(s.path), "name": s.name, "fingerprint": s.fingerprint, "num_samples": s.num_samples}
        for s in stores
    ]
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    write_json(
        path,
        {
            "preset": config.preset,
            "identity": identity(config, stores),
            "stores": described,
            **({"init_from": config.init.model_dump(mode="json")} if config.init else {}),
            "launches": [*launches, {"started": started, **launch}],
        },
    )


def versions() -> dict[str, str]:
    """Versions of this package (and its git revision), of Python and of the packages that decide the numbers."""
    found = {"opt_ds": __version__, "git": git_revision(), "python": platform.python_version()}
    return {**found, **{name: importlib.metadata.version(name) for name in _PACKAGES}}


def git_revision() -> str:
    """Commit of the checkout that this package runs from, with "-dirty" for uncommitted changes; "" outside of one."""
    folder = PACKAGE_FOLDER.parent
    if not (folder / ".git").exists():
        return ""
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
