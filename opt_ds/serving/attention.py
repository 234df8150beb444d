"""Attention of each word over regions and frames, for visualisation.

The attention kernels do not materialise the probabilities. They are recomputed from the layer's projections, for one
sample.
"""

import numpy as np
import torch

from opt_ds.data.modalities import AUDIO, IMAGE, TEXT
from opt_ds.data.sample import Sample
from opt_ds.evaluation.runner import ModelRunner
from opt_ds.nn.transformer import EncoderLayer


@torch.inference_mode()
def word_attention(runner: ModelRunner, sample: Sample) -> list[dict[str, object]]:
    """Return {"word", "regions": [r], "frames": [a]} for each WordPiece of the sample's text.

    The values are the last encoder layer's attention probabilities, averaged over heads and rescaled so that the
    maximum of each list is 1. A list is empty if its modality is absent.
    """
    model = runner.model
    batch = runner.packer.pack([sample]).to(runner.device)
    inputs = batch.inputs
    hidden_te, _ = model.embeddings(inputs)
    stream_te = hidden_te
    layers = list(model.encoder.layers)
    for layer in layers[:-1]:
        hidden_te, stream_te = layer(hidden_te, stream_te, inputs.sequences)
    last = layers[-1]
    assert isinstance(last, EncoderLayer), "a ModuleList does not know the type of its items"
    q_thd, k_thd, _ = last.attention.project(hidden_te)
    scores_htt = torch.einsum("qhd,khd->hqk", q_thd.float(), k_thd.float()) * q_thd.shape[-1] ** -0.5
    attention_tt = torch.softmax(scores_htt, -1).mean(0)
    words = runner.tokenizer.convert_ids_to_tokens(sample.of(TEXT).ids.tolist())
    return [
        {
            "word": word,
            "regions": _scaled(attention_tt[1 + place, inputs.parts[IMAGE].index]),
            "frames": _scaled(attention_tt[1 + place, inputs.parts[AUDIO].index]),
        }
        for place, word in enumerate(words)
    ]


def _scaled(row: torch.Tensor) -> list[float]:
    values = row.cpu().numpy().astype(np.float64)
    return (values / values.max()).round(4).tolist() if len(values) else []
