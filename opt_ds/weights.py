"""Files of weights that users bring: read without running code from them, and fitted to a network without a remainder.

A checkpoint that lacks a weight leaves it random, and one with more weights is of another model: both are refused.
"""

import json
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from opt_ds.errors import UserError

Tensors = dict[str, torch.Tensor]

_LONGEST_HEADER = 100_000_000  # bytes of JSON; safetensors allows no more
#: Counts of training batches, which no network reads once it is trained.
_OF_NO_USE = re.compile(r"(.*\.)?num_batches_tracked")
_NAMES = ("model.safetensors", "pytorch_model.bin")


def read_state_dict(file: Path, what: str) -> Tensors:
    """Return a file's tensors by name, on the CPU, whatever the file's ending.

    Raises UserError, in one line that states what the file is and how to fix it, unless it is safetensors or a state dict
    saved by torch; and for weights that are NaN or infinite. A dictionary under "model" or "state_dict" is unpacked.
    """
    if not file.exists():
        raise UserError(f"{file}: no such file ({what})")
    if file.is_dir():
        raise UserError(f"{file}: a folder, not a file ({what}): {_file_within(file)}")
    if (problem := _other_content(file)) is not None:
        raise UserError(f"{file}: not a checkpoint of plain tensors: {problem} ({what})")
    state: Any = _read_safetensors(file) if _is_safetensors(file) else _read_torch(file)
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{file}: not a state dict ({what}): save model.state_dict()")
    _refuse_not_finite(file, state)
    return state


def read_folder(folder: Path, what: str) -> Tensors:
    """Return the tensors of a Hugging Face folder: model.safetensors or pytorch_model.bin, whole or in several files."""
    for name in _NAMES:
        if (folder / name).is_file():
            return read_state_dict(folder / name, what)
        index = folder / f"{name}.index.json"
        if index.is_file():
            state: Tensors = {}
            for part in _parts(index):
                state |= read_state_dict(folder / part, what)
            return state
    raise UserError(f"{folder}: neither {' nor '.join(_NAMES)} is there ({what}): give a folder saved by save_pretrained")


def read_config_file(folder: Path, what: str) -> dict[str, Any]:
    """Return the fields of a model folder's config.json. UserError if it is missing or not readable."""
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder}: no config.json there, so it is not a {what} folder: give one saved by save_pretrained")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{file}: not readable as JSON: download it again")
    return config


def read_config(folder: Path, model_type: str, what: str) -> dict[str, Any]:
    """Return a Hugging Face folder's config.json. UserError for the folder of another kind of model, by its `model_type`."""
    config = read_config_file(folder, what)
    found = config.get("model_type")
    if found is not None and found != model_type:
        raise UserError(f"{folder}: not a {what} folder: model_type in its config.json is {found!r}, not {model_type!r}")
    return config


def fit(network: torch.nn.Module, state: Mapping[str, torch.Tensor], where: str, name: str, extras: str = "") -> None:
    """Load `state` into the network called `name`. UserError for missing, unexpected and differently sized weights.

    `where` names the file; `extras`: a regular expression of unexpected names that are left out on purpose.
    """
    try:
        missing, unexpected = network.load_state_dict(state, strict=False)
    except RuntimeError:
        own = network.state_dict()
        for key, value in state.items():
            if key in own and own[key].shape != value.shape:
                have, want = list(value.shape), list(own[key].shape)
                raise UserError(f"{where}: does not fit {name}: {key} is {have}, not {want}") from None
        raise UserError(f"{where}: does not fit {name}: its weights have other sizes") from None
    refuse_remainder(missing, unexpected, where, name, extras)


def without(state: Mapping[str, torch.Tensor], others: str) -> Tensors:
    """Return the weights whose whole name does not match the regular expression `others`."""
    return {key: value for key, value in state.items() if not re.fullmatch(others, key)}


