"""Output directory of a run (of the model or of the dVAE): its settings, its lock, a record of each launch.

run.json      kind (for a dVAE's run), fixed_settings (what may not change between launches), stores, the start set by
--init-from, and one entry per launch: versions, device, …

A run of the model also has:

config.yaml   the resolved configuration of the last launch
processor/    what the model needs to read raw files (see store/processor_files.py)
"""

import errno
import fcntl
import importlib.metadata
import json
import logging
import platform
import subprocess
import time
from pathlib import Path
from typing import IO, Any

from opt_ds.config import Config, InitConfig, Section, dump_config
from opt_ds.config.section import current_names, current_path
from opt_ds.errors import UserError
from opt_ds.former_names import RUN, current_fields
from opt_ds.store.files import atomic_file, remove_leftovers, write_json
from opt_ds.store.processor_files import PROCESSOR_FOLDER, copy_processor_files
from opt_ds.store.reader import FeatureStore
from opt_ds.training.metrics import VALIDATION_FILE
from opt_ds.version import PACKAGE_FOLDER, __version__

_LOG = logging.getLogger(__name__)
RUN_FILE, CONFIG_FILE, LOCK_FILE = "run.json", "config.yaml", ".lock"
#: The only checkpoint of a dVAE's run in the former format.
OLD_DVAE_CHECKPOINT = "checkpoint.pt"
#: Files that training replaces atomically, by folder.
_WRITTEN = {
    "": (RUN_FILE, CONFIG_FILE, VALIDATION_FILE, OLD_DVAE_CHECKPOINT),
    "checkpoints": ("latest", "best"),
    "guard": ("step-*",),
}
#: Kinds of runs. The key is absent from run.json for a run of the model.
MODEL, DVAE = "model", "dVAE"

#: Settings that identify a run. All other settings (batch.max_tokens, zero.*, train.*, precision, …) may change on
#: resume.
_FIXED = (
    "seed", "model", "tasks", "optimizer", "schedule", "batch.size", "batch.unit",
    "data.store_weights", "data.train_split", "data.valid_split", "data.frame_offset",
    "finetune.task", "finetune.untrained", "finetune.weights_sha256", "finetune.inputs", "finetune.negative_fraction",
    "finetune.negative_candidates", "finetune.same_group_negatives", "init.weights_sha256", "init.moments",
)  # fmt: skip
#: Identifying settings that older runs do not record, with the value that those runs had.
_ADDED: dict[str, Any] = {
    "tasks.plugins": [],
    "model.plugins": [],
    "finetune.untrained": False,
    "model.image_positions": "sequence",
    "tasks.modality.condition_dropout": 0.0,
    "model.normalize_embedding_summands": False,
    "tasks.matching.candidates": 1,
    "tasks.matching.candidate_fraction": 1.0,
    "tasks.matching.candidate_kinds": ["swap", "replace", "caption"],
    "tasks.reduction": "item",
}
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # Lustre mounted without flock, some NFS
_PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "h5py", "safetensors", "pydantic")


def fixed_settings(config: Config, stores: list[FeatureStore]) -> dict[str, Any]:
    """Return a flat dict of key -> value with everything that identifies a run."""
    flat = flatten(config.model_dump(mode="json"))
    own = {k: v for k, v in flat.items() if any(k == key or k.startswith(key + ".") for key in _FIXED)}
    return {**own, "data.stores": [store.fingerprint for store in stores]}


def check_same_run(output: Path, config: Config, stores: list[FeatureStore]) -> None:
    """Raise UserError if `output` holds another run, or checkpoints without a run.

    The message names the first key that differs.
    """
    record = read_record(output, MODEL)
    if record is not None:
        wanted = fixed_settings(config, stores)
        added = {key: value for key, value in _ADDED.items() if key in wanted}
        recorded = added | _with_current_keys(type(config), config.model_dump(mode="json"), record["fixed_settings"])
        compare_settings(output, {**record, "fixed_settings": recorded}, wanted)
    elif (output / "checkpoints").exists():
        raise UserError(f"{output} has checkpoints but no {RUN_FILE}: use another --output")


def _with_current_keys(kind: type[Section], tree: dict[str, Any], recorded: dict[str, Any]) -> dict[str, Any]:
    """Return recorded settings, by dotted key, with the current names of keys that an older version recorded."""
    current: dict[str, Any] = {}
    for key, value in recorded.items():
        path, section = current_path(kind, key.split("."), tree)
        if section is not None and isinstance(value, list):
            value = [current_names(section, item) for item in value]
        current[".".join(path)] = value
    return current


def read_record(output: Path, kind: str) -> dict[str, Any] | None:
    """Return the run.json of a run of this kind, or None if there is no run.

    Raise UserError if `output` cannot be read, is a file, or holds a run of another kind or a damaged run.json.
    """
    path = output / RUN_FILE
    try:
        is_file = output.exists() and not output.is_dir()
        has_run = path.is_file()
    except OSError as error:
        raise _unusable(output, error) from None
    if is_file:
        raise UserError(f"--output {output} is a file: name a directory")
    if not has_run:
        return None
    try:
        record = _upgraded(json.loads(path.read_text(encoding="utf-8")))
        saved, launches = record["fixed_settings"], record["launches"]
        is_damaged = not (isinstance(saved, dict) and isinstance(launches, list) and all(isinstance(x, dict) for x in launches))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        is_damaged = True
    if is_damaged:
        raise UserError(f"{path}: damaged, it does not hold a run's settings and launches: restore it, or use another --output")
    found = record.get("kind", MODEL)
    if found != kind:
        raise UserError(f"{output} holds a run of the {found}, not of the {kind}: use another --output")
    return record


