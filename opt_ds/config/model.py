"""Configuration sections of the data and the model. `opt_ds.config` re-exports them."""

import math
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, ValidationInfo, WrapValidator, create_model, model_validator

from opt_ds.config.plugins import plugins_of
from opt_ds.config.section import Section
from opt_ds.registry import MODALITIES

STANDARD_LIMIT = 8.0  # standardised features are clamped to this many standard deviations

#: Subsets of the modalities, by the letters used in tables.
Subset = Literal["T", "I", "A", "T+I", "T+A", "A+I", "T+A+I"]


class DataConfig(Section):
    """Which stores are read, and how."""

    renamed = {"mix": "store_weights"}  # noqa: RUF012

    stores: tuple[str, ...] = Field((), description="Folders of the feature stores. `--store` sets it.")
    store_weights: tuple[float, ...] | None = Field(
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
    image_num_classes: int = Field(
        1601, ge=0, description="Number of classes that image regions are labelled with. Below 2: none, and MRC is disabled."
    )
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
    image_positions: Literal["sequence", "grid"] = Field(
        "sequence",
        description="Position embeddings of the image decoder. sequence: one per code, in reading order. grid: the sum of one "
        "per row and one per column of the codes' square grid.",
    )
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
    normalize_embedding_summands: bool = Field(
        False,
        description="Normalise the projected feature and the projected box of an image region, and the projected feature and "
        "the position of an audio frame, before they are added (as UNITER). False: they are added as they are.",
    )
    bert: str | None = Field(
        None,
        description="Folder of a Hugging Face BERT that the encoder and the word embeddings start from. None: "
        "untrained weights.",
    )

    plugins: tuple[str, ...] = Field(
        (),
        description="Modalities of other packages: names that an installed package announces (entry points "
        "`opt_ds.modalities`), or `module:Class`. Each adds a section of its name.",
    )

    if TYPE_CHECKING:  # the sections of further modalities, as in `config.model.touch`

        def __getattr__(self, name: str) -> Any: ...

    @classmethod
    def class_for(cls, values: Any) -> type[Section]:
        """Return the class with the sections of the modalities that the values name."""
        return model_config(plugins_of(values))

    @classmethod
    def trust(cls, values: Any) -> None:
        """Allow the import of modalities that the user names by `module:Class`."""
        MODALITIES.allow(plugins_of(values))

    @property
    def modalities(self) -> dict[str, Any]:
        """Name -> class of the modalities, in the order of their numbers."""
        return MODALITIES.units(self.plugins)

    @model_validator(mode="after")
    def _has_sections(self) -> "ModelConfig":
        if self.plugins and type(self) is ModelConfig:
            raise ValueError("plugins: construct the configuration with config_from_dict, which adds their sections")
        return self

    @model_validator(mode="after")
    def _heads_divide(self) -> "ModelConfig":
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        return self

    @model_validator(mode="after")
    def _codes_form_a_grid(self) -> "ModelConfig":
        if self.image_positions == "grid" and self.image_grid_side**2 != self.num_image_codes:
            raise ValueError(
                f"image_positions grid requires a square number of codes, num_image_codes is {self.num_image_codes}: "
                "use image_positions=sequence"
            )
        return self

    @property
    def image_grid_side(self) -> int:
        """Number of rows and columns of the image codes' grid."""
        return math.isqrt(self.num_image_codes)

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_heads

    @property
    def max_sequence(self) -> int:
        """Maximum packed length of one sample."""
        units = [unit(self, number) for number, unit in enumerate(self.modalities.values())]
        return sum(unit.limit + unit.special_rows for unit in units)


@cache
def model_config(plugins: tuple[str, ...]) -> type[ModelConfig]:
    """Return the class with the sections of these modalities of other packages.

    Raise UserError if one cannot be loaded.
    """
    if not plugins:
        return ModelConfig
    units = MODALITIES.units(plugins)
    sections = {
        name: (unit.options, Field(unit.options(), description=unit.about))
        for name, unit in units.items()
        if unit.options is not None
    }
    return create_model("ModelConfig", __base__=ModelConfig, __doc__=ModelConfig.__doc__, **sections)  # type: ignore[call-overload]


def _with_sections(value: Any, _: Any, info: ValidationInfo) -> ModelConfig:
    if isinstance(value, ModelConfig):
        return value
    return model_config(plugins_of(value)).model_validate(value, context=info.context)


#: Type of the section in the run's configuration.
ModelSection = Annotated[SerializeAsAny[ModelConfig], WrapValidator(_with_sections)]
