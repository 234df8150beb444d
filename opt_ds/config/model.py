"""Configuration sections of the data and the model. `opt_ds.config` re-exports them."""

from typing import Literal

from pydantic import Field, model_validator

from opt_ds.config.section import Section

STANDARD_LIMIT = 8.0  # standardised features are clamped to this many standard deviations

#: Subsets of the modalities, by the letters used in tables.
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
        """Width of an attention head."""
        return self.hidden_size // self.num_heads

    @property
    def max_sequence(self) -> int:
        """Maximum packed length of one sample: [CLS] text [SEP] regions frames."""
        return self.max_text_tokens + 2 + self.max_regions + self.max_frames