def refuse_dvae(path: Path) -> None:
    """Raise UserError if `path`, where a run of the model is expected, holds a run of the dVAE."""
    try:
        record = _upgraded(json.loads((path / RUN_FILE).read_text(encoding="utf-8")))
        is_dvae = record.get("kind") == DVAE
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return  # no run, or a damaged file, which is reported by those who read it
    if is_dvae:
        raise UserError(
            f"{path}: a run of the dVAE, whose figures are in its result.json and metrics.jsonl: name a run of the model"
        )


def _upgraded(record: dict[str, Any]) -> dict[str, Any]:
    """Return run.json in its current format. Old runs of the dVAE recorded only these settings, as a tree."""
    record = current_fields(record, RUN)
    if "fixed_settings" not in record and "pictures_sha256" in record:
        return {"kind": DVAE, "fixed_settings": flatten(record), "launches": []}
    return record


def compare_settings(output: Path, record: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise UserError if a run.json is not that of the run with the fixed settings `wanted`.

    The message names the first key that differs.
    """
    saved, wanted = record["fixed_settings"], json.loads(json.dumps(wanted))
    for key in sorted({*saved, *wanted}):
        if key not in wanted or saved.get(key) != wanted[key]:
            was, now = _short(saved.get(key)), _short(wanted.get(key))
            text = "its stores' contents differ" if key == "data.stores" else f"{key} was {was} there and is {now} now"
            if any(name.startswith(f"{key}.") for name in wanted):
                text = f"{key} was {was} there and is a section now"
            elif was == now:  # a damaged key, whose value is None as that of a key that is absent
                text = f"{key} is none of this run's settings"
            raise UserError(
                f"{output} holds another run ({text}): use another --output, or the same settings to resume"
            )


def recorded_init(output: Path) -> InitConfig | None:
    """Return the start that --init-from gave the run in `output`.

    Return None if there is none or run.json is unreadable.
    """
    try:
        return InitConfig.model_validate(json.loads((output / RUN_FILE).read_text(encoding="utf-8"))["init_from"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # No run, a run without a start, or a damaged file, which check_same_run reports.


def lock(output: Path) -> IO[str]:
    """Create the output directory and lock it while the returned file is open. Remove partial files of a killed run.

    Raise UserError if the directory cannot be written or another process trains there. Log a warning if the file system
    has no locks.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        file = open(output / LOCK_FILE, "w")  # noqa: SIM115 - open for as long as the run lasts
    except OSError as error:
        raise _unusable(output, error) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{output}: another process is training there: wait for it, or use another --output") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _LOG.warning(f"{output}: no file locks there ({error.strerror}): make sure that only one run uses this directory")
        return file
    for folder, names in _WRITTEN.items():
        for name in names:
            remove_leftovers(output / folder, name)
    return file


def _unusable(output: Path, error: OSError) -> UserError:
    return UserError(f"--output {output}: cannot be used ({error.strerror}): name a directory that can be written to")


def record_launch(output: Path, config: Config, stores: list[FeatureStore], launch: dict[str, Any]) -> None:
    """Write config.yaml and processor/, and run.json with this launch appended.

    Args:
        output: The run's output directory.
        config: The resolved configuration.
        stores: The run's stores. The processor files come from the first one.
        launch: The entry of this launch.
    """
    copy_processor_files(stores[0], output / PROCESSOR_FOLDER)
    with atomic_file(output / CONFIG_FILE) as temporary:
        temporary.write_text(dump_config(config), encoding="utf-8")
    about = {
        "preset": config.preset,
        "fixed_settings": fixed_settings(config, stores),
        "stores": describe_stores(stores),
        **({"init_from": config.init.model_dump(mode="json")} if config.init else {}),
    }
    append_launch(output, about, launch)


def describe_stores(stores: list[FeatureStore]) -> list[dict[str, Any]]:
    """Return what run.json records about the stores."""
    return [{"path": str(s.path), "name": s.name, "fingerprint": s.fingerprint, "num_samples": s.num_samples} for s in stores]


def append_launch(output: Path, about: dict[str, Any], launch: dict[str, Any]) -> None:
    """Write run.json with the fields in `about` and the earlier launches, followed by this one."""
    path = output / RUN_FILE
    launches = _upgraded(json.loads(path.read_text(encoding="utf-8")))["launches"] if path.is_file() else []
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    write_json(path, {**about, "launches": [*launches, {"started": started, **launch}]})


def versions() -> dict[str, str]:
    """Return the versions of everything that affects numerical results.

    These are this package (with its git revision), Python and the packages of `_PACKAGES`.
    """
    found = {"opt_ds": __version__, "git": git_revision(), "python": platform.python_version()}
    return {**found, **{name: importlib.metadata.version(name) for name in _PACKAGES}}


def git_revision() -> str:
    """Return the commit of the checkout that contains this package, or "" outside of one.

    "-dirty" is appended if there are uncommitted changes.
    """
    folder = PACKAGE_FOLDER.parent
    if not (folder / ".git").exists():
        return ""
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a tree of sections as one dictionary of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
