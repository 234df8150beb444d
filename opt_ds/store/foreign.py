"""Checks for folders of unknown origin.

Nothing in them may refer to a file outside the folder, to code, or to a network. They are used for stores, exported
models, tokenizers and Hugging Face folders. Each check raises a one-line UserError.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opt_ds.errors import UserError

if TYPE_CHECKING:
    from pydantic import ValidationError

MAX_JSON_BYTES = 64 << 20
_MAX_NAME = 255
_SHOWN_NAME = 80
_MAX_DEPTH = 50
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# In a config.json, these keys make transformers import code or contact a hub.
_CODE_KEYS = ("auto_map", "trust_remote_code", "custom_pipelines")
_IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "_experts_implementation")
_PLAIN_WORD = re.compile(r"[A-Za-z0-9_]*")


def is_plain_name(name: object) -> bool:
    """Return whether `name` is a plain file or folder name: no path, no "..", no control characters."""
    return (
        isinstance(name, str)
        and 0 < len(name.encode("utf-8", "surrogatepass")) <= _MAX_NAME
        and name not in (".", "..")
        and not any(letter in "/\\" or ord(letter) < 32 for letter in name)
    )


def is_inside(folder: Path, file: Path) -> bool:
    """Return whether `file`, with symbolic links resolved, is in `folder`."""
    try:
        return file.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # a loop of links, or an invalid file name
        return False


def check_inside(folder: Path, file: Path) -> None:
    """Raise UserError if a symbolic link leads from `file` out of `folder`."""
    if not is_inside(folder, file):
        raise UserError(f"{file}: leads out of {folder}: put the file itself there")


def invalid_field(error: "ValidationError") -> str:
    """Return the place of a validation's first error, such as "dims.vocab_size"; "" if it is the object itself.

    Names in it may come from the file. They are cut short, and control characters are escaped.
    """
    parts = (str(part)[:_SHOWN_NAME] for part in error.errors()[0]["loc"])
    return "".join(letter if letter.isprintable() else f"\\u{ord(letter):04x}" for letter in ".".join(parts))


def read_json_object(file: Path, remedy: str, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON file that contains an object.

    Raise UserError, ending in `remedy`, if the file is missing, too large, invalid or contains no object.
    """
    try:
        with open(file, "rb") as opened:
            text = opened.read(max_bytes + 1)
    except OSError as error:
        raise UserError(f"{file}: not readable ({error.strerror}): {remedy}") from None
    if len(text) > max_bytes:
        raise UserError(f"{file}: more than the {max_bytes >> 20} MiB allowed: {remedy}")
    try:
        found = json.loads(text)
    except RecursionError:
        raise UserError(f"{file}: nested too deeply: {remedy}") from None
    except ValueError:
        raise UserError(f"{file}: damaged, no valid JSON: {remedy}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: damaged, no JSON object: {remedy}")
    if _is_deeper(found, _MAX_DEPTH):
        raise UserError(f"{file}: nested too deeply: {remedy}")
    return found


def _is_deeper(tree: Any, depth: int) -> bool:
    level = [tree]
    for _ in range(depth):
        level = [child for node in level for child in _children(node) if isinstance(child, (dict, list))]
    return bool(level)


def _children(node: Any) -> Iterable[Any]:
    return node.values() if isinstance(node, dict) else node


def tensor_shapes(file: Path, remedy: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes in the header of a safetensors file, by name.

    No tensor is read. Raise UserError if it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118 - no mapping
    except OSError as error:
        raise UserError(f"{file}: not readable ({error.strerror or 'no such file'}): {remedy}") from None
    except (SafetensorError, ValueError, RuntimeError):
        raise UserError(f"{file}: damaged, no valid safetensors file: {remedy}") from None


def weight_files(folder: Path, remedy: str) -> list[Path]:
    """Return the safetensors files of a folder: model.safetensors, or the files named by the index.

    They must be in the folder.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return [single]
    places = read_json_object(index, remedy).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{index}: damaged, no weight_map: {remedy}")
    names = set(map(str, places.values()))
    for name in sorted(names):
        if not is_plain_name(name) or not name.endswith(".safetensors"):
            raise UserError(f'{index}: names "{name}", which is not a safetensors file in the folder: {remedy}')
    return [folder / name for name in sorted(names)]


def check_model_folder(folder: Path, remedy: str = "use another folder", *, allow_pickled: bool = False) -> None:
    """Refuse a Hugging Face folder that would read files outside it, import code, contact a hub or unpickle.

    Args:
        folder: The folder to be passed to `from_pretrained(folder, local_files_only=True)`.
        remedy: The end of the error message.
        allow_pickled: Accept pytorch_model.bin if there are no safetensors; the caller loads it with
            `weights_only=True`.

    Raises:
        UserError: The message names the file and the entry.
        UserError: Naming the file and the entry.
    """
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    for file in files:
        if not (is_inside(folder, file) or _in_hub_cache(folder, file)):
            raise UserError(f"{file}: leads out of {folder}: put the file itself there, or {remedy}")
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            _check_config(folder / name, remedy)
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder / 'adapter_config.json'}: adapters name another model: merge it into the model, or {remedy}")
    for file in weight_files(folder, remedy):
        if file.exists() and not (is_inside(folder, file) or _in_hub_cache(folder, file)):
            raise UserError(f"{file}: leads out of {folder}: put the file itself there, or {remedy}")
    pickled = next((folder / name for name in _PICKLED if (folder / name).exists()), None)
    has_safetensors = any(file.name.endswith((".safetensors", ".safetensors.index.json")) for file in files)
    if pickled and not has_safetensors and not (allow_pickled and pickled.name == _PICKLED[0]):
        raise UserError(f"{pickled}: pickled weights are not loaded: save the model as model.safetensors, or {remedy}")


def _check_config(file: Path, remedy: str) -> None:
    stack: list[Any] = [read_json_object(file, remedy)]
    while stack:
        found = stack.pop()
        stack += found.values() if isinstance(found, dict) else found if isinstance(found, list) else []
        for key in found if isinstance(found, dict) else ():
            if key in _CODE_KEYS and found[key]:
                raise UserError(f"{file}: {key} asks to run code from the folder or a hub: {remedy}")
            if key in _IMPLEMENTATIONS and not _is_plain_word(found[key]):
                raise UserError(f"{file}: {key} names code on a hub: remove the entry, or {remedy}")


def _is_plain_word(value: object) -> bool:
    values = value.values() if isinstance(value, dict) else [value]
    return all(each is None or (isinstance(each, str) and _PLAIN_WORD.fullmatch(each)) for each in values)


def _in_hub_cache(folder: Path, file: Path) -> bool:
    """Return whether `file` is in Hugging Face's cache.

    It stores the files of a snapshot as links to models--…/blobs/.
    """
    real = folder.resolve()
    return real.parent.name == "snapshots" and is_inside(real.parent.parent / "blobs", file)
