"""The feature store that training builds if none is configured: the `emoji` corpus."""

import logging
from pathlib import Path

from opt_ds.ingest.pipeline import prepare
from opt_ds.store.schema import STORE_FILE, StoreDescription, load_description

_LOG = logging.getLogger(__name__)


def emoji_store(output: Path, work_dir: Path, *, workers: int = 2) -> StoreDescription:
    """Build the `emoji` feature store at `output` (raw files under `work_dir`) unless it exists.

    Resume an unfinished one.
    """
    from opt_ds.ingest.importers.emoji import ATTRIBUTION, write_emoji_corpus

    if (output / STORE_FILE).is_file():
        _LOG.info(f"{output}: feature store found")
        return load_description(output)
    manifest = write_emoji_corpus(work_dir, workers=workers)
    description = prepare(manifest, output, workers=workers, info={"attribution": ATTRIBUTION})
    assert description is not None, "only a partition of a store has none"
    return description
