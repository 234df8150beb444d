"""The base of every section of the configuration, and the one way to load, check and dump a section.

A section is a frozen pydantic model. A tree of sections (`opt_ds.config.Config`) is a section too. Values come from a
preset or a YAML file (`opt_ds.config.sources`), then from `--set key.path=value`. Each mistake is a `UserError` of one
line. `opt_ds.tools.config_reference` writes `docs/configuration.md` from the sections' fields.
"""

import copy
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from opt_ds.config.sources import parse_value, read_source, set_value
from opt_ds.errors import UserError, did_you_mean
from opt_ds.user_files import expected_kind

#: Our words for pydantic's types of mistakes that concern a limit.
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


class Section(BaseModel):
    """A frozen part of the configuration. Unknown keys, NaN and infinity are refused. Every field has a description."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    #: What messages call a section that is built directly; "": the name of its class.
    label: ClassVar[str] = ""

    def __init__(self, /, **values: Any) -> None:
        """Build the section from keyword arguments. Raises UserError for an unknown key or a bad value."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UserError(f"{self.label or type(self).__name__}: {explain(error, type(self), values)}") from None

    # As in pydantic's own RootModel: pydantic does not call this for a section inside another one, so that the error has
    # the whole key path.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def class_for(cls, values: Any) -> type["Section"]:
        """Return the class that `values` are validated with. A class whose keys depend on the values overrides this."""
        return cls

    @classmethod
    def trust(cls, values: Any) -> None:
        """Note that the user gave these values in this command, rather than a file that may be a stranger's."""


AnySection = TypeVar("AnySection", bound=Section)


def load_section(
    kind: type[AnySection], source: str | None, settings: Sequence[str] = (), presets: Path | None = None
) -> AnySection:
    """Load a section from a preset or a YAML file, then apply settings.

    Args:
        kind: the class of the section.
        source: name of a preset, or path of a YAML file, which may name a `preset` to start from; None: the defaults.
        settings: texts of the form `key.path=value`; values are YAML.
        presets: folder of the presets; None: the section has none.

    Raises:
        UserError: in one line, for an unknown preset or key, an unreadable file or a bad value.
    """
    if source is None:
        return section_from_dict(kind, {}, where="--set", settings=settings, trusted=True)
    tree = read_source(source, presets)
    if presets and "preset" not in kind.model_fields:
        tree.pop("preset", None)
    return section_from_dict(kind, tree, where=f"config {source}", settings=settings, trusted=True)


def section_from_dict(
    kind: type[AnySection], tree: dict[str, Any], where: str, settings: Sequence[str] = (), trusted: bool = False
) -> AnySection:
    """Validate a plain tree (as YAML holds it) with settings applied to it.

    Args:
        kind: the class of the section.
        tree: the tree.
        where: what messages call its source.
        settings: texts of the form `key.path=value`; values are YAML.
        trusted: the user gave the tree in this command (see `Section.trust`).

    Raises:
        UserError: in one line that begins with `where`.
    """
    tree = copy.deepcopy(tree)
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f'--set "{setting}": write it as key.path=value')
        set_value(tree, key.strip().split("."), parse_value(key, value))
    if trusted:
        kind.trust(tree)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error, kind, tree)}") from None


def dump_section(section: Section) -> str:
    """Return the whole section as YAML. `load_section` of it returns an equal section."""
    return yaml.safe_dump(section.model_dump(mode="json"), sort_keys=False)


def explain(error: ValidationError, kind: type[Section], values: Any) -> str:
    """Return one line for the first mistake in the values of a section of class `kind`, and the number of others."""
    mistakes = error.errors(include_url=False)
    # An unknown key comes first: it is often why another one is missing.
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
    """Return the section class in an annotation: itself, in `X | None`, or of a tuple's items. None if there is none."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, tuple, Annotated):
        return next((found for part in get_args(annotation) if (found := section_of(part))), None)
    return None


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
    """Return the keys of the section at `location` in a section of class `kind`; [] where no section is."""
    section: type[Section] | None = kind
    for part in location:
        try:
            values = values[part]
        except (LookupError, TypeError):  # values that are sections already, or no values at all
            values = {}
        if section is not None and isinstance(part, str):  # a number is a place in a list of sections
            field = section.model_fields.get(part)
            section = section_of(field.annotation) if field else None
            section = section.class_for(values) if section else None
    return list(section.model_fields) if section else []
