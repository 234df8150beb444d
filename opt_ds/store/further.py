"""Description of a store's further modalities: those besides text, image and audio.

A store describes them itself, so that reading it does not need the code that made them.
"""

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# A shard of the built-in datasets and as many further ones stays below the number of objects that hdf5.py accepts.
MAX_FURTHER = 8
MAX_COLUMNS = 7
_MAX_WIDTH = 2**24
PLAIN_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,31}")

Count = Annotated[int, Field(ge=0, lt=2**48)]


class Frozen(BaseModel):
    """A part of a store's description: no unknown fields, not changed after it was read."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class StoredColumn(Frozen):
    """One array of a further modality. Its shape is [items, *width]."""

    dtype: Literal["float16", "float32", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
    width: tuple[Annotated[int, Field(ge=1, le=_MAX_WIDTH)], ...] = Field((), max_length=3)

    @model_validator(mode="after")
    def _is_bounded(self) -> "StoredColumn":
        if math.prod(self.width) > _MAX_WIDTH:
            raise ValueError(f"width: more than {_MAX_WIDTH} values per item")
        return self


class FurtherModality(Frozen):
    """A modality besides text, image and audio.

    `item` is the plural word for its items, such as "readings". `columns` are the arrays that each row consists of.
    They have one length. "features" is one of them: float16 [items, size].
    """

    item: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9_ -]{0,31}$")
    columns: dict[Annotated[str, Field(pattern=rf"^{PLAIN_NAME.pattern}$")], StoredColumn] = Field(max_length=MAX_COLUMNS)

    @model_validator(mode="after")
    def _has_features(self) -> "FurtherModality":
        features = self.columns.get("features")
        if features is None or features.dtype != "float16" or len(features.width) != 1:
            raise ValueError('columns: "features" of dtype float16 and one width is missing')
        if "offsets" in self.columns:
            raise ValueError('columns: "offsets" is a name of the store\'s own')
        return self

    @property
    def feature_dim(self) -> int:
        """Size of a feature."""
        return self.columns["features"].width[0]


class FurtherCounts(Frozen):
    """Rows of a further modality in a shard, and items in all of them."""

    rows: Count
    items: Count


def listed_columns(columns: Mapping[str, StoredColumn]) -> list[Any]:
    """Return the columns as a list, because their order, which JSON with sorted keys loses, is part of the content."""
    return [[name, column.dtype, list(column.width)] for name, column in columns.items()]
