"""What is trained on what: the sections of the configuration for data and model. `opt_ds.config` hands them on."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

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
