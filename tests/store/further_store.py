"""A store of fixed input with two further modalities, and changes of its description."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from opt_ds.store.files import file_sha256
from opt_ds.store.further import FurtherModality, StoredColumn
from opt_ds.store.schema import StoreDescription
from opt_ds.store.writer import ShardContent
from tests.store.fixed_store import contents, new_writer, write

FEATURES = StoredColumn(dtype="float16", width=(3,))
# A column may have several dimensions, and a name that ends like the store's own offsets.
TOUCH = FurtherModality(
    item="readings",
    columns={
        "features": FEATURES,
        "forces": StoredColumn(dtype="float32", width=(2, 2)),
        "finger": StoredColumn(dtype="uint8"),
        "time_offsets": StoredColumn(dtype="int64"),
    },
)
SMELL = FurtherModality(item="sniffs", columns={"features": StoredColumn(dtype="float16", width=(2,))})
FURTHER = {"touch": TOUCH, "smell": SMELL}
ROWS = [
    [(0, 0, 0, 0, -1), (1, -1, 0, -1, 0), (-1, 1, 1, 1, -1), (2, 2, -1, 1, 0)],
    [(0, -1, -1, 2, 1), (-1, -1, -1, 0, -1), (-1, 0, -1, 1, 0)],
    [],
]


def touch(seed: int) -> dict[str, np.ndarray]:
    count = 2 - seed % 2
    return {
        "features": np.arange(count * 3).reshape(count, 3) / 4 + seed,
        "forces": np.arange(count * 4, dtype="float32").reshape(count, 2, 2) - seed,
        "finger": np.arange(count) + seed,
        "time_offsets": np.array([7, -5])[:count] - seed,
    }


def smell(seed: int) -> dict[str, np.ndarray]:
    return {"features": np.full((seed + 1, 2), 0.5 + seed, "float16")}


def write_store(path: Path, **changes: Any) -> Path:
    extractors = {name: {"name": "fixed"} for name in ("text", "image", "audio", "codes", "touch", "smell")}
    writer = new_writer(path, further=FURTHER, extractors=extractors, **changes)
    write(writer, further_contents())
    writer.finish(len(ROWS))
    return path


def further_contents() -> list[ShardContent]:
    return contents(ROWS, {"touch": touch, "smell": smell})


def agree(store: Path, change: Callable[[dict[str, Any]], None] = lambda fields: None) -> None:
    """Change store.json, and make its checksums agree with the shards, as the store's sender would."""
    fields = json.loads((store / "store.json").read_text(encoding="utf-8"))
    for shard in fields["shards"]:
        file = store / shard["file"]
        shard |= {"sha256": file_sha256(file), "bytes": file.stat().st_size}
    change(fields)
    fields["fingerprint"] = StoreDescription.model_validate(fields).with_fingerprint().fingerprint
    (store / "store.json").write_text(json.dumps(fields), encoding="utf-8")
