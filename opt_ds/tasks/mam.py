"""Masked audio modelling on the same masked frames: feature regression (MAFR) and contrast (MAC).

U utterances, M masked frames of the longest, N frames of the longest, v feature width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from opt_ds.config import ModelConfig
from opt_ds.data.batch import MaskedFrames
from opt_ds.tasks.base import LossTerm


class MaskedAudioModeling(nn.Module):
    """MAFR: FC to the input's dimension, squared error averaged over dimensions.

    MAC: −log exp(sim(h(a_m), a_m)/τ) / Σ_k exp(sim(h(a_m), a_k)/τ), sim the cosine; a_m the frame's original feature; k runs over
    a_m and the unmasked original frames of the same utterance, never over padding or other masked frames.
    """

    def __init__(self, config: ModelConfig, temperature: float) -> None:
        super().__init__()
        frame_dim = config.audio_stack * config.audio_feature_dim
        self.regress = nn.Linear(config.hidden_size, frame_dim)
        self.contrast = nn.Linear(config.hidden_size, frame_dim)
        self.temperature = temperature

    def forward(
        self, hidden_te: torch.Tensor, masked: MaskedFrames, frames_av: torch.Tensor, frame_masked_a: torch.Tensor
    ) -> dict[str, LossTerm]:
        """frames_av: the original features, float32; frame_masked_a: which of them the encoder did not see."""
        hidden_me = hidden_te.index_select(0, masked.index)
        error = self.regress(hidden_me).float() - frames_av.index_select(0, masked.rows)
        return {
            "mafr": LossTerm(error.square().mean(-1).sum(), float(len(masked.rows)), {}),
            "mac": self._contrast(hidden_me, masked, frames_av, frame_masked_a),
        }

    def _contrast(
        self, hidden_me: torch.Tensor, masked: MaskedFrames, frames_av: torch.Tensor, frame_masked_a: torch.Tensor
    ) -> LossTerm:
        predicted_mv = F.normalize(self.contrast(hidden_me).float(), dim=-1)
        if not masked.sequences.total:
            return LossTerm(predicted_mv.sum(), 0.0, {"correct": predicted_mv.new_zeros(())})
        originals_av = F.normalize(frames_av.index_select(0, masked.utterance_rows), dim=-1)
        hidden_from_encoder = frame_masked_a.index_select(0, masked.utterance_rows)
        negative_un = masked.utterances.pad(~hidden_from_encoder) & masked.utterances.valid
        similarity_umn = masked.sequences.pad(predicted_mv) @ masked.utterances.pad(originals_av).transpose(1, 2)
        similarity_mn = masked.sequences.pack(similarity_umn)
        place_mn = torch.arange(similarity_mn.shape[1], device=similarity_mn.device)[None, :]
        negative_mn = masked.sequences.pack(negative_un[:, None].expand(-1, masked.sequences.max_length, -1))
        candidate_mn = negative_mn | (place_mn == masked.places[:, None])
        counted_m = negative_mn.any(-1)
        logits_mn = (similarity_mn / self.temperature).masked_fill(~candidate_mn, float("-inf"))
        loss_m = F.cross_entropy(logits_mn, masked.places, reduction="none")
        correct_m = (logits_mn.detach().argmax(-1) == masked.places) & counted_m
        count = float(masked.sequences.total)  # every utterance has an unmasked frame: the plan draws no other
        return LossTerm((loss_m * counted_m).sum(), count, {"correct": correct_m.sum().float()})
