"""Models in folders of Hugging Face transformers: configuration, input settings and weights.

Nothing is downloaded, no code of a folder is run, and weights that do not fit are refused.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from opt_ds.errors import UserError
from opt_ds.weights import read_config_file, refuse_remainder

#: Fields of config.json that could select code, precision or a kernel. They are ignored.
NOT_OURS = ("_attn_implementation", "attn_implementation", "auto_map", "dtype", "torch_dtype", "quantization_config")

_SLACK = 10_000_000  # parameters


def read_fields(
    folder: Path, named: str | None, supported: Collection[str], *, reader: str, kind: str, option: str
) -> tuple[dict[str, Any], str]:
    """Return the fields of a folder's config.json and its model_type.

    Args:
        folder: The folder.
        named: The model_type that the user expects. None: any of the supported ones.
        supported: The supported values of model_type.
        reader: Name of the extractor, for messages.
        kind: What the extractor reads, for messages, such as "detector".
        option: How to name another architecture, for messages, up to its name.

    Raises:
        UserError: There is no configuration, its architecture is not supported, or the user named another one.
    """
    fields = read_config_file(folder, kind)
    found = fields.get("model_type")
    if not isinstance(found, str) or found not in supported:
        raise UserError(
            f"{folder}: not a {kind} that {reader} reads: model_type in its config.json is {found!r}: supported are "
            f"{', '.join(supported)}"
        )
    if named is not None and named != found:
        raise UserError(f"{folder}: its architecture is {found}, not {named}: {option}{found}, or name another folder")
    return fields, found


def build_config(folder: Path, fields: Mapping[str, Any], model_type: str) -> Any:
    """Return transformers' configuration of a model. UserError for values that it cannot use."""
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[model_type](**_plain(fields))
    except Exception:  # transformers raises exceptions of many types for values that it cannot use
        raise UserError(f"{folder}: its config.json cannot be used as that of a {model_type} model: download it again") from None


def model_class(name: str, where: Path) -> Any:
    """Return a class of transformers. UserError if the installed version does not have it."""
    import transformers

    try:
        return getattr(transformers, name)
    except AttributeError:
        raise UserError(
            f"{where}: transformers {transformers.__version__} has no {name}: install a newer one (pip install -U transformers)"
        ) from None


def load_model(
    found: Any, config: Any, state: Mapping[str, torch.Tensor], where: Path, name: str, unused: str = "", **arguments: Any
) -> Any:
    """Build a model in fp32 and load its weights, which transformers renames as its own loader does.

    Args:
        found: Class of the model.
        config: Its configuration.
        state: Weights by their published names, without those of heads.
        where: The folder, for messages.
        name: What messages call the model.
        unused: Regular expression of whole names of weights that may be missing, because they are used in training only.
        arguments: Further arguments of the class.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        UserError: A weight is missing, unexpected or has another shape, or the configuration cannot be used.
    """
    with _quiet():
        try:
            _refuse_larger(found, config, state, where, arguments)
            model, report = found.from_pretrained(
                None, config=config, state_dict=dict(state), torch_dtype=torch.float32, output_loading_info=True,
                ignore_mismatched_sizes=True, local_files_only=True, **arguments,
            )  # fmt: skip
        except UserError:
            raise
        except Exception:  # of many types, with advice that is not ours
            raise UserError(f"{where}: config.json and weights do not fit each other: download the folder again") from None
    for key, have, want in sorted(report["mismatched_keys"]):
        raise UserError(f"{where}: does not fit {name}: {key} is {list(have)}, not {list(want)}")
    missing = [key for key in report["missing_keys"] if not (unused and re.fullmatch(unused, key))]
    refuse_remainder(missing, report["unexpected_keys"], str(where), name)
    return model.eval()


def _refuse_larger(found: Any, config: Any, state: Mapping[str, torch.Tensor], where: Path, arguments: Mapping[str, Any]) -> None:
    """Raise UserError for a configuration of a far larger network than the weights are of, before memory is taken for it."""
    with torch.device("meta"):
        described = sum(weight.numel() for weight in found(config, **arguments).parameters())
    given = sum(weight.numel() for weight in state.values())
    if described > 2 * given + _SLACK:
        raise UserError(
            f"{where}: config.json describes a network of {described:,} parameters, the weights are {given:,}: download the "
            "folder again"
        )


def read_processor(folder: Path, part: str) -> dict[str, Any] | None:
    """Return the settings of a folder's image processor or feature extractor; None if it has none.

    Args:
        folder: The folder.
        part: "image_processor" or "feature_extractor", the settings' name within processor_config.json.

    Raises:
        UserError: A file cannot be read as settings.
    """
    for file, inner in ((folder / "processor_config.json", part), (folder / "preprocessor_config.json", None)):
        if not file.is_file():
            continue
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
            settings = settings if inner is None else settings.get(inner)
        except (ValueError, AttributeError, RecursionError):
            settings = ()
        if settings is not None and not isinstance(settings, dict):
            raise UserError(f"{file}: not readable as the settings of a model's input: download it again")
        if settings is not None:
            return settings
    return None


def build_processor(names: Collection[str], settings: Mapping[str, Any], keys: Collection[str], default: str, where: Path) -> Any:
    """Return transformers' image processor or feature extractor with these settings.

    Args:
        names: The supported classes.
        settings: As in the folder's file.
        keys: The settings to use. The others are left at the class's defaults.
        default: The class if the settings name none, as in old folders.
        where: The folder, for messages.

    Raises:
        UserError: The settings name another class, or cannot be used.
    """
    named = settings.get("image_processor_type") or settings.get("feature_extractor_type") or default
    name = str(named).removesuffix("Fast")
    if default.endswith("ImageProcessor"):
        name = name.replace("FeatureExtractor", "ImageProcessor")
    if name not in names:
        raise UserError(f"{where}: its input is prepared by {named}, which is not supported: supported are {', '.join(names)}")
    try:
        return model_class(name, where)(**{key: settings[key] for key in keys if key in settings})
    except UserError:
        raise
    except Exception:  # of many types, for values that the class cannot use
        raise UserError(f"{where}: the settings of its input cannot be used by {name}: download the folder again") from None


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields without those of `NOT_OURS`, also in the parts of a model."""
    return {
        key: _plain(value) if key.endswith("_config") and isinstance(value, dict) else value
        for key, value in fields.items()
        if key not in NOT_OURS
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the progress bar and the report of transformers' loader, whose findings `load_model` reports itself."""
    from transformers.utils import logging

    verbosity, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bar:
            logging.enable_progress_bar()
