"""Base class of all configuration sections, and the functions that load, check and dump a section.

A section is a frozen pydantic model. A tree of sections (`opt_ds.config.Config`) is a section too. Values come from a
preset or a YAML file (`opt_ds.config.sources`), then from `--set key.path=value`. Each mistake is a `UserError` in one
line. `opt_ds.tools.config_reference` generates `docs/configuration.md` from the sections' fields.
"""

import copy
import logging
import re
import sys
import types
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, model_validator

from opt_ds.config.sources import parse_value, read_source, set_value
from opt_ds.errors import UserError, did_you_mean
from opt_ds.user_files import expected_kind

_LOG = logging.getLogger(__name__)
#: Context of a validation of values that the user gave in this command.
USER = "user"
#: Messages for pydantic's error types that concern a limit.
_LIMITS = {
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be more than {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be less than {lt}",
    "finite_number": "must be a finite number",
    "too_short": "must hold at least {min_length} items",
    "too_long": "must hold at most {max_length} items",
    "missing": "is missing",
}
#: Former keys that were already reported in this process.
_reported: set[str] = set()


class Section(BaseModel):
    """A frozen part of the configuration. Unknown keys, NaN and infinity are refused. Every field has a description."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    #: Name in messages of a section that is constructed directly. "": the name of its class.
    label: ClassVar[str] = ""
    #: Former name of a key -> its name. The former name still works; if the user gave it, a warning names the new one.
    renamed: ClassVar[dict[str, str]] = {}

    def __init__(self, /, **values: Any) -> None:
        """Construct the section from keyword arguments. Raise UserError for an unknown key or a bad value."""
        for name in self.renamed.keys() & values.keys():
            _report_former_key(name, self.renamed[name])
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UserError(f"{self.label or type(self).__name__}: {explain(error, type(self), values)}") from None

    # As in pydantic's own RootModel: with this marker pydantic does not call __init__ for a section inside another one,
    # so that the error has the complete key path.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @model_validator(mode="before")
    @classmethod
    def _accept_former_names(cls, values: Any, info: ValidationInfo) -> Any:
        former = [name for name in cls.renamed if isinstance(values, dict) and name in values]
        for name in former:
            key = cls.renamed[name]
            if key in values:
                raise ValueError(_both_names(name, key))
            if info.context == USER:
                _report_former_key(name, key)
            values = {key if other == name else other: value for other, value in values.items()}
        return values

    @classmethod
    def class_for(cls, values: Any) -> type["Section"]:
        """Return the class that validates `values`. Classes whose keys depend on the values override this."""
        return cls

    @classmethod
    def trust(cls, values: Any) -> None:
        """Record that the user gave these values in this command. Other values may come from an untrusted file."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the section by its importable class. Each process makes the class that `class_for` returns for itself."""
        kind = next(each for each in type(self).__mro__ if _is_importable(each))
        named = {"plugins": list(getattr(self, "plugins", ()))}
        return _unpickled, (kind, named, self.__getstate__())


def _is_importable(kind: type) -> bool:
    return getattr(sys.modules.get(kind.__module__), kind.__qualname__, None) is kind


def _unpickled(kind: type[Section], named: dict[str, Any], state: dict[str, Any]) -> Section:
    """Return a section as another process of this command had it. What that process trusted is trusted here."""
    kind.trust(named)
    made = kind.class_for(named)
    section = made.__new__(made)
    section.__setstate__(state)
    return section


AnySection = TypeVar("AnySection", bound=Section)


def load_section(
    kind: type[AnySection], source: str | None, settings: Sequence[str] = (), presets: Path | None = None
) -> AnySection:
    """Load a section from a preset or a YAML file, then apply settings.

    Args:
        kind: The class of the section.
        source: Name of a preset, or path of a YAML file, which may name a `preset` to start from. None: the defaults.
        settings: Overrides of the form "key.path=value"; values are YAML.
        presets: Folder of the presets. None: the section has none.

    Returns:
        The section.

    Raises:
        UserError: In one line, for an unknown preset or key, an unreadable file or a bad value.
    """
    if source is None:
        return section_from_dict(kind, {}, where="--set", settings=settings, trusted=True)
    tree = read_source(source, presets, partial(current_names, kind, where=f"config {source}"))
    if presets and "preset" not in kind.model_fields:
        tree.pop("preset", None)
    return section_from_dict(kind, tree, where=f"config {source}", settings=settings, trusted=True)


def section_from_dict(
    kind: type[AnySection], tree: dict[str, Any], where: str, settings: Sequence[str] = (), trusted: bool = False
) -> AnySection:
    """Validate a plain tree (as in YAML) with settings applied.

    Args:
        kind: The class of the section.
        tree: The tree.
        where: Name of its source in messages.
        settings: Overrides of the form "key.path=value"; values are YAML.
        trusted: Whether the user gave the tree in this command (see `Section.trust`).

    Returns:
        The section.

    Raises:
        UserError: In one line that begins with `where`.
    """
    tree = copy.deepcopy(tree)
    _apply_settings(kind, tree, settings)
    if trusted:
        kind.trust(tree)
    try:
        return kind.model_validate(tree, context=USER if trusted else None)
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error, kind, tree)}") from None


