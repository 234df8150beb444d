"""Conceptual Captions (Sharma et al. 2018; also CC12M): TSV lines of caption and URL. Images are downloaded separately.

Many links are dead. A line without a file is reported and skipped. Files are found by a pattern of index and URL, with
any ending and in any folder. The default is img2dataset's naming (10,000 images per shard, no line dropped before).

The index is that of img2dataset: rows are counted from 0, without a header and without blank lines. Which column holds
the URLs and whether the first line is a header are inferred from the content. If img2dataset's .json or .txt is next to
an image, it must contain the URL or caption of the row.
"""

import hashlib
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from opt_ds.errors import UserError
from opt_ds.ingest.importers.common import Entry, Note, Unused, sample, split_and_file, unused_files, write_import
from opt_ds.ingest.importers.files import Files
from opt_ds.ingest.importers.sidecars import Sidecars
from opt_ds.ingest.importers.tables import Row, is_quoted_tsv, read_rows
from opt_ds.ingest.manifest import Skipped

DEFAULT_PATTERN = "{index:09d}"
_URL_STARTS = ("http://", "https://", "ftp://", "//", "data:")
_URL_NAMES = ("url", "image_url", "imageurl", "image url", "link", "urls")
_CAPTION_NAMES = ("caption", "text", "captions", "description", "title", "alt", "alt_text")
_LOOKED_AT = 1000  # rows that are read to find the columns


@dataclass(frozen=True)
class _Layout:
    """The columns of caption and URL in the rows of a file, and the number of cells per row."""

    caption: int
    url: int
    width: int
    has_header: bool
    quoted: bool


@dataclass
class _Paired:
    """Evidence for the pairing of one file with its images."""

    rows: int = 0
    found: int = 0
    sidecars: Sidecars = field(default_factory=Sidecars)


def import_conceptual_captions(
    annotations: Sequence[str],
    output: Path,
    *,
    images: Sequence[Path],
    pattern: str = DEFAULT_PATTERN,
    url_first: bool = False,
    first_index: int = 0,
) -> Path:
    """Write the manifest `output`.

    Args:
        annotations: TSV files, each FILE or SPLIT=FILE.
        output: The manifest to write.
        images: The folder of each file's images. A single folder may serve several files if `pattern` distinguishes
            their images, which an index alone does not.
        pattern: Name of an image without ending, using {index}, and {crc32} and {md5} of the URL.
        url_first: The URL comes before the caption, as in CC12M.
        first_index: Index of the first row.

    Raises:
        UserError: The pairing of rows and images would be wrong: the columns are in another order, the .json or .txt of
            the images belong to other rows, or there are images with numbers beyond the rows.
    """
    _check_pattern(pattern)
    if len(images) == 1 and _tells_urls_apart(pattern):
        images = [images[0]] * len(annotations)
    if len(images) != len(annotations):
        raise UserError(
            f"--annotations: {len(annotations)} files, --images: {len(images)} folders: indices start again in each file, "
            "so give one folder for each"
        )
    files = [split_and_file(each) for each in annotations]
    names = Counter(path.stem for _, path in files)
    if len(names) < len(files):
        raise UserError(f"--annotations: {len(files)} files, of which some have one name: ids would repeat: rename one")
    image_files = {folder: Files(folder, output, "image") for folder in images}

    def entries() -> Iterator[Entry]:
        for (split, path), folder in zip(files, images, strict=True):
            yield from _entries(path, split, image_files[folder], pattern, url_first, first_index)
        yield from unused_files(image_files.values())

    return write_import(output, entries(), source=", ".join(annotations))


def _check_pattern(pattern: str) -> None:
    try:
        same = pattern.format(index=0, crc32=0, md5="0") == pattern.format(index=1, crc32=1, md5="1")
    except (KeyError, ValueError, IndexError, AttributeError, TypeError):
        raise UserError(f'--pattern "{pattern}": use {{index}}, {{crc32}} and {{md5}}') from None
    if same:
        raise UserError(f'--pattern "{pattern}": one name for all images: use {{index}}, {{crc32}} or {{md5}}')


def _tells_urls_apart(pattern: str) -> bool:
    return "{crc32" in pattern or "{md5" in pattern


