"""Masked audio modelling on the masked frames: feature regression (MAFR) and a contrastive loss (MAC).

Legend: U utterances, M masked frames of the longest one, N frames of the longest one, v feature width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from opt_ds.config import LossConfig, ModelConfig, TasksConfig
from opt_ds.data.layout import Layout, join
from opt_ds.data.modalities import AUDIO
from opt_ds.data.sample import Sample, given
from opt_ds.data.step_samples import StepSamples
from opt_ds.data.task import BatchPart, TaskCost
from opt_ds.modalities.audio import AudioBatch
from opt_ds.ops.sequences import Sequences
from opt_ds.store.reader import FeatureStore
from opt_ds.tasks.base import Encoded, Loss, LossTerm
from opt_ds.tasks.baselines import Baseline, SampleBaseline, Terms, TrainingStatistics
from opt_ds.tasks.neighbours import interpolated, mean_at_distance
from opt_ds.tasks.token_level import TokenLevelTask, masked_places


class AudioMaskConfig(LossConfig):
    """Masked audio modelling."""

    span: int = Field(3, ge=1, description="Number of consecutive audio frames that are masked together, in every task.")


class ContrastiveConfig(LossConfig):
    """Contrastive loss of masked audio modelling."""

    temperature: float = Field(0.1, gt=0, description="Divisor of the similarities in the contrastive loss.")


@dataclass
class MaskedFrames(BatchPart):
    """Masked frames by utterance, and all frames of their utterances (for the contrastive loss)."""

    index: torch.Tensor  # int64 [m], packed positions
    rows: torch.Tensor  # int64 [m], frame rows
    places: torch.Tensor  # int64 [m], position of the frame in its utterance
    sequences: Sequences  # the masked frames of each utterance
    utterance_rows: torch.Tensor  # int64 [k], rows of all frames of these utterances
    utterances: Sequences

    @property
    def output_index(self) -> tuple[torch.Tensor, ...]:
        """Return the positions of the masked frames."""
        return (self.index,)


class MamHead(nn.Module):
    """Head of MAFR and MAC.

    MAFR: FC to the input's dimension, squared error averaged over dimensions.

    MAC: −log exp(sim(h(a_m), a_m)/τ) / Σ_k exp(sim(h(a_m), a_k)/τ), where sim is the cosine and a_m is the frame's
    original feature. k runs over a_m and the unmasked original frames of the same utterance, never over padding or
    other masked frames.
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
        """Return the terms of MAFR and MAC.

        Args:
            hidden_te: The encoder's packed output.
            masked: The masked frames.
            frames_av: Original features, float32 [a, v].
            frame_masked_a: Which frames the encoder did not see, bool [a].

        Returns:
            Loss -> term.
        """
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
        # Every utterance has an unmasked frame, because no other utterance is assigned to this task.
        count = float(masked.sequences.total)
        return LossTerm((loss_m * counted_m).sum(), count, {"correct": correct_m.sum().float()})


