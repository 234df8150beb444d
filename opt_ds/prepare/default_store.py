"""The feature store that training builds when it is given none: the `emoji` corpus."""

from collections.abc import Callable
from pathlib import Path

from opt_ds.prepare.pipeline import prepare
from opt_ds.store.schema import STORE_FILE, StoreDescription, load_description


def emoji_store(
    output: Path, work_dir: Path, *, workers: int = 2, say: Callable[[str], None] = print
) -> StoreDescription:
    """Build the `emoji` feature store at `output` (raw files under `work_dir`) unless it is there. It resumes."""
    from opt_ds.prepare.importers.emoji import ATTRIBUTION, write_emoji_corpus

    if (output / STORE_FILE).is_file():
        say(f"{output}: feature store found")
        return load_description(output)
    manifest = write_emoji_corpus(work_dir, workers=workers, say=say)
    description = prepare(manifest, output, workers=workers, info={"attribution": ATTRIBUTION}, say=say)
    assert description is not None, "only a share of a store has none"
    return description