def _entries(
    path: Path, split: str | None, image_files: Files, pattern: str, url_first: bool, first_index: int
) -> Iterator[Entry]:
    layout = _layout(path, url_first, by_number=not _tells_urls_apart(pattern))
    paired = _Paired()
    for row in _body(path, layout):
        paired.rows += 1
        id, place = f"{path.stem}/{row.number}", f"{path.name} line {row.line}"
        reason = _row_error(row.cells, layout, place)
        if reason is not None:
            yield Skipped(id, reason)
            continue
        caption, url = row.cells[layout.caption], row.cells[layout.url]
        raw, index = url.encode(), row.number + first_index
        name = pattern.format(index=index, crc32=zlib.crc32(raw), md5=hashlib.md5(raw).hexdigest())
        found = image_files.by_stem(name)
        if isinstance(found, str):
            paired.found += 1
            wrong = paired.sidecars.contradiction(image_files, found, row.number, caption, url)
            if wrong is not None:
                yield Skipped(id, f"the image belongs to another row: {place}: {wrong}")
                continue
        yield sample(id, text=caption, files={"image": (f"{name} ({url})", found)}, split=split)
    paired.sidecars.check(path, first_index)
    if layout.width > 2:
        yield Unused("columns", layout.width - 2, why=f"of {path.name}: only caption and URL are read")
    if not _tells_urls_apart(pattern) and paired.found and not paired.sidecars.checked:
        _check_numbers(path, image_files, pattern, paired.rows + first_index, first_index)
        first = "line 2, after the header" if layout.has_header else "the first line"
        yield Note(f"{path.name}: {paired.found} images were paired by their numbers alone: {first_index} is {first}")


def _body(path: Path, layout: _Layout) -> Iterator[Row]:
    """Yield the rows without the header, numbered as img2dataset numbers images."""
    for row in read_rows(path, "\t", quoted=layout.quoted):
        if row.number or not layout.has_header:
            yield Row(row.number - layout.has_header, row.line, row.cells)


def _row_error(cells: list[str], layout: _Layout, place: str) -> str | None:
    if len(cells) != layout.width:
        return f"not caption and URL: {place}: {len(cells)} cells, not {layout.width}"
    if any("\0" in cell for cell in cells):
        return f"not caption and URL: {place}: a NUL character in it"
    if not _is_url(cells[layout.url]):
        return f"not caption and URL: {place}: no URL in column {layout.url + 1}"
    if _is_url(cells[layout.caption]):
        return f"not caption and URL: {place}: the caption is a URL"
    return None


def _layout(path: Path, url_first: bool, *, by_number: bool) -> _Layout:
    """Find the columns by the header, if there is one, or by `url_first`. The content of the rows must agree."""
    quoted = is_quoted_tsv(path)
    rows = [row.cells for row in islice(read_rows(path, "\t", quoted=quoted), _LOOKED_AT)]
    if not rows:
        raise UserError(f"{path}: the file has no lines")
    names = [cell.strip().lower() for cell in rows[0]]
    holds_url = any(map(_is_url, rows[0]))
    has_header = not holds_url and any(name in _URL_NAMES + _CAPTION_NAMES for name in names)
    if not holds_url and not has_header and by_number and len(rows) > 1:
        raise UserError(
            f"{path} line 1: no URL, so it is unclear whether it is a header, which would not be counted: call its "
            "columns caption and url, or correct the line"
        )
    url, caption = (0, 1) if url_first else (1, 0)
    if has_header and set(names) & set(_URL_NAMES) and set(names) & set(_CAPTION_NAMES):
        url = next(place for place, name in enumerate(names) if name in _URL_NAMES)
        caption = next(place for place, name in enumerate(names) if name in _CAPTION_NAMES)
    body = rows[has_header:]
    width = Counter(map(len, body)).most_common(1)[0][0] if body else len(names)
    width = max(width, url + 1, caption + 1)
    _check_columns(path, body, url, caption, url_first)
    return _Layout(caption, url, width, has_header, quoted)


def _check_columns(path: Path, rows: list[list[str]], url: int, caption: int, url_first: bool) -> None:
    holding = Counter(place for cells in rows for place, cell in enumerate(cells) if _is_url(cell))
    if holding[url] >= max(1, holding[caption]):
        return
    if holding[caption]:
        fix = "leave out --url-first" if url_first else "add --url-first"
        raise UserError(f"{path}: the URLs are in column {caption + 1}, not in column {url + 1}: {fix}")
    raise UserError(f"{path}: column {url + 1} holds no URL (http://…): give a TSV file of caption, tab and URL")


def _check_numbers(path: Path, image_files: Files, pattern: str, end: int, first_index: int) -> None:
    """Refuse images with numbers beyond the rows. They show that the images were downloaded with other rows."""
    beyond = [
        stem
        for stem in image_files.stems()
        if stem.isdecimal() and stem.isascii() and int(stem) >= end and pattern.format(index=int(stem)) == stem
    ]
    if beyond:
        raise UserError(
            f"{path}: its rows have the numbers {first_index} to {end - 1}, but {image_files.folder} holds "
            f"{len(beyond)} images beyond them, such as {min(beyond)}: give the table that they were downloaded with, or "
            "the first row's number with --first-index"
        )


def _is_url(cell: str) -> bool:
    return cell.strip().strip('"').lower().startswith(_URL_STARTS)
