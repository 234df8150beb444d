"""Reading of a folder that `opt-ds export` wrote: its files are checked and its model is loaded.

The configuration and the safetensors are read by this module alone. Nothing in the folder can make it import code, use
a network or read a file elsewhere, and no model is built that is larger than the weights can fill.
"""

import logging
from pathlib import Path

import torch
from safetensors import safe_open

from opt_ds.config import Config, config_from_dict
from opt_ds.errors import UserError
from opt_ds.model.opt import OPT
from opt_ds.store.foreign import check_inside, read_json_object, tensor_shapes, weight_files
from opt_ds.store.seal import SEAL_FILE, check_seal
from opt_ds.training.checkpoint import HUB_MODEL_TYPE
from opt_ds.training.checkpoint_files import check_size

_LOG = logging.getLogger(__name__)
_REMEDY = "export the model again, or use another copy"
#: The only keys in config.json of an exported model. transformers acts on other keys (it looks for code on a hub).
_CONFIG_KEYS = frozenset({"architectures", "dtype", "torch_dtype", "model_type", "opt_ds_config", "transformers_version"})


def load_exported(path: Path) -> tuple[OPT, Config]:
    """Return the model (fp32, in evaluation mode) and the configuration of an exported folder.

    Log a warning if an older version exported the folder, without hashes. Raise UserError as `check_exported`, and if
    the weights do not belong to the configuration.
    """
    config = check_exported(path)
    model = OPT(config.model, config.tasks)
    _copy_weights(model, weight_files(path, _REMEDY), path)
    return model.eval(), config


def check_exported(path: Path) -> Config:
    """Return the configuration of an exported folder, after checking the folder.

    No file may be damaged or lead out of the folder.

    Raise UserError if a file differs from what was exported, the configuration has unknown keys, weights are in files
    elsewhere, or the weights cannot fill the configured sizes.
    """
    if not check_seal(path, _REMEDY):
        _LOG.warning(f"{path}: no {SEAL_FILE}, because an older version exported it: its files are not checked for damage")
    file = path / "config.json"
    check_inside(path, file)
    fields = read_json_object(file, _REMEDY)
    unknown = sorted(fields.keys() - _CONFIG_KEYS)
    if unknown:
        raise UserError(f"{file}: {unknown[0]} is not a key of an exported model: {_REMEDY}")
    if fields.get("model_type") != HUB_MODEL_TYPE or fields.get("architectures", ["OPTModel"]) != ["OPTModel"]:
        raise UserError(f"{file}: not a model that opt-ds export wrote: {_REMEDY}")
    settings = fields.get("opt_ds_config")
    if not isinstance(settings, dict):
        raise UserError(f"{file}: damaged, no opt_ds_config: {_REMEDY}")
    config = config_from_dict(settings, where=str(file))
    shapes: dict[str, tuple[int, ...]] = {}
    for weights in weight_files(path, _REMEDY):
        if weights.is_file():
            check_inside(path, weights)
        shapes |= tensor_shapes(weights, _REMEDY)
    check_size(config.model, shapes, str(file))
    return config


@torch.no_grad()
def _copy_weights(model: OPT, files: list[Path], where: Path) -> None:
    """Fill every tensor of the model. A tensor with several names is stored once."""
    missing = {id(tensor): (name, tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    own = dict(model.state_dict(keep_vars=True))
    for file in files:
        with safe_open(file, "pt") as tensors:
            for stored in tensors.keys():  # noqa: SIM118 - no mapping
                name = stored.removeprefix("opt.")
                shape = tuple(tensors.get_slice(stored).get_shape())
                if name not in own or tuple(own[name].shape) != shape:
                    raise UserError(f"{file}: {stored} {shape} is not of the model in config.json: {_REMEDY}")
                own[name].copy_(tensors.get_tensor(stored))
                missing.pop(id(own[name]), None)
    if missing:
        raise UserError(f"{where}: no weights of {next(iter(missing.values()))[0]}: {_REMEDY}")
