"""Entries with several captions: one sample per caption. They share their files and their group."""

from collections.abc import Iterator, Sequence
from typing import Any

from opt_ds.ingest.importers.common import sample
from opt_ds.ingest.importers.files import Found
from opt_ds.ingest.manifest import ManifestLine, Skipped


def captions_of(value: Any, name: str) -> list[str]:
    """Return the texts of a value that is a text, a list of texts, or null. Raise TypeError, naming it, for another one."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(each, str) for each in values):
        raise TypeError(f"{name} is neither a text nor a list of texts")
    return values


def samples_of_captions(
    id: str,
    texts: Sequence[str],
    *,
    files: dict[str, tuple[str, Found] | None],
    labels: tuple[str, ...] = (),
    group: str | None = None,
    split: str | None = None,
) -> Iterator[ManifestLine | Skipped]:
    """Yield one sample per text, or one without a text if there is none.

    With several texts, `#0`, `#1` and so on follow the id, as in Flickr30k. See `sample` for the arguments.
    """
    for number, text in enumerate(texts or (None,)):
        own_id = f"{id}#{number}" if len(texts) > 1 else id
        yield sample(own_id, text=text, files=files, labels=labels, group=group, split=split)
