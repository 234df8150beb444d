"""Export of a trained model to a self-contained folder in Hugging Face's layout.

    <folder>/config.json, model.safetensors    `OPTModel.from_pretrained`, `AutoModel.from_pretrained`
    <folder>/processor/                        tokenizer, extractors' fingerprints, dVAE (store/processor_files.py)
    <folder>/README.md                         the model card, with the run's figures
    <folder>/opt_ds_files.json                 the hashes of all files except the card, checked before use

exported.py reads the folder.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from opt_ds.config import Config, DataConfig
from opt_ds.errors import UserError
from opt_ds.serving.pretrained import OmniPerceptionConfig, OPTModel
from opt_ds.store.files import atomic_folder, follow_umask
from opt_ds.store.processor_files import PROCESSOR_FOLDER, load_processor_description
from opt_ds.store.seal import seal_folder
from opt_ds.training.checkpoint import load_model, read_state, resolve_checkpoint, run_of

_CARD = "README.md"


def export(checkpoint: Path, output: Path) -> Path:
    """Write the folder and return it.

    Raise UserError if it exists and is not empty. The folder is complete or absent.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} exists already: name a new folder")
    folder = resolve_checkpoint(checkpoint)
    run = run_of(folder)
    if not (run / PROCESSOR_FOLDER).is_dir():
        raise UserError(f"{run / PROCESSOR_FOLDER}: does not exist: start the run again, which writes it")
    load_processor_description(run / PROCESSOR_FOLDER)
    model, config = load_model(checkpoint)
    # Paths have no meaning on another machine.
    portable = config.model_copy(update={"data": DataConfig(), "deepspeed_config": None})
    hub_config = OmniPerceptionConfig(opt_ds_config=portable.model_dump(mode="json"))
    result = run / "result.json"
    figures = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else None
    card = _model_card(config, read_state(folder), sum(p.numel() for p in model.parameters()), figures)
    with atomic_folder(output) as temporary:
        temporary.mkdir()
        OPTModel(hub_config, model).save_pretrained(temporary)
        for weights in temporary.glob("*.safetensors"):
            follow_umask(weights)
        shutil.copytree(run / PROCESSOR_FOLDER, temporary / PROCESSOR_FOLDER)
        seal_folder(temporary)
        (temporary / _CARD).write_text(card, encoding="utf-8")
    return output


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
        from opt_ds.evaluation.summary import table

        lines += ["```", table(figures).strip(), "```"]
    return "\n".join(lines) + "\n"
