"""Checks of a checkpoint's files.

They cover recorded sizes and hashes, pointers, and whether the weights can fill the configured model.
"""

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
    """Size and hash of one file, as recorded in COMPLETE.json."""

    bytes: int
    sha256: str


def read_record(folder: Path) -> tuple[int, dict[str, RecordedFile]]:
    """Return the step and the files recorded in a checkpoint's COMPLETE.json.

    Raise UserError if it is missing or malformed.
    """
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
    """Return a description of what is wrong with a checkpoint, or None.

    The presence and size of all files are checked. The SHA-256 is checked for the files in `hashes`, which must include
    every file that will be read.
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
            return f"{name} is truncated ({path.stat().st_size} of {expected.bytes} bytes)"
        if name in hashes and sha256_once(path) != expected.sha256:
            return f"{name} is damaged (its SHA-256 differs)"
    return None


def check_file(folder: Path, name: str) -> Path:
    """Return the path of a checkpoint's file after checking its hash. Raise UserError if the hash differs."""
    problem = problem_with(folder, (name,))
    if problem:
        raise UserError(f"checkpoint {folder}: {problem}: {_REMEDY}")
    return folder / name


_FileFingerprint = tuple[str, int, int, int, int]  # path, size, mtime (ns), ctime (ns), inode
_hashes: dict[_FileFingerprint, str] = {}


def sha256_once(path: Path) -> str:
    """Return a file's SHA-256. This process reads the file only once, unless it changes."""
    stat = path.stat()
    key = (str(path.absolute()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
    if key not in _hashes:
        _hashes[key] = file_sha256(path)
    return _hashes[key]


def known_hashes() -> dict[_FileFingerprint, str]:
    """Return the hashes that this process has computed so far, for `take_hashes` on the other ranks."""
    return dict(_hashes)


def take_hashes(known: dict[_FileFingerprint, str]) -> None:
    """Accept another rank's hashes for the files that this process sees with the same size, times and inode."""
    _hashes.update(known)


def pointer_text(target: Path) -> str:
    """Return the content of a pointer to this checkpoint: its name and the SHA-256 of its COMPLETE.json."""
    record = target / COMPLETE
    return f"{target.name}\n" + (f"{file_sha256(record)}\n" if record.is_file() else "")


def pointed(output: Path, pointer: str) -> Path | None:
    """Return the checkpoint that `checkpoints/<pointer>` names, or None if there is no such pointer.

    Raise UserError if the pointer is damaged: it names no checkpoint of this run, or one whose COMPLETE.json has
    another hash.
    """
    file = output / FOLDER / pointer
    name, sha256 = pointer_fields(output, pointer)
    if name is None:
        return None
    folder = output / FOLDER / name
    if not folder.is_dir():
        raise UserError(f"{file}: names {name}, which does not exist: remove the pointer, or name a checkpoint itself")
    record = folder / COMPLETE
    if sha256 is not None and not (record.is_file() and file_sha256(record) == sha256):
        raise UserError(f"{file}: does not belong to {name}, one of them is damaged: name a checkpoint itself")
    return folder


def pointer_fields(output: Path, pointer: str) -> tuple[str | None, str | None]:
    """Return the name and the hash in a pointer; the hash is None in pointers of older versions.

    Raise UserError for any other content.
    """
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
    """Raise UserError if the configured model is larger than the file's tensors can fill, before it is allocated."""
    held = sum(math.prod(shape) for shape in shapes.values())
    width = model.hidden_size
    image_positions = 2 * model.image_grid_side if model.image_positions == "grid" else model.num_image_codes
    rows = (
        model.vocab_size + model.max_text_tokens + model.image_feature_dim + model.image_num_classes + model.max_frames
        + model.audio_stack * model.audio_feature_dim + model.image_codebook_size + image_positions
    )  # fmt: skip
    layers = model.num_layers + model.text_decoder_layers + model.image_decoder_layers
    least = width * rows + layers * (4 * width * width + 2 * width * model.ffn_size)
    if least > held:
        raise UserError(
            f"{where}: its sizes require more than {least:.3g} weights, the file has {held:.3g}: restore it, or use another model"
        )
