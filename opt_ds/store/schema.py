"""Definition of a feature store: the datasets of a shard and the fields of `store.json`. No features are read here.

A store is a directory with `store.json`, a `tokenizer/` folder and `shard-*.h5` files. Ragged modalities are flat
arrays with int64 offsets: item i of a shard is `array[offsets[i]:offsets[i + 1]]`.

Text, image and audio are built in. A store may have further modalities. It describes them itself (`FurtherModality`), so
that reading it does not need the code that made them. Stores without further modalities do not mention them.

Shape letters: N samples, L tokens, R regions, T frames; Dv, Da feature sizes; X, I, A text, image and audio rows of the
shard; M modalities of the store.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from opt_ds.errors import UserError
from opt_ds.store.foreign import check_inside, invalid_field
from opt_ds.store.further import MAX_FURTHER, PLAIN_NAME, Count, Frozen, FurtherCounts, FurtherModality, listed_columns

SCHEMA_VERSION = 1
STORE_FILE = "store.json"
TOKENIZER_FOLDER = "tokenizer"
DVAE_FOLDER = "dvae"  # the dVAE that made the codes and can decode them
BOX_SIZE = 7  # x1, y1, x2, y2, w, h, w*h; all divided by the size of the image
CODES_PER_IMAGE = 64  # 8 x 8
PIXELS_SHAPE = (3, 64, 64)
MAX_SPLITS = 256  # samples/split is uint8
MISSING = -1  # in samples/rows: the sample does not have this modality


class _BuiltIn(NamedTuple):
    """The names under which the descriptions and the index keep the counts of a built-in modality."""

    rows: str  # field of `ShardDescription`: number of rows
    items: str  # field of `ShardDescription`: number of items in all rows
    lengths: str  # dataset of index.h5: items per row
    item: str  # plural word for the items


BUILT_IN = {
    "text": _BuiltIn("num_texts", "num_tokens", "text_lengths", "tokens"),
    "image": _BuiltIn("num_images", "num_regions", "region_counts", "regions"),
    "audio": _BuiltIn("num_audios", "num_frames", "frame_counts", "frames"),
}
MODALITIES = tuple(BUILT_IN)  # the first columns of samples/rows, in this order; then come further modalities

# name -> dtype; the comment gives the shape.
DATASETS: dict[str, str] = {
    "samples/rows": "int64",  # [N, M] shard-local row of each modality, -1 = missing
    "samples/id": "uint8",  # UTF-8 bytes of all ids, concatenated
    "samples/id_offsets": "int64",  # [N + 1]
    "samples/group": "int64",  # [N] see `group_code`
    "samples/split": "uint8",  # [N] index into store.json's split_names
    "samples/labels": "int32",  # indices into store.json's label_names, concatenated
    "samples/label_offsets": "int64",  # [N + 1]
    "text/tokens": "int32",  # [L] without [CLS] and [SEP]
    "text/offsets": "int64",  # [X + 1]
    "text/utf8": "uint8",  # UTF-8 bytes of the original captions, which evaluation uses as references
    "text/utf8_offsets": "int64",  # [X + 1]
    "image/offsets": "int64",  # [I + 1]
    "image/features": "float16",  # [R, Dv]
    "image/boxes": "float32",  # [R, 7]
    "image/labels": "int16",  # [R]
    "image/scores": "float16",  # [R]
    "image/codes": "uint16",  # [I, 64] optional
    "image/pixels": "uint8",  # [I, 3, 64, 64] optional
    "audio/offsets": "int64",  # [A + 1]
    "audio/features": "float16",  # [T, Da]
}
OPTIONAL_DATASETS = ("image/codes", "image/pixels")


_RESERVED = (*MODALITIES, "samples", "codes", "image_labels")  # the last two have an entry in `extractors`
_MAX_STORE_JSON_BYTES = 256 << 20
_Size = Annotated[int, Field(ge=0, le=2**24)]


def modality_name_problem(name: str) -> str | None:
    """Return why a further modality cannot have this name; None if it can."""
    if not PLAIN_NAME.fullmatch(name):
        return "a name has 1 to 32 letters, digits and underscores, and begins with a letter"
    return f'"{name}" is a name of the store\'s own' if name in _RESERVED else None


def _modality_name(name: str) -> str:
    if (problem := modality_name_problem(name)) is not None:
        raise ValueError(problem)
    return name


class _MayBeFurther(Frozen):
    """A description whose field `further` is left out wherever it is written if it is empty.

    Stores of the built-in modalities therefore keep their bytes, and older versions read them.
    """

    @model_serializer(mode="wrap")
    def _without_empty(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = write(self)
        if not fields.get("further", True):
            del fields["further"]
        return fields


class Dims(Frozen):
    """Sizes that a model must match. `num_codes` is the size of the dVAE's codebook, None without codes.

    `image_num_classes` is 0 if the image extractor gives no classes.
    """

    image_feature_dim: _Size
    image_num_classes: _Size
    audio_feature_dim: _Size
    audio_frame_rate_hz: float = Field(ge=0)
    vocab_size: _Size
    num_codes: int | None = Field(None, ge=1, le=65536)


class TokenizerDescription(Frozen):
    """The ids of BERT's special tokens in `tokenizer/`, and the hash of its files."""

    pad_id: _Size
    unk_id: _Size
    cls_id: _Size
    sep_id: _Size
    mask_id: _Size
    sha256: str


