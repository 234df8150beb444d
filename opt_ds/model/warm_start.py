"""Warm start: encoder, word and position embedding and the MLM head from any Hugging Face BERT folder."""

import json
import pickle
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from opt_ds.config import ModelConfig
from opt_ds.errors import UserError
from opt_ds.store.foreign import check_model_folder

if TYPE_CHECKING:
    from opt_ds.model.opt import OPT

#: our name -> BERT's names (several: joined along the first dimension). {i}: layer.
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
_MLM_HEAD: dict[str, tuple[str, ...]] = {
    "mlm.transform.weight": ("cls.predictions.transform.dense.weight",),
    "mlm.transform.bias": ("cls.predictions.transform.dense.bias",),
    "mlm.norm.weight": ("cls.predictions.transform.LayerNorm.weight",),
    "mlm.norm.bias": ("cls.predictions.transform.LayerNorm.bias",),
    "mlm.bias": ("cls.predictions.bias",),
}


def load_bert(model: "OPT", folder: Path) -> list[str]:
    """Copy BERT's weights into an `OPT`; gives the names that were set.

    Longer position tables are cut to the model's; BERT's segment 0 becomes the text type; the MLM head is taken where
    the folder has it. Raises UserError, and changes nothing, where a shape, the number of heads or the placement of norms
    differs, an encoder weight is missing or a file is not readable.
    """
    check_model_folder(folder, "fetch the folder again", allow_pickled=True)
    _check_architecture(model.config, folder)
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
        wanted |= _MLM_HEAD
    values = {name: _fitting(folder, bert, name, sources, own[name].shape) for name, sources in wanted.items()}
    types = "embeddings.modality.weight"
    text_type = _fitting(folder, bert, types, ("embeddings.token_type_embeddings.weight",), own[types].shape[1:])
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)
        own[types][0].copy_(text_type)
    return [*wanted, types]


def _fitting(
    folder: Path, bert: dict[str, torch.Tensor], name: str, sources: tuple[str, ...], shape: torch.Size
) -> torch.Tensor:
    """BERT's value for our parameter `name`, which has this shape. Raises UserError where there is none."""
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
            f"model.bert {folder}: {sources[0]} is {tuple(bert[sources[0]].shape)}, the model wants {tuple(shape)}: "
            "make model.hidden_size, ffn_size, vocab_size and max_text_tokens agree with its config.json"
        )
    return value


def _check_architecture(config: ModelConfig, folder: Path) -> None:
    """Other heads, norms, positions or activations give weights of the same shape another meaning."""
    if config.norm != "post":
        raise UserError(
            f"model.bert {folder}: BERT's LayerNorms follow each residual sum, with model.norm={config.norm} they would "
            "be applied elsewhere: set model.norm=post, or omit model.bert"
        )
    file = folder / "config.json"
    try:
        described = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        heads = described.get("num_attention_heads")
    except (ValueError, AttributeError):
        raise UserError(f"model.bert {file}: not readable as a BERT's config: fetch the folder again") from None
    for key, expected in (("model_type", "bert"), ("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
        if described.get(key, expected) != expected:
            raise UserError(
                f"model.bert {file}: {key} is {described[key]}, the encoder computes {expected}: choose a BERT with {expected}"
            )
    if heads is not None and heads != config.num_heads:
        raise UserError(
            f"model.bert {folder}: its num_attention_heads is {heads}, model.num_heads is {config.num_heads}: "
            f"set model.num_heads={heads}"
        )


def _read(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of a Hugging Face folder, by their names in the file (old LayerNorm names modernised)."""
    for name, load in (("model.safetensors", load_file), ("pytorch_model.bin", _load_pickle)):
        if (folder / name).is_file():
            try:
                weights = load(folder / name)
            except (SafetensorError, RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise UserError(f"model.bert {folder / name} is not readable ({reason}): fetch it again") from None
            break
    else:
        raise UserError(f"model.bert {folder}: neither model.safetensors nor pytorch_model.bin is there")
    return {name.replace(".gamma", ".weight").replace(".beta", ".bias"): value for name, value in weights.items()}


def _load_pickle(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, map_location="cpu", weights_only=True)
