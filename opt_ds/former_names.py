"""Names of earlier versions that work until the next release: keys in files, and arguments of functions.

Readers of files accept both names of a key; writers use the new one. Former keys of configurations are in the sections
(`Section.renamed`), former options in `opt_ds.cli.former_options`.
"""

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from opt_ds.errors import UserError

Function = TypeVar("Function", bound=Callable[..., Any])

#: Keys in metrics.jsonl.
METRICS = {
    "speed/fill": "speed/packing_efficiency",
    "speed/rank_balance": "speed/load_imbalance",
    "speed/data_wait_share": "speed/data_wait_fraction",
}
#: Keys in the files that `opt-ds evaluate` writes.
FIGURES = {
    "picture_grid": "image_grid",
    "painted": "generated",
    "pictures": "images",
    "pictures_without_words": "images_without_words",
    "another_picture": "another_image",
    "encoder_share": "encoder_fraction",
    "decoder_share": "decoder_fraction",
}
#: Fields of run.json.
RUN = {"identity": "fixed_settings"}
#: Fields of a launch in run.json.
LAUNCH = {"tasks_off": "tasks_disabled"}
#: Fields of the result.json of a dVAE's run.
DVAE_RESULT = {"identity": "fingerprint"}
#: Fields of report.json, and of a shard's notes in its journal.
PREPARATION = {"cut": "truncated", "lost": "dropped"}


def current_fields(record: Any, names: Mapping[str, str]) -> Any:
    """Return a JSON object whose former fields have their current names. What is in the fields is not changed.

    Args:
        record: The object. Other JSON values are returned as they are.
        names: Former field -> its name. If the object has both, the former field is dropped.

    Returns:
        The object.
    """
    if not isinstance(record, Mapping):
        return record
    found = {names[name]: value for name, value in record.items() if name in names}
    return found | {name: value for name, value in record.items() if name not in names}


def current_keys(tree: Any, names: Mapping[str, str]) -> Any:
    """Return JSON values whose former keys, at any depth, have their current names.

    Args:
        tree: The values. They are not changed.
        names: Former key -> its name. If a mapping has both, the former key is dropped.

    Returns:
        The values.
    """
    if isinstance(tree, Mapping):
        return {key: current_keys(value, names) for key, value in current_fields(tree, names).items()}
    if isinstance(tree, list):
        return [current_keys(item, names) for item in tree]
    return tree


def former_arguments(**names: str) -> Callable[[Function], Function]:
    """Return a decorator that lets a function take arguments by their former names, with a DeprecationWarning.

    The function raises UserError for an argument that is given by both names.

    Args:
        names: Former name -> name, of arguments.
    """

    def decorated(function: Function) -> Function:
        parameters = list(inspect.signature(function).parameters)

        @functools.wraps(function)
        def wrapper(*arguments: Any, **keywords: Any) -> Any:
            for former, name in names.items():
                if former not in keywords:
                    continue
                if name in keywords or name in parameters[: len(arguments)]:
                    raise UserError(f"{former} is the former name of {name}: give one of them")
                keywords[name] = keywords.pop(former)
                message = f"the argument {former} is now called {name}; the former name works until the next release"
                warnings.warn(message, DeprecationWarning, stacklevel=2)
            return function(*arguments, **keywords)

        return cast(Function, wrapper)

    return decorated
