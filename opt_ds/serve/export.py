"""A trained model as a folder of its own, in Hugging Face's layout.

    <folder>/config.json, model.safetensors    `OPTModel.from_pretrained`, `AutoModel.from_pretrained`
    <folder>/processor/                        tokenizer, extractors' identities, dVAE (store/processor_files.py)
    <folder>/README.md                         the model card, with the run's figures
    <folder>/opt_ds_files.json                 the hashes of all these but the card, compared before any of them is used

Loading reads configuration and safetensors itself: nothing in the folder can make it import code, use a network or read a
file elsewhere, and no model is built that the weights could not fill.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from opt_ds.config import Config, DataConfig, config_from_dict
from opt_ds.errors import UserError
from opt_ds.store.files import follow_umask
from opt_ds.store.foreign import check_inside, read_json_object, tensor_shapes, weight_files
from opt_ds.store.processor_files import PROCESSOR_FOLDER, load_processor_description
from opt_ds.store.seal import SEAL_FILE, check_seal, seal_folder

if TYPE_CHECKING:
    from opt_ds.model.opt import OPT

_LOG = logging.getLogger(__name__)
_CARD = "README.md"
_REMEDY = "export the model again, or use another copy"
#: All that config.json of an exported model has; transformers acts upon other keys (it looks for code on a hub).
_CONFIG_KEYS = frozenset({"architectures", "dtype", "torch_dtype", "model_type", "opt_ds_config", "transformers_version"})


def export(checkpoint: Path, output: Path) -> Path:
    """Write the folder. UserError if it exists and is not empty; whole or not at all."""
    from opt_ds.engine.checkpoint import load_model, read_state, resolve_checkpoint, run_of
    from opt_ds.serve.pretrained import OmniPerceptionConfig, OPTModel

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} is there already: name a new folder")
    folder = resolve_checkpoint(checkpoint)
    run = run_of(folder)
    if not (run / PROCESSOR_FOLDER).is_dir():
        raise UserError(f"{run / PROCESSOR_FOLDER}: not there: start the run once more, it writes it")
    load_processor_description(run / PROCESSOR_FOLDER)
    model, config = load_model(checkpoint)
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    portable = config.model_copy(update={"data": DataConfig(), "deepspeed_config": None})  # paths mean nothing elsewhere
    hub_config = OmniPerceptionConfig(opt_ds_config=portable.model_dump(mode="json"))
    OPTModel(hub_config, model).save_pretrained(temporary)
    for weights in temporary.glob("*.safetensors"):
        follow_umask(weights)
    shutil.copytree(run / PROCESSOR_FOLDER, temporary / PROCESSOR_FOLDER)
    result = run / "result.json"
    figures = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else None
    card = _model_card(config, read_state(folder), sum(p.numel() for p in model.parameters()), figures)
    seal_folder(temporary)
    (temporary / _CARD).write_text(card, encoding="utf-8")
    if output.exists():
        output.rmdir()
    temporary.rename(output)
    return output


def load_exported(path: Path) -> tuple["OPT", Config]:
    """Return model (fp32, in evaluation mode) and configuration of an exported folder.

    Warns if an older version exported the folder, without hashes. Raises UserError as `check_exported`, and for
    weights that are not those of the configuration.
    """
    from opt_ds.model.opt import OPT

    config = check_exported(path)
    model = OPT(config.model, config.tasks)
    _copy_weights(model, weight_files(path, _REMEDY), path)
    return model.eval(), config


def check_exported(path: Path) -> Config:
    """Return the configuration of an exported folder in which nothing is damaged and nothing leads out of it.

    Raises UserError for a file that is not what was exported, a configuration with foreign keys, weights in files elsewhere, and
    sizes that the weights could not fill.
    """
    from opt_ds.engine.checkpoint import HUB_MODEL_TYPE
    from opt_ds.engine.checkpoint_files import check_size

    if not check_seal(path, _REMEDY):
        _LOG.warning(f"{path}: no {SEAL_FILE}, an older version exported it: whether its files are damaged is not checked")
    file = path / "config.json"
    check_inside(path, file)
    fields = read_json_object(file, _REMEDY)
    unknown = sorted(fields.keys() - _CONFIG_KEYS)
    if unknown:
        raise UserError(f"{file}: {unknown[0]} is no key of an exported model: {_REMEDY}")
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
def _copy_weights(model: "OPT", files: list[Path], where: Path) -> None:
    """Fill every tensor of the model; one that several names share is stored once."""
    from safetensors import safe_open

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


def _model_card(config: Config, state: dict[str, Any], num_parameters: int, figures: dict[str, Any] | None) -> str:
    model = config.model
    lines = [
        "---", "library_name: opt_ds", "tags: [multimodal, speech, image-to-text, text-to-image, automatic-speech-recognition]",
        "---", "", f"# OPT, {config.preset}", "",
        "A model of text, images and speech, after the Omni-Perception Pre-Trainer (Liu et al. 2021, arXiv 2107.00249), trained "
        "with opt_ds.", "",
        f"{num_parameters / 1e6:.1f} million parameters: encoder of {model.num_layers} layers, {model.hidden_size} wide, "
        f"{model.num_heads} heads; text decoder of {model.text_decoder_layers}, image decoder of {model.image_decoder_layers} "
        f"layers. {state['step']} steps of {config.batch.size} {config.batch.unit}, seed {config.seed}, {state['precision']}, "
        f"versions: {', '.join(f'{name} {version}' for name, version in state['versions'].items() if version)}.", "",
        "```python", "import opt_ds", "", 'model = opt_ds.load("this/folder")', 'print(model.caption("photo.jpg"))', "```", "",
    ]  # fmt: skip
    if figures is None:
        lines.append("The run was not evaluated (`opt-ds evaluate summary` writes the figures).")
    else:
        from opt_ds.evaluate.summary import table

        lines += ["```", table(figures).strip(), "```"]
    return "\n".join(lines) + "\n"