class Statistics(Frozen):
    """Mean and standard deviation per feature dimension over the distinct rows of the train split, and their count."""

    mean: list[float]
    std: list[Annotated[float, Field(ge=0)]]
    count: Count


class ShardDescription(_MayBeFurther):
    """One shard file: its size, checksum and lengths."""

    file: str = Field(pattern=r"^shard-[0-9]+(-r[0-9]+)?\.h5$")
    bytes: Count
    sha256: str
    num_samples: Count
    num_texts: Count
    num_images: Count
    num_audios: Count
    num_tokens: Count
    num_regions: Count
    num_frames: Count
    further: dict[str, FurtherCounts] = Field(default_factory=dict)

    def num_rows(self, modality: str) -> int:
        """Return the number of rows of a modality."""
        count: int = getattr(self, BUILT_IN[modality].rows) if modality in BUILT_IN else self.further[modality].rows
        return count

    def num_items(self, modality: str) -> int:
        """Return the number of items in all rows of a modality."""
        count: int = getattr(self, BUILT_IN[modality].items) if modality in BUILT_IN else self.further[modality].items
        return count


class StoreDescription(_MayBeFurther):
    """The content of `store.json`.

    `splits_source` states whether the splits came from the manifest or from hashing groups. `preparation_key`
    identifies the inputs and settings that the store was prepared from (see the pipeline). `tokenizer_folder` has
    another name after texts were tokenised again; its content matters, not its name. The order of `further` is the
    order of their columns in samples/rows.
    """

    schema_version: int
    num_samples: Count
    split_names: list[str] = Field(max_length=MAX_SPLITS)
    split_counts: dict[str, Count]
    splits_source: Literal["manifest", "group hash"]
    dims: Dims
    has_codes: bool
    has_pixels: bool
    compression: Literal["gzip"] | None
    extractors: dict[str, dict[str, Any]]
    tokenizer: TokenizerDescription
    label_names: list[str]
    statistics: dict[str, Statistics]
    shards: list[ShardDescription]
    tokenizer_folder: str = Field(TOKENIZER_FOLDER, pattern=rf"^{TOKENIZER_FOLDER}(-r[0-9]+)?$")
    preparation_key: str = ""
    info: dict[str, Any] = Field(default_factory=dict)
    fingerprint: str = ""
    further: dict[Annotated[str, AfterValidator(_modality_name)], FurtherModality] = Field(
        default_factory=dict, max_length=MAX_FURTHER
    )

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> "StoreDescription":
        names = [shard.file for shard in self.shards]
        if len(set(names)) != len(names):
            raise ValueError("shards: a file is listed twice")
        if len(set(self.split_names)) != len(self.split_names):
            raise ValueError("split_names: a name is listed twice")
        if self.has_codes and self.dims.num_codes is None:
            raise ValueError("has_codes: dims.num_codes is missing")
        if any(shard.further.keys() != self.further.keys() for shard in self.shards):
            raise ValueError("shards: a shard has other further modalities than the store")
        return self

    def num_rows(self, modality: str) -> int:
        """Return the number of rows of a modality in all shards."""
        return sum(shard.num_rows(modality) for shard in self.shards)

    def num_items(self, modality: str) -> int:
        """Return the number of items in all rows of a modality."""
        return sum(shard.num_items(modality) for shard in self.shards)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities in the order of the columns of samples/rows."""
        return (*MODALITIES, *self.further)

    @property
    def datasets(self) -> dict[str, str]:
        """Dtype of each dataset of a shard by its name, in the order of the file; see `datasets_of`."""
        return datasets_of(self.further)

    @property
    def feature_dims(self) -> dict[str, int]:
        """Size of a feature by the name of the modality; see `feature_dims_of`."""
        return feature_dims_of(self.dims, self.further)

    @property
    def units(self) -> dict[str, str]:
        """Plural word for the items of each modality."""
        return units_of(self.further)

    def with_fingerprint(self) -> "StoreDescription":
        """Return a copy with the fingerprint of its contents (schema, dims, tokenizer, splits, labels, shards)."""
        content = self.model_dump(
            mode="json", exclude={"fingerprint", "info", "preparation_key", "statistics", "tokenizer_folder"}
        )
        if self.further:
            content["further"] = [[name, each.item, listed_columns(each.columns)] for name, each in self.further.items()]
        text = json.dumps(content, sort_keys=True, ensure_ascii=True)
        return self.model_copy(update={"fingerprint": hashlib.sha256(text.encode()).hexdigest()})


def datasets_of(further: Mapping[str, FurtherModality]) -> dict[str, str]:
    """Return the dtype of each dataset of a shard by its name, in the order of the file.

    The built-in datasets come first. Then follow `<name>/offsets` and the columns of each further modality.
    """
    datasets = dict(DATASETS)
    for name, modality in further.items():
        datasets[f"{name}/offsets"] = "int64"
        datasets |= {f"{name}/{column}": stored.dtype for column, stored in modality.columns.items()}
    return datasets


def units_of(further: Mapping[str, FurtherModality]) -> dict[str, str]:
    """Return the plural word for the items of each modality by its name."""
    built_in = {name: names.item for name, names in BUILT_IN.items()}
    return {**built_in, **{name: modality.item for name, modality in further.items()}}


def feature_dims_of(dims: Dims, further: Mapping[str, FurtherModality]) -> dict[str, int]:
    """Return the size of a feature of each modality that has features: image, audio and the further ones."""
    built_in = {"image": dims.image_feature_dim, "audio": dims.audio_feature_dim}
    return {**built_in, **{name: modality.feature_dim for name, modality in further.items()}}


def tail_shape(name: str, dims: Dims, further: Mapping[str, FurtherModality]) -> tuple[int, ...]:
    """Return the dimensions of a dataset's shape after the first."""
    if name not in DATASETS:
        modality, _, column = name.partition("/")
        return () if column == "offsets" else further[modality].columns[column].width
    tails: dict[str, tuple[int, ...]] = {
        "samples/rows": (len(MODALITIES) + len(further),),
        "image/features": (dims.image_feature_dim,),
        "image/boxes": (BOX_SIZE,),
        "image/codes": (CODES_PER_IMAGE,),
        "image/pixels": PIXELS_SHAPE,
        "audio/features": (dims.audio_feature_dim,),
    }
    return tails.get(name, ())


