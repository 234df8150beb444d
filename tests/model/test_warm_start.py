"""Test the encoder against a reference: with the weights of a Hugging Face BERT it returns BERT's outputs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel

from opt_ds.data.batch import PackedBatch, Packer
from opt_ds.data.modalities import TEXT
from opt_ds.data.sample import Sample
from opt_ds.errors import UserError
from opt_ds.modalities.text import TextItems
from opt_ds.model.opt import OPT
from opt_ds.model.warm_start import load_bert
from opt_ds.store.schema import TokenizerDescription
from tests.tiny import make_config

LENGTHS = [1, 8, 3, 5, 8, 2]
TOKENIZER = TokenizerDescription(pad_id=0, unk_id=1, cls_id=2, sep_id=3, mask_id=4, sha256="")


def bert_config(**changes: object) -> BertConfig:
    fields = {
        "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        "max_position_embeddings": 32, "layer_norm_eps": 1e-12, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3,
    }  # fmt: skip
    return BertConfig(**{**fields, **changes})


def save_bert(folder: Path, kind: type, **changes: object) -> torch.nn.Module:
    """A randomly initialised BERT, its biases and norms random too, saved as its users save it."""
    torch.manual_seed(7)
    bert = kind(bert_config(**changes)).eval()
    with torch.no_grad():
        for parameter in bert.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    bert.save_pretrained(folder)
    return bert


def make_model(**changes: object) -> OPT:
    config = make_config(model={"norm": "post", "layer_norm_eps": 1e-12, **changes})
    torch.manual_seed(1)
    return OPT(config.model, config.tasks).eval()


def texts() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(5, 40, n) for n in LENGTHS]


def packed() -> PackedBatch:
    return Packer(make_config(), TOKENIZER).pack([Sample(items={TEXT: TextItems(text)}) for text in texts()])


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Hugging Face's layout of the same texts: ids and attention mask [S, L]."""
    ids = torch.zeros(len(LENGTHS), max(LENGTHS) + 2, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, text in enumerate(texts()):
        ids[i, : len(text) + 2] = torch.from_numpy(np.concatenate([[2], text, [3]]))
        mask[i, : len(text) + 2] = 1
    return ids, mask


@torch.no_grad()
def test_the_encoder_gives_berts_outputs(tmp_path: Path) -> None:
    bert, model = save_bert(tmp_path, BertModel), make_model()
    ids, mask = padded()
    truth = bert(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
    assert (model.encode(packed().inputs) - truth).abs().max() > 0.1, "before loading it is another encoder"
    taken = load_bert(model, tmp_path)
    assert (model.encode(packed().inputs) - truth).abs().max() <= 1e-5
    assert "encoder.layers.1.ffn.down.weight" in taken and not any(name.startswith("mlm") for name in taken)


@torch.no_grad()
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_the_mlm_head_gives_berts_scores(tmp_path: Path, file: str) -> None:
    bert, model = save_bert(tmp_path, BertForMaskedLM), make_model()
    if file == "pytorch_model.bin":  # as older checkpoints are, their old names of LayerNorm's parameters included
        (tmp_path / "model.safetensors").unlink()
        old = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
               for n, value in bert.state_dict().items()}  # fmt: skip
        torch.save(old, tmp_path / file)
    taken = load_bert(model, tmp_path)
    ids, mask = padded()
    truth = bert(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    assert (model.mlm.scores(model.encode(packed().inputs)) - truth).abs().max() <= 1e-5
    assert {"mlm.bias", "mlm.transform.weight", "mlm.norm.bias"} <= set(taken)


@pytest.mark.parametrize(
    ("bert", "ours", "words"),
    [
        ({"hidden_size": 24}, {}, "word_embeddings.weight is \\(40, 24\\), the model requires \\(40, 16\\)"),
        ({"vocab_size": 50}, {}, "word_embeddings.weight is \\(50, 16\\)"),
        ({"intermediate_size": 64}, {}, "intermediate.dense.weight is \\(64, 16\\)"),
        ({"max_position_embeddings": 6}, {}, "position_embeddings.weight is \\(6, 16\\)"),
        ({}, {"num_layers": 3}, r"it has no encoder.layer.2.*it has 2 layers"),
        ({"num_attention_heads": 4}, {}, "num_attention_heads is 4.*model.num_heads is 2"),
        ({}, {"num_layers": 1}, "it has 2 layers, model.num_layers is 1: set model.num_layers=2"),
        ({"hidden_act": "relu"}, {}, "its hidden_act is 'relu', the model has only 'gelu'"),
        ({}, {"norm": "pre"}, "BERT normalises after each sublayer, model.norm is pre: set model.norm=post"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path: Path, bert: dict, ours: dict, words: str) -> None:
    save_bert(tmp_path, BertModel, **bert)
    model = make_model(**ours)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=words) as error:
        load_bert(model, tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "nothing half loaded"


def test_a_folder_that_is_no_bert_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
        load_bert(make_model(), tmp_path)
    for name in ("model.safetensors", "pytorch_model.bin"):
        (tmp_path / name).write_bytes(b"cut off")
        with pytest.raises(UserError, match=f"{name}: not a checkpoint of plain tensors: truncated") as error:
            load_bert(make_model(), tmp_path)
        assert "\n" not in str(error.value)
        (tmp_path / name).unlink()