def refuse_remainder(missing: Iterable[str], unexpected: Iterable[str], where: str, name: str, extras: str = "") -> None:
    """Raise UserError if weights are missing, or unexpected and not among `extras` (a regular expression of whole names)."""
    lacking = sorted(key for key in missing if not _OF_NO_USE.fullmatch(key))
    if lacking:
        raise UserError(f"{where}: does not fit {name}: its weights lack {_first(lacking)}")
    left = sorted(key for key in unexpected if not (_OF_NO_USE.fullmatch(key) or (extras and re.fullmatch(extras, key))))
    if left:
        raise UserError(f"{where}: does not fit {name}, which has no {_first(left)}: it is another model's")


def _first(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{keys[0]} (nor {len(keys) - 1} more)"


def _refuse_not_finite(file: Path, state: Tensors) -> None:
    for name, value in state.items():
        if value.is_floating_point() and not value.is_meta and not bool(torch.isfinite(value).all()):
            raise UserError(f"{file}: {name} is NaN or infinite: its training failed: use another checkpoint")


def _file_within(folder: Path) -> str:
    files = sorted(file.name for ending in ("*.safetensors", "*.pth", "*.pt", "*.bin") for file in folder.glob(ending))
    return f"name the file in it, such as {files[0]}" if files else "name the file itself"


def _other_content(file: Path) -> str | None:
    """Return what a file is instead of a checkpoint according to its first bytes, with the fix."""
    with open(file, "rb") as stream:
        start = stream.read(512)
    if not start:
        return "the file is empty: download it again"
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "it is a web page (HTML): download the file itself, not the page that shows it"
    if text.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer: fetch the file with `git lfs pull`"
    if start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"\x28\xb5\x2f\xfd")):
        return "it is compressed: unpack it first"
    if text.startswith((b"{", b"[")):
        return "it is JSON: name the file of weights"
    return None


def _is_safetensors(file: Path) -> bool:
    with open(file, "rb") as stream:
        start = stream.read(9)
    return file.suffix == ".safetensors" or (
        len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") <= _LONGEST_HEADER
    )


def _read_safetensors(file: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, ValueError, RuntimeError, KeyError):
        raise UserError(f"{file}: not a checkpoint of plain tensors: truncated or damaged: download it again") from None


def _read_torch(file: Path) -> Any:
    is_archive = zipfile.is_zipfile(file)
    with open(file, "rb") as stream:
        starts_as_archive = stream.read(2) == b"PK"
    if starts_as_archive and not is_archive:
        raise UserError(f"{file}: not a checkpoint of plain tensors: truncated or damaged: download it again")
    if is_archive:
        with zipfile.ZipFile(file) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()}
        if "constants.pkl" in names:
            raise UserError(
                f"{file}: not a checkpoint of plain tensors: a TorchScript archive: "
                "save the state_dict of the model that it was made from"
            )
        if "data.pkl" not in names:
            raise UserError(f"{file}: not a checkpoint of plain tensors: a ZIP archive of other files: unpack it first")
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle raise errors of any kind, with advice that is not ours
        pickled = "weights_only" in str(error) and (is_archive or _is_pickle(file))
        reason = (
            "it holds pickled Python objects, which could run code: save only its tensors, torch.save(model.state_dict(), …)"
            if pickled
            else "truncated, damaged or of another kind: download it again"
        )
        raise UserError(f"{file}: not a checkpoint of plain tensors: {reason}") from None


def _is_pickle(file: Path) -> bool:
    with open(file, "rb") as stream:
        start = stream.read(2)
    return len(start) == 2 and start[0] == 0x80 and start[1] <= 5


def _parts(index: Path) -> list[str]:
    """Return the names of the files that an index lists; none may lie outside its folder."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if name != Path(name).name]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise UserError(f"{index}: not readable as an index of weights: download it again") from None
    if outside:
        raise UserError(f"{index}: it names files outside its folder, such as {outside[0]}")
    return names