class MaskedAudioModeling(TokenLevelTask):
    """Masked audio modelling. `sample.targets["mam"]` is True."""

    name = "mam"
    options = AudioMaskConfig
    about = "Masked audio modelling. Its weight is a factor on `mafr` and `mac`."
    losses = (
        Loss("mafr", "mam.regress.", "Masked audio modelling: regression of the masked frames' features."),
        Loss(
            "mac", "mam.contrast.", "Masked audio modelling: contrastive loss of the masked frames.",
            options=ContrastiveConfig,
        ),
    )
    modality, modality_word, min_items = AUDIO, "audio", 2  # one frame is masked and one is not
    masked_modalities = (AUDIO,)

    @property
    def mask_spans(self) -> dict[int, int]:
        """Return the configured span of audio frames."""
        return {AUDIO: self.section.span}

    @property
    def _frame_dim(self) -> int:
        return self.config.model.audio_stack * self.config.model.audio_feature_dim

    def num_terms(self, samples: StepSamples) -> dict[str, float]:
        """Return the number of masked frames; for MAC only those with a negative."""
        frames = self.lengths(samples)
        masked = self.count_masked(frames)
        contrasted = masked[frames > masked]  # a frame without negatives is not counted
        return {"mafr": float(masked.sum()), "mac": float(contrasted.sum())}

    def num_samples(self, samples: StepSamples) -> dict[str, float]:
        """Return the number of samples with masked frames; for MAC only those with a negative."""
        frames = self.lengths(samples)
        masked = self.count_masked(frames)
        return {"mafr": float((masked > 0).sum()), "mac": float(((masked > 0) & (frames > masked)).sum())}

    def flops_per_item(self) -> float:
        """Return the multiplications of both linear layers."""
        return self.config.model.hidden_size * 2 * self._frame_dim

    def add_cost(self, samples: StepSamples, positions: np.ndarray, total: TaskCost) -> None:
        """Add the cost, including the comparisons of the contrastive loss."""
        super().add_cost(samples, positions, total)
        # Each masked frame is compared with every frame of its utterance.
        frames = self.lengths(samples)
        total.head_flops[self.own(samples)] += 2.0 * self.count_masked(frames) * frames * self._frame_dim

    def add_targets(self, sample: Sample, samples: StepSamples, index: int, store: FeatureStore) -> None:
        """Mark the sample. Its original frames are the targets."""
        sample.targets[self.name] = True

    def collate(self, samples: Sequence[Sample], layout: Layout) -> MaskedFrames:
        """Return the masked frames, and all frames of their utterances."""
        found = masked_places(samples, self.name, AUDIO)
        start = layout.row_start[:, AUDIO]
        return MaskedFrames(
            index=join([layout.first[i, AUDIO] + p for i, p in found], np.int64),
            rows=join([start[i] + p for i, p in found], np.int64),
            places=join([p for _, p in found], np.int64),
            sequences=Sequences.from_lengths([len(p) for _, p in found]),
            utterance_rows=join([np.arange(start[i], start[i + 1]) for i, _ in found], np.int64),
            utterances=Sequences.from_lengths([layout.lengths[i, AUDIO] for i, _ in found]),
        )

    @classmethod
    def make_head(cls, model: ModelConfig, tasks: TasksConfig, word: nn.Embedding) -> nn.Module:
        """Return the head with the configured temperature."""
        return MamHead(model, tasks.mac.temperature)

    @classmethod
    def terms(cls, head: nn.Module | None, encoded: Encoded, part: BatchPart) -> dict[str, LossTerm]:
        """Return the terms of MAFR and MAC."""
        frames = encoded.inputs.parts[AUDIO]
        assert head is not None and isinstance(frames, AudioBatch)
        return head(encoded.hidden_te, part, encoded.features[AUDIO], frames.masked)

    def baseline(self, statistics: TrainingStatistics) -> Baseline:
        """Return the baselines of MAFR and MAC.

        MAFR: interpolation between the nearest visible frames, shrunk to the mean of the training features. MAC: log K
        for K equally likely candidates.
        """
        stack = self.config.model.audio_stack

        def shrinkage(number: int, distance: int) -> float:
            return statistics.shrinkage(number, AUDIO, "audio", stack, mean_at_distance(distance))

        def losses(sample: Sample, number: int) -> dict[str, np.ndarray | Terms]:
            frames = sample.of(AUDIO)
            masked = given(frames.masked)
            vectors = statistics.standard(frames.features, number, "audio", stack)
            guesses, distances = interpolated(vectors, masked)
            guesses *= np.array([shrinkage(number, int(distance)) for distance in distances])[:, None]
            candidates = np.full(masked.sum(), 1.0 + (~masked).sum())
            return {
                "mafr": np.square(vectors[masked] - guesses).mean(-1),
                "mac": Terms(np.log(candidates), 1 / candidates),
            }

        return SampleBaseline(self.name, losses)
