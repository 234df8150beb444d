"""Which files of a checkpoint may be believed: its record of sizes and hashes, the pointers to it, what its weights can fill."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from opt_ds.config import ModelConfig
from opt_ds.errors import UserError
from opt_ds.store.files import file_sha256
from opt_ds.store.foreign import is_inside, read_json_object

FOLDER = "checkpoints"
COMPLETE = "COMPLETE.json"
MODEL_FILE, MOMENTS_FILE, STATE_FILE = "model.safetensors", "moments.safetensors", "state.json"
ALL_FILES = (MODEL_FILE, MOMENTS_FILE, STATE_FILE)
_NAME = re.compile(r"step-[0-9]{8,}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_REMEDY = "use another checkpoint of the run"


class RecordedFile(NamedTuple):
    """Size and hash of one file, as COMPLETE.json has them."""

    bytes: int
    sha256: str


def read_record(folder: Path) -> tuple[int, dict[str, RecordedFile]]:
    """Return the step and the files of a checkpoint's COMPLETE.json. UserError if it is missing or not as it is written."""
    file = folder / COMPLETE
    found = read_json_object(file, _REMEDY)
    files, step = found.get("files"), found.get("step")
    if found.keys() != {"step", "files"} or type(step) is not int or not isinstance(files, dict):
        raise UserError(f"{file}: damaged: {_REMEDY}")
    if files.keys() != set(ALL_FILES):
        raise UserError(f"{file}: damaged, it does not record {', '.join(ALL_FILES)}: {_REMEDY}")
    for name, entry in files.items():
        if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"}:
            raise UserError(f"{file}: damaged, entry {name}: {_REMEDY}")
        if type(entry["bytes"]) is not int or not _SHA256.fullmatch(str(entry["sha256"])):
            raise UserError(f"{file}: damaged, entry {name}: {_REMEDY}")
    return step, {name: RecordedFile(entry["bytes"], entry["sha256"]) for name, entry in files.items()}


def problem_with(folder: Path, hashes: Sequence[str] = ALL_FILES) -> str | None:
    """Return what is wrong with a checkpoint, None if nothing.

    Presence and sizes of all files are checked, and the SHA-256 of those named in `hashes`: at least of all that will be read.
    """
    try:
        step, files = read_record(folder)
    except UserError as error:
        return f"no readable {COMPLETE} ({str(error).removeprefix(f'{folder / COMPLETE}: ').removesuffix(f': {_REMEDY}')})"
    if _NAME.fullmatch(folder.name) and int(folder.name.removeprefix("step-")) != step:
        return f"{COMPLETE} is of step {step}"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if not is_inside(folder, path):
            return f"{name} leads out of the folder"
        if path.stat().st_size != expected.bytes:
            return f"{name} is cut off ({path.stat().st_size} of {expected.bytes} bytes)"
        if name in hashes and sha256_once(path) != expected.sha256:
            return f"{name} is damaged (its SHA-256 differs)"
    return None


def check_file(folder: Path, name: str) -> Path:
    """Return a checkpoint's file whose hash is as recorded. UserError otherwise."""
    problem = problem_with(folder, (name,))
    if problem:
        raise UserError(f"checkpoint {folder}: {problem}: {_REMEDY}")
    return folder / name


_Identity = tuple[str, int, int, int, int]  # path, size, times of the last change of content and status (ns), inode
_hashes: dict[_Identity, str] = {}


def sha256_once(path: Path) -> str:
    """Return a file's SHA-256, read once by this process as long as the file does not change."""
    stat = path.stat()
    key = (str(path.absolute()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
    if key not in _hashes:
        _hashes[key] = file_sha256(path)
    return _hashes[key]


def known_hashes() -> dict[_Identity, str]:
    """Return what this process has hashed so far, for `take_hashes` of the other ranks."""
    return dict(_hashes)


def take_hashes(known: dict[_Identity, str]) -> None:
    """Trust another rank's hashes, for the files that this process sees with the same size, times and inode."""
    _hashes.update(known)


def pointer_text(target: Path) -> str:
    """Return the content of a pointer to this checkpoint: its name, and the SHA-256 of its COMPLETE.json."""
    record = target / COMPLETE
    return f"{target.name}\n" + (f"{file_sha256(record)}\n" if record.is_file() else "")


def pointed(output: Path, pointer: str) -> Path | None:
    """Return the checkpoint that `checkpoints/<pointer>` names; None where there is no pointer.

    Raises UserError for a damaged pointer: one that names no checkpoint of this run, or one with another COMPLETE.json.
    """
    file = output / FOLDER / pointer
    name, sha256 = pointer_fields(output, pointer)
    if name is None:
        return None
    folder = output / FOLDER / name
    if not folder.is_dir():
        raise UserError(f"{file}: names {name}, which is not there: remove the pointer, or name a checkpoint itself")
    record = folder / COMPLETE
    if sha256 is not None and not (record.is_file() and file_sha256(record) == sha256):
        raise UserError(f"{file}: does not belong to {name}, one of them is damaged: name a checkpoint itself")
    return folder


def pointer_fields(output: Path, pointer: str) -> tuple[str | None, str | None]:
    """Return the name and the hash in a pointer (versions before the hash: None). UserError if it holds anything else."""
    file = output / FOLDER / pointer
    try:
        text = file.read_bytes()[:1000].decode("ascii", "replace")
    except OSError:
        return None, None
    name, *rest = text.splitlines() or [""]
    if not _NAME.fullmatch(name) or len(rest) > 1 or any(not _SHA256.fullmatch(line) for line in rest):
        raise UserError(f"{file}: damaged, names no checkpoint of this run: remove the pointer, or name a checkpoint itself")
    return name, rest[0] if rest else None


def check_size(model: ModelConfig, shapes: dict[str, tuple[int, ...]], where: str) -> None:
    """Refuse a configuration of a larger model than a file's tensors could fill, before anything of that size is built."""
    held = sum(math.prod(shape) for shape in shapes.values())
    width = model.hidden_size
    rows = (
        model.vocab_size + model.max_text_tokens + model.image_feature_dim + model.image_num_classes + model.max_frames
        + model.audio_stack * model.audio_feature_dim + model.image_codebook_size + model.num_image_codes
    )  # fmt: skip
    layers = model.num_layers + model.text_decoder_layers + model.image_decoder_layers
    least = width * rows + layers * (4 * width * width + 2 * width * model.ffn_size)
    if least > held:
        raise UserError(
            f"{where}: its sizes ask for over {least:.3g} weights, the file has {held:.3g}: restore it, or use another model"
        )
