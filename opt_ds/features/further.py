"""The base class of feature extractors for modalities besides text, image and audio."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from opt_ds.errors import UserError
from opt_ds.features.extractors import Extractor
from opt_ds.store.checks import further_problem
from opt_ds.store.further import FurtherModality, StoredColumn


class FurtherExtractor(Extractor):
    """An extractor of items from files of any format. Each row of the store is one file; each item has all columns.

    Decoding is the extractor's own. It runs in a worker process, whose end costs the file that it was reading.
    """

    reads_files = True
    #: Plural word for the items of a row, such as "readings".
    item: str
    #: Name -> dtype and width of each column. "features" is one of them: float16 of one width.
    columns: Mapping[str, StoredColumn]

    @abstractmethod
    def extract(self, inputs: Sequence[Path | None]) -> list[dict[str, np.ndarray] | None]:
        """Return the columns of each file, arrays [items, *width] of one length; None for None."""

    def problem(self, columns: Any) -> str | None:
        """Return why a store cannot hold one result of `extract`; None if it can."""
        if not isinstance(columns, dict):
            return "the extractor returned no dictionary of columns"
        return further_problem(columns, self.modality())

    def modality(self) -> FurtherModality:
        """Return what the store records of the modality. Raise UserError if a store cannot hold it."""
        try:
            return FurtherModality(item=self.item, columns=dict(self.columns))
        except ValidationError as error:
            mistake = error.errors()[0]
            where = "".join(f"{part}: " for part in mistake["loc"])
            raise UserError(f"extractor {self.name}: {where}{mistake['msg'].removeprefix('Value error, ')}") from None
