"""Groups of options: a command takes one dataclass per group instead of one parameter per option.

    @dataclass(frozen=True, kw_only=True)
    class FrameOptions:
        pool_frames: Annotated[int, typer.Option(help="Average this many frames into one.", min=1)] = 1

    @with_option_groups
    def prepare(output: Annotated[Path, typer.Option(help="The new store.")], frames: FrameOptions) -> None: ...

The command line has `--output` and `--pool-frames`. Groups that several commands share are in `opt_ds.cli.options`.
"""

import dataclasses
import inspect
import typing
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")


def with_option_groups(function: Callable[..., Result]) -> Callable[..., Result]:
    """Return the command for typer: each dataclass parameter is replaced by its fields, in their order.

    The returned function takes keyword arguments only. It keeps the name and the docstring, which is the help text.

    Raises:
        TypeError: If two parameters or fields have the same name.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    returned = hints.pop("return", None)
    groups: dict[str, list[str]] = {}
    options: list[inspect.Parameter] = []
    for parameter in inspect.signature(function).parameters.values():
        kind = hints[parameter.name]
        if dataclasses.is_dataclass(kind):
            fields = _options_of(kind)
            groups[parameter.name] = [field.name for field in fields]
            options += fields
        else:
            options.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=kind))
    _check_unique(function, options)
    signature = inspect.Signature(options, return_annotation=returned)

    def command(**given: Any) -> Result:
        given = signature.bind(**given).arguments
        values = {
            name: hints[name](**{field: given.pop(field) for field in fields if field in given})
            for name, fields in groups.items()
        }
        return function(**values, **given)

    command.__name__, command.__qualname__, command.__module__ = function.__name__, function.__qualname__, function.__module__
    command.__doc__ = function.__doc__
    command.__annotations__ = {option.name: option.annotation for option in options} | {"return": returned}
    command.__signature__ = signature  # type: ignore[attr-defined]  # typer reads the options from this
    return command


def _options_of(group: Any) -> list[inspect.Parameter]:
    """Return the fields of a group as parameters of a command."""
    hints = typing.get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in dataclasses.fields(group)
    ]


def _check_unique(function: Callable[..., Any], options: list[inspect.Parameter]) -> None:
    names = [option.name for option in options]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise TypeError(f"{function.__qualname__}: two groups have the option {', '.join(sorted(repeated))}")