def group_code(group: str) -> int:
    """Return the stable non-negative 63-bit code of a group's name (blake2b), as stored in `samples/group`."""
    return int.from_bytes(hashlib.blake2b(group.encode(), digest_size=8).digest(), "little") >> 1


def check_further(further: Mapping[str, FurtherModality], where: str) -> None:
    """Raise UserError for further modalities that a store cannot have, because of their names or their number."""
    problems = (problem for name in further if (problem := modality_name_problem(name)) is not None)
    if (problem := next(problems, None)) is not None:
        raise UserError(f"{where}: further modality: {problem}: choose another name")
    if len(further) > MAX_FURTHER:
        raise UserError(f"{where}: {len(further)} further modalities: a store has at most {MAX_FURTHER}")


def check_split_names(names: list[str], where: str) -> None:
    """Raise UserError for more splits than `samples/split` can number."""
    if len(names) > MAX_SPLITS:
        raise UserError(f'{where}: {len(names)} splits, such as "{names[-1]}": a store has at most {MAX_SPLITS}')


def load_description(path: Path) -> StoreDescription:
    """Read `path/store.json`. Raise UserError if it is missing, unreadable, malformed or of another schema version."""
    file = path / STORE_FILE
    if not file.is_file():
        if (path / "partial.json").is_file():
            raise UserError(f"{path}: unfinished feature store: run the same `opt-ds prepare` again, it resumes")
        raise UserError(f"{path}: no feature store there ({STORE_FILE} not found): make one with `opt-ds prepare`")
    check_inside(path, file)
    if file.stat().st_size > _MAX_STORE_JSON_BYTES:
        raise UserError(f"{file}: over {_MAX_STORE_JSON_BYTES >> 20} MiB: prepare the store again")
    try:
        text = file.read_text(encoding="utf-8")
        fields = json.loads(text)
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{file}: not readable as JSON: restore it, or prepare the store again") from None
    version = fields.get("schema_version") if isinstance(fields, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{file}: schema version {version!r}, this opt_ds reads version {SCHEMA_VERSION}: prepare the store again"
        )
    try:
        return StoreDescription.model_validate_json(text, strict=True)
    except ValidationError as error:
        where, message = invalid_field(error), error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"{file}: {f'field {where}: ' if where else ''}{message}: prepare the store again") from None
