"""Warm start from any Hugging Face BERT folder.

It sets the encoder, the word and position embeddings, and the heads that BERT also has.
"""

import re
from pathlib import Path

import torch

from opt_ds.config import ModelConfig
from opt_ds.errors import UserError
from opt_ds.model.opt import OPT
from opt_ds.store.foreign import check_model_folder
from opt_ds.weights import read_config, read_folder

#: Our name -> BERT's names (several: concatenated along the first dimension). {i}: layer.
_EMBEDDINGS: dict[str, tuple[str, ...]] = {
    "embeddings.text.word.weight": ("embeddings.word_embeddings.weight",),
    "embeddings.text.position.weight": ("embeddings.position_embeddings.weight",),
    "embeddings.text.norm.weight": ("embeddings.LayerNorm.weight",),
    "embeddings.text.norm.bias": ("embeddings.LayerNorm.bias",),
}
_LAYER = {
    "attention.qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.output": ("attention.output.dense",),
    "attention_norm": ("attention.output.LayerNorm",),
    "ffn.up": ("intermediate.dense",),
    "ffn.down": ("output.dense",),
    "ffn_norm": ("output.LayerNorm",),
}
_TYPES = "embeddings.token_type_embeddings.weight"
#: What a BERT has besides the encoder and its language modelling head: position ids, pooler, heads, the tied decoder.
_LEFT_OUT = r"embeddings\.position_ids|pooler\..*|cls\..*|classifier\..*|qa_outputs\..*"


def load_bert(model: OPT, folder: Path) -> list[str]:
    """Copy BERT's weights into an `OPT`. Return the names of the parameters that were set.

    Longer position tables are truncated to the model's. BERT's segment 0 becomes the text type. Heads are loaded if the
    folder has them (`Task.bert_names`).

    Raise UserError, without changing the model, if a shape or the number of heads differs, an encoder weight is missing
    or unused, or a file is not readable.
    """
    check_model_folder(folder, "fetch the folder again", allow_pickled=True)
    _check_config(model.config, folder)
    bert = {name.removeprefix("bert."): value for name, value in _read(folder).items()}
    own = dict(model.named_parameters())
    wanted = dict(_EMBEDDINGS)
    for i in range(model.config.num_layers):
        for ours, theirs in _LAYER.items():
            for kind in ("weight", "bias"):
                wanted[f"encoder.layers.{i}.{ours}.{kind}"] = tuple(f"encoder.layer.{i}.{t}.{kind}" for t in theirs)
    if "cls.predictions.transform.dense.weight" in bert:
        bias = bert.get("cls.predictions.decoder.bias", torch.zeros(model.config.vocab_size))
        bert.setdefault("cls.predictions.bias", bias)
    for task in model.tasks.values():
        if task.bert_names and next(iter(task.bert_names.values()))[0] in bert:
            wanted |= task.bert_names
    values = {name: _fitting(folder, bert, name, sources, own[name].shape) for name, sources in wanted.items()}
    types = "embeddings.modality.weight"
    text_type = _fitting(folder, bert, types, (_TYPES,), own[types].shape[1:])
    _refuse_unused(bert, {_TYPES, *(source for sources in wanted.values() for source in sources)}, model.config, folder)
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)
        own[types][0].copy_(text_type)
    return [*wanted, types]


def _fitting(
    folder: Path, bert: dict[str, torch.Tensor], name: str, sources: tuple[str, ...], shape: torch.Size
) -> torch.Tensor:
    """Return BERT's value for our parameter `name` of this shape. Raise UserError if there is none."""
    missing = [source for source in sources if source not in bert]
    if missing:
        layers = len({key.split(".")[2] for key in bert if key.startswith("encoder.layer.")})
        raise UserError(
            f"model.bert {folder}: it has no {missing[0]} (it has {layers} layers): make model.num_layers fit"
        )
    value = torch.cat([bert[source] for source in sources])
    if name.endswith("position.weight"):
        value = value[: shape[0]]
    elif name == "embeddings.modality.weight":
        value = value[0]
    if value.shape != shape:
        raise UserError(
            f"model.bert {folder}: {sources[0]} is {tuple(bert[sources[0]].shape)}, the model requires {tuple(shape)}: "
            "make model.hidden_size, ffn_size, vocab_size and max_text_tokens agree with its config.json"
        )
    return value


def _check_config(config: ModelConfig, folder: Path) -> None:
    """Raise UserError for other heads, activations or positions.

    They change the meaning of weights of the same shape.
    """
    if config.norm != "post":
        raise UserError(
            f"model.bert {folder}: BERT normalises after each sublayer, model.norm is {config.norm}: set model.norm=post"
        )
    if not (folder / "config.json").is_file():
        return
    theirs = read_config(folder, "bert", "BERT")
    heads = theirs.get("num_attention_heads")
    if heads is not None and heads != config.num_heads:
        raise UserError(
            f"model.bert {folder}: its num_attention_heads is {heads}, model.num_heads is {config.num_heads}: "
            f"set model.num_heads={heads}"
        )
    for key, own in (("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
        if theirs.get(key) not in (None, own):
            raise UserError(f"model.bert {folder}: its {key} is {theirs[key]!r}, the model has only {own!r}: use another BERT")


def _refuse_unused(bert: dict[str, torch.Tensor], used: set[str], config: ModelConfig, folder: Path) -> None:
    """Raise UserError if weights are unused, because without a layer or term the rest is a different network."""
    left = sorted(name for name in bert.keys() - used if not re.fullmatch(_LEFT_OUT, name))
    if not left:
        return
    layers = len({name.split(".")[2] for name in bert if name.startswith("encoder.layer.")})
    if layers > config.num_layers:
        raise UserError(
            f"model.bert {folder}: it has {layers} layers, model.num_layers is {config.num_layers}: set model.num_layers={layers}"
        )
    raise UserError(f"model.bert {folder}: the model has no parameter for its {left[0]}: use the folder of a BERT")


def _read(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a Hugging Face folder by their names in the file.

    Old LayerNorm names are replaced by current ones.
    """
    weights = read_folder(folder, "model.bert")
    return {name.replace(".gamma", ".weight").replace(".beta", ".bias"): value for name, value in weights.items()}
