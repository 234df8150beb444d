"""Reading of a configuration's plain tree: presets, YAML files and `key.path=value` settings.

`config.section` validates it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from opt_ds.errors import UserError, did_you_mean
from opt_ds.user_files import parse_yaml, read_yaml

PRESET_FOLDER = Path(__file__).parent.parent / "presets"


def preset_names(folder: Path | None = PRESET_FOLDER) -> list[str]:
    """Return the names of the presets in a folder, sorted. Without a folder there are none."""
    return sorted(path.stem for path in folder.glob("*.yaml")) if folder else []


def read_source(
    source: str, folder: Path | None = PRESET_FOLDER, current: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Return the tree of a preset in `folder`, or of a YAML file, which may name a `preset` to start from.

    The key `preset` of the tree is the name of that preset; without a folder it is an ordinary key.

    Args:
        source: Name of the preset, or path of the file.
        folder: Folder of the presets. None: the section has none.
        current: Replaces former keys of a file's own tree by their current names.

    Returns:
        The tree.

    Raises:
        UserError: If the source is neither a preset nor a readable file.
    """
    names = preset_names(folder)
    is_preset = source in names
    path = folder / f"{source}.yaml" if folder and is_preset else Path(source)
    if not path.is_file():
        if not names:
            raise UserError(f'--config "{source}" is not a file')
        raise UserError(f'--config "{source}" is neither a preset ({", ".join(names)}) nor a file{did_you_mean(source, names)}')
    tree = read_yaml(path)
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of config keys, found {_kind(tree)}")
    if current is not None and not is_preset:
        tree = current(tree)
    if is_preset:
        tree["preset"] = source
    elif folder and tree.get("preset") and str(tree["preset"]) in names:
        tree = merge(read_source(tree["preset"], folder), tree)
    elif folder and tree.get("preset"):
        raise UserError(
            f'{path}: unknown preset "{tree["preset"]}"{did_you_mean(str(tree["preset"]), names)}; known: {", ".join(names)}'
        )
    return tree


def given_keys(source: str) -> list[str]:
    """Return the keys, such as "model.vocab_size", that a configuration file itself sets. A preset's name has none."""
    if source in preset_names():
        return []
    tree = read_yaml(Path(source)) if Path(source).is_file() else None
    return _dotted(tree) if isinstance(tree, dict) else []


def _dotted(tree: dict[str, Any], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in tree.items():
        keys += _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
    return keys


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with the values of `over`, merged section by section."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def set_value(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    """Set the value at a path of keys, in place."""
    for depth, key in enumerate(keys[:-1]):
        child = tree.setdefault(key, {})
        if not isinstance(child, dict):
            raise UserError(f'--set {".".join(keys)}: "{".".join(keys[: depth + 1])}" is a value, not a section')
        tree = child
    tree[keys[-1]] = value


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else f'"{str(value)[:40]}"'


def parse_value(key: str, text: str, option: str = "--set") -> Any:
    """Return the value of a setting, given with this option, as read by YAML. 1e-4 is also a number."""
    value = parse_yaml(text, f"{option} {key}={text}")
    if isinstance(value, str):  # YAML 1.1 reads 1e-4 as a string
        try:
            return float(value)
        except ValueError:
            return value
    return value