def current_names(kind: type[Section], tree: Any, where: str = "", prefix: str = "") -> Any:
    """Return a plain tree (as in YAML) of a section, in which former keys have their current names.

    The user's trees are converted before they are merged with others, so that a former key overrides a preset's value.

    Args:
        kind: The class of the section.
        tree: The tree. Whatever is no mapping, or no section, is returned as it is.
        where: Name of a source that the user gave. Its former keys are reported. "": report nothing.
        prefix: Path of the section, with a dot at its end.

    Returns:
        The tree.

    Raises:
        UserError: If `where` is given and the tree has a key by both names.
    """
    if not isinstance(tree, dict):
        return tree
    kind, found = _class_for(kind, tree), {}
    for name, value in tree.items():
        key = kind.renamed.get(name, name) if isinstance(name, str) else name
        if key != name and (key in tree or key in found):
            if where:
                raise UserError(f"{where}: {_both_names(prefix + name, prefix + key)}")
            key = name  # validation reports it
        elif key != name and where:
            _report_former_key(prefix + name, prefix + key)
        field = kind.model_fields.get(key)
        child = section_of(field.annotation) if field else None
        if child is not None and isinstance(value, (list, tuple)):
            value = [current_names(child, item, where, f"{prefix}{key}.") for item in value]
        elif child is not None:
            value = current_names(child, value, where, f"{prefix}{key}.")
        found[key] = value
    return found


def current_path(kind: type[Section], path: Sequence[str], values: Any) -> tuple[list[str], type[Section] | None]:
    """Return the path of a key with current names, and the class of the section that it names (None: a value).

    Args:
        kind: The class of the outermost section.
        path: The keys from there on, such as ("train", "log_every"). Unknown ones are returned as they are.
        values: Plain tree of the section. It determines the classes of sections whose keys depend on their values.
    """
    section: type[Section] | None = kind
    current: list[str] = []
    for part in path:
        if section is None:
            current.append(part)
            continue
        section = _class_for(section, values)
        current.append(section.renamed.get(part, part))
        field = section.model_fields.get(current[-1])
        section = section_of(field.annotation) if field else None
        values = values.get(current[-1]) if isinstance(values, Mapping) else None
    return current, section


def dump_section(section: Section) -> str:
    """Return the complete section as YAML. `load_section` of it returns an equal section."""
    return yaml.safe_dump(section.model_dump(mode="json"), sort_keys=False)


def explain(error: ValidationError, kind: type[Section], values: Any) -> str:
    """Return one line about the first mistake in the values of a section of class `kind`.

    It includes the number of further mistakes.
    """
    mistakes = error.errors(include_url=False)
    # An unknown key comes first, because it is often the reason why another one is missing.
    first = next((mistake for mistake in mistakes if mistake["type"] == "extra_forbidden"), mistakes[0])
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        text = f'unknown key "{key}"{did_you_mean(str(first["loc"][-1]), _known_keys(kind, values, first["loc"][:-1]))}'
    else:
        message = _reason(first)
        text = f"{key}: {message}" if key else message
        if key and first["type"] != "missing" and not isinstance(first["input"], (dict, BaseModel)):
            text += f" (found {first['input']!r})"
    return text + (f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else "")


def section_of(annotation: Any) -> type[Section] | None:
    """Return the section class in an annotation: the annotation itself, in `X | None`, or of a tuple's items.

    Otherwise return None.
    """
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, tuple, Annotated):
        return next((found for part in get_args(annotation) if (found := section_of(part))), None)
    return None


def _apply_settings(kind: type[Section], tree: dict[str, Any], settings: Sequence[str]) -> None:
    """Apply the user's settings to the tree of a section, in place. Former keys are reported."""
    by_name: dict[str, str] = {}
    for setting in settings:
        given, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f'--set "{setting}": write it as key.path=value')
        given = given.strip()
        path, section = current_path(kind, given.split("."), tree)
        key, value = ".".join(path), parse_value(given, text)
        if by_name.setdefault(key, given) != given:
            former = given if given != key else by_name[key]
            raise UserError(f"--set {_both_names(former, key)}")
        if key != given:
            _report_former_key(given, key)
        if section is not None and isinstance(value, list):
            value = [current_names(section, item, "--set", f"{key}.") for item in value]
        elif section is not None:
            value = current_names(section, value, "--set", f"{key}.")
        set_value(tree, path, value)


def _class_for(kind: type[Section], values: Any) -> type[Section]:
    try:
        return kind.class_for(values)
    except UserError:  # an unknown plugin, which validation reports
        return kind


def _both_names(former: str, key: str) -> str:
    return f"{former} is the former name of {key}: give one of them"


def _report_former_key(former: str, key: str) -> None:
    """Log once per process that a key has another name now."""
    if former not in _reported:
        _reported.add(former)
        _LOG.warning(f"the key {former} is now called {key}; the former name works until the next release")


def _reason(mistake: Mapping[str, Any]) -> str:
    """Return what is wrong with a value, without its key."""
    context = mistake.get("ctx", {})
    if mistake["type"] in _LIMITS:
        shown = {name: f"{value:g}" if isinstance(value, float) else value for name, value in context.items()}
        return _LIMITS[mistake["type"]].format(**shown)
    if mistake["type"] == "literal_error":
        known = re.findall(r"'([^']*)'", context["expected"])
        near = did_you_mean(mistake["input"], known) if isinstance(mistake["input"], str) else ""
        return f"choose {context['expected']}{near}"
    return expected_kind(mistake["type"]) or mistake["msg"].removeprefix("Value error, ")


def _known_keys(kind: type[Section], values: Any, location: tuple[int | str, ...]) -> list[str]:
    """Return the keys of the section at `location` in a section of class `kind`, or [] if there is no section."""
    section: type[Section] | None = kind
    for part in location:
        try:
            values = values[part]
        except (LookupError, TypeError):  # values that are already sections, or missing values
            values = {}
        if section is not None and isinstance(part, str):  # a number is an index into a list of sections
            field = section.model_fields.get(part)
            section = section_of(field.annotation) if field else None
            section = section.class_for(values) if section else None
    return list(section.model_fields) if section else []
