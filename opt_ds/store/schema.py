"""Definition of a feature store: the datasets of a shard and the fields of `store.json`. No features are read here.

A store is a directory with `store.json`, a `tokenizer/` folder and `shard-*.h5` files. Ragged modalities are flat
arrays with int64 offsets: item i of a shard is `array[offsets[i]:offsets[i + 1]]`.

Shape letters: N samples, L tokens, R regions, T frames; Dv, Da feature sizes; X, I, A text, image and audio rows of the
shard.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from opt_ds.errors import UserError
from opt_ds.store.foreign import check_inside

SCHEMA_VERSION = 1
STORE_FILE = "store.json"
TOKENIZER_FOLDER = "tokenizer"
DVAE_FOLDER = "dvae"  # the dVAE that made the codes and can decode them
BOX_SIZE = 7  # x1, y1, x2, y2, w, h, w*h; all divided by the size of the image
CODES_PER_IMAGE = 64  # 8 x 8
PIXELS_SHAPE = (3, 64, 64)
MAX_SPLITS = 256  # samples/split is uint8
MISSING = -1  # in samples/rows: the sample does not have this modality
MODALITIES = ("text", "image", "audio")  # the column order of samples/rows

# name -> dtype; the comment gives the shape.
DATASETS: dict[str, str] = {
    "samples/rows": "int64",  # [N, 3] shard-local text, image, audio row, -1 = missing
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


_MAX_STORE_JSON_BYTES = 256 << 20
_Count = Annotated[int, Field(ge=0, lt=2**48)]
_Size = Annotated[int, Field(ge=0, le=2**24)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Dims(_Frozen):
    """Sizes that a model must match. `num_codes` is the size of the dVAE's codebook, None without codes."""

    image_feature_dim: _Size
    image_num_classes: _Size
    audio_feature_dim: _Size
    audio_frame_rate_hz: float = Field(ge=0)
    vocab_size: _Size
    num_codes: int | None = Field(None, ge=1, le=65536)


class TokenizerDescription(_Frozen):
    """The ids of BERT's special tokens in `tokenizer/`, and the hash of its files."""

    pad_id: _Size
    unk_id: _Size
    cls_id: _Size
    sep_id: _Size
    mask_id: _Size
    sha256: str


class Statistics(_Frozen):
    """Mean and standard deviation per feature dimension over the distinct rows of the train split, and their count."""

    mean: list[float]
    std: list[Annotated[float, Field(ge=0)]]
    count: _Count


class ShardDescription(_Frozen):
    """One shard file: its size, checksum and lengths."""

    file: str = Field(pattern=r"^shard-[0-9]+(-r[0-9]+)?\.h5$")
    bytes: _Count
    sha256: str
    num_samples: _Count
    num_texts: _Count
    num_images: _Count
    num_audios: _Count
    num_tokens: _Count
    num_regions: _Count
    num_frames: _Count


class StoreDescription(_Frozen):
    """The content of `store.json`.

    `splits_source` states whether the splits came from the manifest or from hashing groups. `preparation_key`
    identifies the inputs and settings that the store was prepared from (see the pipeline). `tokenizer_folder` has
    another name after texts were tokenised again; its content matters, not its name.
    """

    schema_version: int
    num_samples: _Count
    split_names: list[str] = Field(max_length=MAX_SPLITS)
    split_counts: dict[str, _Count]
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

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> "StoreDescription":
        names = [shard.file for shard in self.shards]
        if len(set(names)) != len(names):
            raise ValueError("shards: a file is listed twice")
        if len(set(self.split_names)) != len(self.split_names):
            raise ValueError("split_names: a name is listed twice")
        if self.has_codes and self.dims.num_codes is None:
            raise ValueError("has_codes: dims.num_codes is missing")
        return self

    def with_fingerprint(self) -> "StoreDescription":
        """Return a copy with the fingerprint of its contents (schema, dims, tokenizer, splits, labels, shards)."""
        content = self.model_dump(
            mode="json", exclude={"fingerprint", "info", "preparation_key", "statistics", "tokenizer_folder"}
        )
        text = json.dumps(content, sort_keys=True, ensure_ascii=True)
        return self.model_copy(update={"fingerprint": hashlib.sha256(text.encode()).hexdigest()})


def tail_shape(name: str, dims: Dims) -> tuple[int, ...]:
    """Return the dimensions of a dataset's shape after the first."""
    tails: dict[str, tuple[int, ...]] = {
        "samples/rows": (len(MODALITIES),),
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
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{file}: {f'field {where}: ' if where else ''}{message}: prepare the store again") from None
