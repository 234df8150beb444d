"""What is trained on what: the sections of the configuration for data, model and tasks. `opt_ds.config` hands them on."""

from typing import Literal

from pydantic import Field, model_validator

from opt_ds.config_section import Section
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


class DataConfig(Section):
    """Which stores are read, and how."""

    stores: tuple[str, ...] = Field((), description="Folders of the feature stores. `--store` sets it.")
    mix: tuple[float, ...] | None = Field(
        None, description="Sampling weight of each store. None: weights proportional to the stores' numbers of samples."
    )
    train_split: str = Field("train", description="Split that is trained on.")
    valid_split: str = Field("valid", description="Split of the validation samples.")
    frame_offset: bool = Field(
        False,
        description="Sample the offset of the first stacked audio frame in each epoch (augmentation). False: offset 0.",
    )
    prefetch_batches: int = Field(4, ge=1, description="Micro-batches that are prepared ahead of the training step.")
    read_ahead_mib: int = Field(
        64,
        ge=0,
        description="Features that each rank reads from disk ahead of the prepared micro-batches, in MiB. 0: none.",
    )
    workers: int = Field(1, ge=1, description="Threads per rank that assemble micro-batches.")


class ModelConfig(Section):
    """Architecture of the model. Defaults are `opt-base`: BERT-base's encoder and the paper's input dimensions."""

    vocab_size: int = Field(30522, ge=8, description="Size of the tokenizer's vocabulary.")
    max_text_tokens: int = Field(
        126, ge=1, description="Longest text, in WordPiece tokens without [CLS] and [SEP]. Longer texts are truncated."
    )
    image_feature_dim: int = Field(2048, ge=1, description="Dimension of an image region's feature vector.")
    image_num_classes: int = Field(1601, ge=2, description="Number of classes that image regions are labelled with.")
    max_regions: int = Field(100, ge=1, description="Largest number of image regions. Further regions are dropped.")
    audio_feature_dim: int = Field(768, ge=1, description="Dimension of a stored audio frame.")
    audio_stack: int = Field(
        1, ge=1, description="Number of consecutive stored audio frames that form one model frame."
    )
    max_frames: int = Field(
        256, ge=1, description="Longest audio, in model frames (after stacking). Longer audio is truncated."
    )
    image_codebook_size: int = Field(8192, ge=2, description="Number of codes in the dVAE's codebook.")
    num_image_codes: int = Field(64, ge=1, description="Number of codes that represent one image.")
    standardize_features: bool = Field(
        False, description="Standardise image and audio features by the store's mean and deviation, clamped to ±8."
    )
    hidden_size: int = Field(768, ge=8, description="Width of the encoder and decoders.")
    num_layers: int = Field(12, ge=1, description="Number of encoder layers.")
    num_heads: int = Field(12, ge=1, description="Number of attention heads. `hidden_size` must be a multiple of it.")
    ffn_size: int = Field(3072, ge=8, description="Width of the feed-forward layers.")
    text_decoder_layers: int = Field(6, ge=1, description="Number of layers of the text decoder.")
    image_decoder_layers: int = Field(6, ge=1, description="Number of layers of the image decoder.")
    norm: Literal["post", "pre"] = Field(
        "post", description="Position of layer normalisation: after (BERT) or before each block."
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="Dropout probability of embeddings and layer outputs. 0: none.")
    attention_dropout: float = Field(0.1, ge=0, lt=1, description="Dropout probability of attention weights. 0: none.")
    layer_norm_eps: float = Field(1e-12, gt=0, description="Term added to the variance in layer normalisation.")
    initializer_range: float = Field(0.02, gt=0, description="Standard deviation of the initial weights.")
    embedding_range: float | None = Field(
        None,
        gt=0,
        description="Standard deviation of the initial embedding tables and mask vectors. Feature projections "
        "are scaled so that "
        "they start with the same output deviation. None: `initializer_range` for all, without that scaling.",
    )
    bert: str | None = Field(
        None,
        description="Folder of a Hugging Face BERT that the encoder and the word embeddings start from. None: "
        "untrained weights.",
    )

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
    weight: float = Field(1.0, ge=0, description="Factor on this loss in the total. 0: disabled.")


