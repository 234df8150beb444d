"""What is trained on what: the sections of the configuration for data, model and tasks. `opt_ds.config` hands them on."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from opt_ds.errors import did_you_mean

#: What a sample of a step can be drawn for, and the losses that each draw computes.
LOSSES_OF_DRAW: dict[str, tuple[str, ...]] = {
    "mlm": ("mlm",),
    "mvm": ("mvfr", "mrc"),
    "mam": ("mafr", "mac"),
    "modality": ("dtr", "dir"),
    "matching": ("matching",),
}
LOSSES: tuple[str, ...] = tuple(loss for losses in LOSSES_OF_DRAW.values() for loss in losses)
#: The loss of fine-tuning's classification head.
LABELS_LOSS = "labels"
ALL_LOSSES = (*LOSSES, LABELS_LOSS)

#: Modality subsets by the letters that tables use.
Subset = Literal["T", "I", "A", "T+I", "T+A", "A+I", "T+A+I"]


class Section(BaseModel):
    """A frozen part of the tree: unknown keys, NaN and infinity are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataConfig(Section):
    """Which stores are read, and how."""

    stores: tuple[str, ...] = ()
    mix: tuple[float, ...] | None = Field(None, description="weight of each store; None: by its number of samples")
    train_split: str = "train"
    valid_split: str = "valid"
    frame_offset: bool = Field(False, description="draw the first stacked frame's offset anew each epoch (augmentation)")
    prefetch_batches: int = Field(4, ge=1, description="micro-batches made ahead of the training step")
    read_ahead_mib: int = Field(64, ge=0, description="features read from the disk ahead of that, per rank; 0: none")
    workers: int = Field(1, ge=1, description="threads that pack micro-batches, per rank")


class ModelConfig(Section):
    """Spec of the network. Defaults are `opt-base`: BERT-base's encoder and the paper's input dimensions."""

    vocab_size: int = Field(30522, ge=8)
    max_text_tokens: int = Field(126, ge=1, description="WordPieces, without [CLS] and [SEP]")
    image_feature_dim: int = Field(2048, ge=1)
    image_num_classes: int = Field(1601, ge=2)
    max_regions: int = Field(100, ge=1)
    audio_feature_dim: int = Field(768, ge=1)
    audio_stack: int = Field(1, ge=1, description="stored frames joined into one model frame")
    max_frames: int = Field(256, ge=1, description="model frames, that is after stacking")
    image_codebook_size: int = Field(8192, ge=2)
    num_image_codes: int = Field(64, ge=1)
    standardize_features: bool = Field(False, description="by the store's mean and deviation, clamped to ±8")
    hidden_size: int = Field(768, ge=8)
    num_layers: int = Field(12, ge=1)
    num_heads: int = Field(12, ge=1)
    ffn_size: int = Field(3072, ge=8)
    text_decoder_layers: int = Field(6, ge=1)
    image_decoder_layers: int = Field(6, ge=1)
    norm: Literal["post", "pre"] = "post"
    dropout: float = Field(0.1, ge=0, lt=1)
    attention_dropout: float = Field(0.1, ge=0, lt=1)
    layer_norm_eps: float = Field(1e-12, gt=0)
    initializer_range: float = Field(0.02, gt=0)
    embedding_range: float | None = Field(None, gt=0, description="deviation of position, type and mask embeddings")
    bert: str | None = Field(None, description="folder of a Hugging Face BERT to start encoder and words from")

    @model_validator(mode="after")
    def _heads_divide(self) -> "ModelConfig":
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        return self

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def max_sequence(self) -> int:
        """Longest packed sequence of one sample: [CLS] text [SEP] regions frames."""
        return self.max_text_tokens + 2 + self.max_regions + self.max_frames


class LossConfig(Section):
    weight: float = Field(1.0, ge=0)


class MatchingConfig(LossConfig):
    loss: Literal["bce", "ce"] = "bce"
    pair_probability: float = Field(0.5, ge=0, le=1, description="share of draws that judge two modalities")
    near_donor_share: float = Field(0.0, ge=0, le=1, description="share of training's donors that are hard negatives")
    near_donor_candidates: int = Field(16, ge=2, description="donors drawn for each of them; the nearest text is taken")


class AudioMaskConfig(LossConfig):
    span: int = Field(3, ge=1, description="consecutive frames masked together")


class ContrastiveConfig(LossConfig):
    temperature: float = Field(0.1, gt=0)


