"""Where a configuration's plain tree comes from: presets, YAML files, and `key.path=value` settings. `config` validates it."""

from pathlib import Path
from typing import Any

from opt_ds.errors import UserError, did_you_mean
from opt_ds.user_files import parse_yaml, read_yaml

PRESET_FOLDER = Path(__file__).parent / "presets"


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESET_FOLDER.glob("*.yaml"))


def read_source(source: str) -> dict[str, Any]:
    """The tree of a preset's name or a YAML file, which may name a `preset` to start from. UserError for what is neither."""
    preset = PRESET_FOLDER / f"{source}.yaml"
    path = preset if preset.is_file() else Path(source)
    if not path.is_file():
        raise UserError(
            f'--config "{source}" is neither a preset ({", ".join(preset_names())}) nor a file'
            f"{did_you_mean(source, preset_names())}"
        )
    tree = read_yaml(path)
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of config keys, found {_kind(tree)}")
    if path == preset:
        tree["preset"] = source
    elif tree.get("preset") and (PRESET_FOLDER / f"{tree['preset']}.yaml").is_file():
        tree = _merge(read_source(tree["preset"]), tree)
    elif tree.get("preset"):
        raise UserError(
            f'{path}: unknown preset "{tree["preset"]}"{did_you_mean(str(tree["preset"]), preset_names())}; '
            f"known: {', '.join(preset_names())}"
        )
    return tree


def given_keys(source: str) -> list[str]:
    """The keys, such as "model.vocab_size", that a configuration file itself gives; none for a preset's name."""
    if (PRESET_FOLDER / f"{source}.yaml").is_file():
        return []
    tree = read_yaml(Path(source)) if Path(source).is_file() else None
    return _dotted(tree) if isinstance(tree, dict) else []


def _dotted(tree: dict[str, Any], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in tree.items():
        keys += _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
    return keys


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
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


def parse_value(key: str, text: str) -> Any:
    """A setting's value as YAML reads it; also 1e-4 is a number."""
    value = parse_yaml(text, f"--set {key}={text}")
    if isinstance(value, str):  # YAML 1.1 takes 1e-4 for a word
        try:
            return float(value)
        except ValueError:
            return value
    return value