class MatchingConfig(LossConfig):
    loss: Literal["bce", "ce"] = Field(
        "bce", description="Loss: binary cross-entropy per case, or cross-entropy over all cases."
    )
    pair_probability: float = Field(
        0.5, ge=0, le=1, description="Share of the samples whose input is two modalities, not three."
    )
    near_donor_share: float = Field(
        0.0, ge=0, le=1, description="Share of the negatives in training that are hard negatives."
    )
    near_donor_candidates: int = Field(
        16, ge=2, description="Candidates drawn for each hard negative. The one with the most similar text is taken."
    )


class AudioMaskConfig(LossConfig):
    span: int = Field(3, ge=1, description="Number of consecutive audio frames that are masked together.")


class ContrastiveConfig(LossConfig):
    temperature: float = Field(0.1, gt=0, description="Divisor of the similarities in the contrastive loss.")


class LabelsConfig(LossConfig):
    """Fine-tuning's classification head on [CLS], a score a name."""

    names: tuple[str, ...] = Field(..., min_length=1, description="Names of the classes.")
    answers: bool = Field(
        False,
        description="Whether the labels are VQA answers, whose target is min(times given / `finetune.agreement`, 1).",
    )


class ModalityConfig(LossConfig):
    drop_probability: float = Field(
        0.3, gt=0, lt=1, description="Probability of dropping each modality from the input."
    )
    always_drop_target: bool = Field(
        False,
        description="Never show the reconstructed modality in the input. A sample then has one target, text or image.",
    )
    text_target_share: float = Field(
        0.5, ge=0, le=1, description="With `always_drop_target`: share of samples whose target is text."
    )


class CurriculumPhase(Section):
    from_fraction: float = Field(
        ..., gt=0, lt=1, description="Start of the phase, as a fraction of `schedule.total_steps`."
    )
    mix: dict[str, float] = Field(..., description="Task sampling weights from then on, as in `tasks.mix`.")


class TasksConfig(Section):
    """The pre-training tasks. A loss's weight is its own times its draw's; a draw without a weighted loss is off."""

    mix: dict[str, float] = Field(
        default_factory=lambda: dict.fromkeys(LOSSES_OF_DRAW, 1.0),
        description="Task sampling weights: how often a sample is used for each task. Tasks that are not named "
        "have weight 0.",
    )
    curriculum: tuple[CurriculumPhase, ...] = Field(
        (), description="Phases that replace `tasks.mix` from a fraction of the schedule on, in ascending order."
    )
    mask_probability: float = Field(
        0.15, gt=0, lt=1, description="Share of tokens, regions and frames that the masked tasks mask."
    )
    mlm: LossConfig = Field(LossConfig(), description="Masked language modelling.")
    mvm: LossConfig = Field(
        LossConfig(), description="Masked vision modelling. Its weight is a factor on `mvfr` and `mrc`."
    )
    mvfr: LossConfig = Field(
        LossConfig(), description="Masked vision modelling: regression of the masked regions' features."
    )
    mrc: LossConfig = Field(LossConfig(), description="Masked vision modelling: classification of the masked regions.")
    mam: AudioMaskConfig = Field(
        AudioMaskConfig(), description="Masked audio modelling. Its weight is a factor on `mafr` and `mac`."
    )
    mafr: LossConfig = Field(
        LossConfig(), description="Masked audio modelling: regression of the masked frames' features."
    )
    mac: ContrastiveConfig = Field(
        ContrastiveConfig(), description="Masked audio modelling: contrastive loss of the masked frames."
    )
    modality: ModalityConfig = Field(
        ModalityConfig(), description="Modality-level modelling. Its weight is a factor on `dtr` and `dir`."
    )
    dtr: LossConfig = Field(LossConfig(), description="Denoising text reconstruction by the text decoder.")
    dir: LossConfig = Field(LossConfig(), description="Denoising image reconstruction by the image decoder.")
    matching: MatchingConfig = Field(
        MatchingConfig(), description="Sample-level modelling: which modalities belong together."
    )
    labels: LabelsConfig | None = Field(
        None, description="Classification head. Set by `opt-ds finetune` for classification and vqa. None: no head."
    )

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
        shares = {
            loss: max(mix.get(draw, 0.0) for mix in mixes) for draw, losses in LOSSES_OF_DRAW.items() for loss in losses
        }
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
                raise ValueError(
                    "the weights of tasks and tasks.mix leave no task: give one a positive share and weight"
                )
        return self
