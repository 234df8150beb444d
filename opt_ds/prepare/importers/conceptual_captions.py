"""Conceptual Captions (Sharma et al. 2018; also CC12M): TSV lines of caption and URL; the pictures are downloaded apart.

Many links are dead: a line without a file is reported and left out. Files are found by a pattern of index and URL, with
any ending and in any folder. The default is img2dataset's naming (10,000 pictures a shard, no line dropped before).
"""

import hashlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from opt_ds.errors import UserError
from opt_ds.prepare.importers.common import Files, read_rows, sample, split_and_file, write_import
from opt_ds.prepare.manifest import ManifestLine, Skipped

DEFAULT_PATTERN = "{index:09d}"


def import_conceptual_captions(
    annotations: Sequence[str],
    output: Path,
    *,
    images: Sequence[Path],
    pattern: str = DEFAULT_PATTERN,
    url_first: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Write the manifest `output`. `annotations`: TSV files, each perhaps as SPLIT=FILE; `images`: the folder of each.

    One folder may serve several files if `pattern` tells their pictures apart, which an index alone does not.
    `pattern`: the file's name without ending, of {index} (from 0), {crc32} and {md5} of the URL. `url_first`: CC12M has
    the URL before the caption.
    """
    try:
        pattern.format(index=0, crc32=0, md5="")
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f'--pattern "{pattern}": {error!r}: use {{index}}, {{crc32}} and {{md5}}') from None
    if len(images) == 1 and ("{crc32}" in pattern or "{md5}" in pattern):
        images = [images[0]] * len(annotations)
    if len(images) != len(annotations):
        raise UserError(
            f"--annotations: {len(annotations)} files, --images: {len(images)} folders: indices begin anew in each file, "
            "so give a folder for each"
        )
    pictures = [Files(folder, output, "image") for folder in images]
    entries = _entries([split_and_file(each) for each in annotations], pictures, pattern, url_first)
    return write_import(output, entries, say, source=", ".join(annotations))


def _entries(
    annotations: Sequence[tuple[str | None, Path]], pictures: Sequence[Files], pattern: str, url_first: bool
) -> Iterator[ManifestLine | Skipped]:
    for (split, path), files in zip(annotations, pictures, strict=True):
        for index, row in enumerate(read_rows(path, "\t")):
            id = f"{path.stem}/{index}"
            if len(row) < 2:
                yield Skipped(id, f"not caption and URL: {path.name} line {index + 1}")
                continue
            url, caption = (row[0], row[1]) if url_first else (row[1], row[0])
            raw = url.encode()
            name = pattern.format(index=index, crc32=zlib.crc32(raw), md5=hashlib.md5(raw).hexdigest())
            yield sample(id, text=caption, files={"image": (f"{name} ({url})", files.by_stem(name))}, split=split)
