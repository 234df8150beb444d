"""Where the encoder looks: attention of a word over regions and frames, for showing.

The attention kernels never form the probabilities, so the layer's own projections are used once more, for one sample.
"""

import numpy as np
import torch

from opt_ds.data.sample import Sample, given
from opt_ds.evaluation.runner import ModelRunner
from opt_ds.nn.transformer import EncoderLayer


@torch.inference_mode()
def word_attention(runner: ModelRunner, sample: Sample) -> list[dict[str, object]]:
    """For each WordPiece of the sample's text: {"word", "regions": [r], "frames": [a]}, the last encoder layer's probabilities,
    mean over heads, rescaled so that each list's largest is 1 (empty where the modality is absent)."""
    model = runner.model
    batch = runner.packer.pack([sample]).to(runner.device)
    inputs = batch.inputs
    hidden_te, _, _ = model.embeddings(inputs)
    stream_te = hidden_te
    layers = list(model.encoder.layers)
    for layer in layers[:-1]:
        hidden_te, stream_te = layer(hidden_te, stream_te, inputs.sequences)
    last = layers[-1]
    assert isinstance(last, EncoderLayer), "a ModuleList does not know the type of its items"
    q_thd, k_thd, _ = last.attention.project(hidden_te)
    scores_htt = torch.einsum("qhd,khd->hqk", q_thd.float(), k_thd.float()) * q_thd.shape[-1] ** -0.5
    attention_tt = torch.softmax(scores_htt, -1).mean(0)
    words = runner.tokenizer.convert_ids_to_tokens(given(sample.token_ids).tolist())
    return [
        {
            "word": word,
            "regions": _scaled(attention_tt[1 + place, inputs.region_index]),
            "frames": _scaled(attention_tt[1 + place, inputs.frame_index]),
        }
        for place, word in enumerate(words)
    ]


def _scaled(row: torch.Tensor) -> list[float]:
    values = row.cpu().numpy().astype(np.float64)
    return (values / values.max()).round(4).tolist() if len(values) else []
