"""Warm start: encoder, word and position embedding and the MLM head from any Hugging Face BERT folder."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from opt_ds.errors import UserError

#: our name -> BERT's names (several: joined along the first dimension). {i}: layer.
_EMBEDDINGS = {
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
_MLM_HEAD = {
    "mlm.transform.weight": ("cls.predictions.transform.dense.weight",),
    "mlm.transform.bias": ("cls.predictions.transform.dense.bias",),
    "mlm.norm.weight": ("cls.predictions.transform.LayerNorm.weight",),
    "mlm.norm.bias": ("cls.predictions.transform.LayerNorm.bias",),
    "mlm.bias": ("cls.predictions.bias",),
}


def load_bert(model: torch.nn.Module, folder: Path) -> list[str]:
    """Copy BERT's weights into an `OPT`; gives the names that were set.

    Longer position tables are cut to the model's; BERT's segment 0 becomes the text type. Raises UserError where a shape differs
    or an encoder weight is missing; the MLM head is taken where the folder has it.
    """
    bert = {name.removeprefix("bert."): value for name, value in _read(folder).items()}
    own = dict(model.named_parameters())
    wanted = dict(_EMBEDDINGS)
    for i in range(model.config.num_layers):
        for ours, theirs in _LAYER.items():
            for kind in ("weight", "bias"):
                wanted[f"encoder.layers.{i}.{ours}.{kind}"] = tuple(f"encoder.layer.{i}.{t}.{kind}" for t in theirs)
    if "cls.predictions.transform.dense.weight" in bert:
        bert.setdefault("cls.predictions.bias", bert.get("cls.predictions.decoder.bias", torch.zeros(model.config.vocab_size)))
        wanted |= _MLM_HEAD
    with torch.no_grad():
        for name, sources in wanted.items():
            missing = [source for source in sources if source not in bert]
            if missing:
                raise UserError(f"model.bert {folder}: it has no {missing[0]}: is it a BERT with {model.config.num_layers} layers?")
            value = torch.cat([bert[source] for source in sources])
            if name.endswith("position.weight"):
                value = value[: len(own[name])]
            if value.shape != own[name].shape:
                raise UserError(
                    f"model.bert {folder}: {sources[0]} is {tuple(value.shape)}, the model wants {tuple(own[name].shape)}: "
                    "make model.hidden_size, ffn_size, vocab_size and max_text_tokens agree with its config.json"
                )
            own[name].copy_(value)
        own["embeddings.modality.weight"][0].copy_(bert["embeddings.token_type_embeddings.weight"][0])
    return [*wanted, "embeddings.modality.weight"]


def _read(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of a Hugging Face folder, by their names in the file (old LayerNorm names modernised)."""
    if (folder / "model.safetensors").is_file():
        weights = load_file(folder / "model.safetensors")
    elif (folder / "pytorch_model.bin").is_file():
        weights = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    else:
        raise UserError(f"model.bert {folder}: neither model.safetensors nor pytorch_model.bin is there")
    modern = {".gamma": ".weight", ".beta": ".bias"}
    return {name.replace(".gamma", modern[".gamma"]).replace(".beta", modern[".beta"]): value for name, value in weights.items()}