class LabelsConfig(LossConfig):
    """Fine-tuning's classification head on [CLS], a score a name."""

    names: tuple[str, ...] = Field(..., min_length=1)
    answers: bool = Field(False, description="VQA: a name's target is min(times given / agreement, 1), else 1 if it is given")


class ModalityConfig(LossConfig):
    drop_probability: float = Field(0.3, gt=0, lt=1)
    always_drop_target: bool = Field(False, description="the reconstructed modality is never in the input")
    text_target_share: float = Field(0.5, ge=0, le=1, description="share of text targets, with always_drop_target")


class CurriculumPhase(Section):
    from_fraction: float = Field(..., gt=0, lt=1, description="of schedule.total_steps")
    mix: dict[str, float]


class TasksConfig(Section):
    """The pre-training tasks. A loss's weight is its own times its draw's; a draw without a weighted loss is off."""

    mix: dict[str, float] = Field(default_factory=lambda: dict.fromkeys(LOSSES_OF_DRAW, 1.0))
    curriculum: tuple[CurriculumPhase, ...] = ()
    mask_probability: float = Field(0.15, gt=0, lt=1)
    mlm: LossConfig = LossConfig()
    mvm: LossConfig = LossConfig()
    mvfr: LossConfig = LossConfig()
    mrc: LossConfig = LossConfig()
    mam: AudioMaskConfig = AudioMaskConfig()
    mafr: LossConfig = LossConfig()
    mac: ContrastiveConfig = ContrastiveConfig()
    modality: ModalityConfig = ModalityConfig()
    dtr: LossConfig = LossConfig()
    dir: LossConfig = LossConfig()
    matching: MatchingConfig = MatchingConfig()
    labels: LabelsConfig | None = Field(None, description="set by opt-ds finetune classification and vqa")

    def loss_weight(self, loss: str) -> float:
        """Weight of one of `ALL_LOSSES` in the total."""
        if loss == LABELS_LOSS:
            return self.labels.weight if self.labels else 0.0
        draw = next(d for d, losses in LOSSES_OF_DRAW.items() if loss in losses)
        own = getattr(self, loss).weight
        return own if draw == loss else own * getattr(self, draw).weight

    @property
    def active_losses(self) -> tuple[str, ...]:
        return tuple(loss for loss in ALL_LOSSES if self.loss_weight(loss) > 0)

    @property
    def trained_losses(self) -> tuple[str, ...]:
        """The active losses of which some phase of the mix has samples (and fine-tuning's labels, which have no share)."""
        mixes = (self.mix, *(phase.mix for phase in self.curriculum))
        shares = {loss: max(mix.get(draw, 0.0) for mix in mixes) for draw, losses in LOSSES_OF_DRAW.items() for loss in losses}
        return tuple(loss for loss in self.active_losses if shares.get(loss, 1.0) > 0)

    def mix_at(self, fraction: float) -> dict[str, float]:
        """Shares of the draws at this fraction of the schedule; draws without a weighted loss have 0. They sum to 1."""
        mix = self.mix
        for phase in self.curriculum:
            if fraction >= phase.from_fraction:
                mix = phase.mix
        active = self.active_losses
        shares = {
            draw: mix.get(draw, 0.0) if any(loss in active for loss in losses) else 0.0
            for draw, losses in LOSSES_OF_DRAW.items()
        }
        total = sum(shares.values())
        return {draw: share / total for draw, share in shares.items()} if total else shares

    @model_validator(mode="after")
    def _something_to_learn(self) -> "TasksConfig":
        for name, mix in [("tasks.mix", self.mix), *(("tasks.curriculum", p.mix) for p in self.curriculum)]:
            for draw, share in mix.items():
                if draw not in LOSSES_OF_DRAW:
                    raise ValueError(f'{name} names no task "{draw}"{did_you_mean(draw, LOSSES_OF_DRAW)}')
                if share < 0:
                    raise ValueError(f"{name}.{draw} is {share}: a share cannot be negative")
        starts = [phase.from_fraction for phase in self.curriculum]
        if starts != sorted(starts):
            raise ValueError("tasks.curriculum must be in the order of from_fraction")
        for fraction in (0.0, *starts):
            if not self.labels and not any(self.mix_at(fraction).values()):
                raise ValueError("the weights of tasks and tasks.mix leave no task: give one a positive share and weight")
        return self
