"""The manifest: one JSON object per line, one line per sample.

This module validates manifests and assigns lines to shards and splits. A line that cannot be used is rejected with a
reason, and the others are kept.
"""

import hashlib
import json
import os.path
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from opt_ds.decoding.file_kinds import HEAD_BYTES, TABLE, format_of_content, format_of_name
from opt_ds.decoding.tar_members import file_on_disk, member_reference
from opt_ds.errors import UserError, did_you_mean
from opt_ds.ingest.text_files import JsonError, byte_lines, open_bytes, parse_json
from opt_ds.store.files import atomic_file
from opt_ds.store.schema import check_split_names

DEFAULT_SPLITS = ("train", "valid")
_VALID_PERCENT = 5
_WORDS = {
    "text": ("caption", "captions", "sentence", "sentences", "transcript", "transcription"),
    "image": ("path", "file", "file_name", "filename", "file_path", "filepath", "img", "picture", "photo"),
    "audio": ("wav", "sound", "speech", "recording", "audio_filepath"),
    "labels": ("label", "class", "classes", "category"),
}  # names of the fields in other collections
_FIELD_OF_WORD = {word: name for name, words in _WORDS.items() for word in words}
#: The fields of the built-in modalities that name files.
FILE_FIELDS = ("image", "audio")
_NAMES = ("id", "group", "split")  # fields that may be integers, which are converted to text


class ManifestLine(BaseModel):
    """A sample: `id`, and any of text, labels, group, split and files (image, audio, further modalities).

    Files are relative to the manifest's folder. A file may be a member of a tar (see opt_ds/decoding/tar_members.py).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=False)

    id: str
    image: str | None = None
    text: str | None = None
    audio: str | None = None
    labels: tuple[str, ...] = ()
    group: str | None = None
    split: str | None = None
    #: Further modality -> file. A manifest has a field per modality; the canonical JSON of the fields above stays as it was.
    further: dict[str, str] = Field(default_factory=dict, exclude=True)

    def file(self, kind: str) -> str | None:
        """Return the file of a modality (not text); None if the line names none."""
        name: str | None = getattr(self, kind) if kind in FILE_FIELDS else self.further.get(kind)
        return name

    def files(self) -> dict[str, str]:
        """Return modality -> file."""
        return {kind: name for kind in FILE_FIELDS if (name := self.file(kind)) is not None} | self.further

    def canonical(self) -> bytes:
        """Return the JSON that a manifest's hash is computed over. Raise ValueError for half of a surrogate pair."""
        further = json.dumps(self.further, sort_keys=True, ensure_ascii=False) if self.further else ""
        return self.model_dump_json().encode() + further.encode()

    @property
    def group_name(self) -> str:
        """The explicit group.

        Without one, lines that share an image form a group, and any other line is its own group.
        """
        if self.group is not None:
            return self.group
        return f"image {self.image}" if self.image is not None else f"id {self.id}"


#: The fields of every manifest.
FIELDS = tuple(name for name in ManifestLine.model_fields if name != "further")


@dataclass(frozen=True)
class Skipped:
    """A sample that is not used: its id (or "line 7" if it has no usable one), and the reason."""

    id: str
    reason: str


@dataclass(frozen=True)
class Manifest:
    """A validated manifest. `splits` holds one split name per line; `splits_source` is their origin.

    `rejected` holds the lines that are not samples. They are not in `lines`. `further` are the modalities besides text,
    image and audio that lines may name files of.
    """

    path: Path
    lines: list[ManifestLine]
    splits: list[str]
    split_names: list[str]
    splits_source: Literal["manifest", "group hash"]
    sha256: str
    rejected: list[Skipped] = field(default_factory=list)
    further: tuple[str, ...] = ()

    @property
    def file_kinds(self) -> tuple[str, ...]:
        """The modalities that lines name files of."""
        return (*FILE_FIELDS, *self.further)

    @property
    def folder(self) -> Path:
        """The folder that the files of the lines are relative to."""
        return self.path.parent

    @property
    def label_names(self) -> list[str]:
        """All labels, sorted."""
        return sorted({label for line in self.lines for label in line.labels})

    def shards(self, samples_per_shard: int) -> list[list[int]]:
        """Partition the lines into shards, as lists of line indices.

        Lines that share an image are adjacent in one shard.
        """
        first_line: dict[str, int] = {}
        place = [first_line.setdefault(line.image or f"\0{index}", index) for index, line in enumerate(self.lines)]
        shards: list[list[int]] = []
        for index in sorted(range(len(self.lines)), key=lambda line: (place[line], line)):
            full = not shards or len(shards[-1]) >= samples_per_shard
            if full and (not shards or place[shards[-1][-1]] != place[index]):
                shards.append([])
            shards[-1].append(index)
        return shards


def read_manifest(
    path: Path,
    *,
    limit: int | None = None,
    strict: bool = False,
    allow_outside: bool = False,
    further: Sequence[str] = (),
) -> Manifest:
    """Read and validate a manifest, gzipped or not.

    A line is rejected if it is not UTF-8 or JSON, has unknown or missing fields, a repeated id or no modality, or,
    unless `allow_outside`, a file outside the manifest's folder (links inside it are followed).

    Args:
        path: The manifest.
        limit: Stop after this many valid samples.
        strict: Raise UserError for the first line that is rejected.
        allow_outside: Accept files outside the manifest's folder.
        further: Modalities besides text, image and audio. Each is an optional field that names a file.

    Raises:
        UserError: No line is left, or only some lines have a split.
    """
    if not path.is_file():
        raise UserError(f"{path}: {'is a folder, not a manifest' if path.is_dir() else 'no such manifest'}")
    _check_is_manifest(path)
    lines: list[ManifestLine] = []
    rejected: list[Skipped] = []
    seen: dict[str, int] = {}  # id -> line number
    digest = hashlib.sha256()
    for number, raw in _raw_lines(path):
        try:
            line, canonical = _parse(raw, further)
            _check_line(line, seen, path.parent, allow_outside)
        except _LineError as error:
            if strict:
                raise UserError(f"{path} line {number}: {error} (--strict stops at the first)") from None
            rejected.append(Skipped(error.id or f"line {number}", f"not a sample: line {number}: {error}"))
            continue
        seen[line.id] = number
        lines.append(line)
        digest.update(canonical + b"\n")
        if limit is not None and len(lines) >= limit:
            break
    if not lines:
        why = f"no line can be used; {rejected[0].reason}" if rejected else "the manifest has no lines"
        raise UserError(f"{path}: {why}")
    named = sum(line.split is not None for line in lines)
    if named not in (0, len(lines)):
        without = next(line.id for line in lines if line.split is None)
        raise UserError(f'{path}: id "{without}" has no "split" although others have one: name it on all lines or on none')
    splits = [line.split or _hashed_split(line.group_name) for line in lines]
    names = list(DEFAULT_SPLITS) if not named else sorted(set(splits), key=lambda name: (name != "train", name))
    check_split_names(names, str(path))
    source: Literal["manifest", "group hash"] = "manifest" if named else "group hash"
    return Manifest(path, lines, splits, names, source, digest.hexdigest(), rejected, tuple(further))


def write_manifest(path: Path, lines: Iterator[ManifestLine] | list[ManifestLine]) -> int:
    """Write a manifest atomically. Return the number of lines."""
    count = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for line in lines:
            fields = {**line.model_dump(exclude_defaults=True), **line.further}
            file.write(json.dumps(fields, ensure_ascii=False) + "\n")
            count += 1
    return count


def groups_across_splits(manifest: Manifest) -> int:
    """Return the number of groups with samples in more than one split."""
    pairs = {(line.group_name, split) for line, split in zip(manifest.lines, manifest.splits, strict=True)}
    return sum(count > 1 for count in Counter(group for group, _ in pairs).values())


def _check_is_manifest(path: Path) -> None:
    """Raise UserError for a table, an image or another file that is known not to be a manifest.

    A file that begins with "{" is accepted here.
    """
    with open(path, "rb") as file:
        _refuse_tar(path, file.read(HEAD_BYTES))
    with open_bytes(path) as file:
        head = file.read(HEAD_BYTES)
    _refuse_tar(path, head)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
        return
    found = format_of_content(head) or format_of_name(path.with_suffix("") if path.suffix.lower() == ".gz" else path)
    if found == TABLE or head.startswith(b"PAR1"):
        raise UserError(
            f"{path}: a table, not a manifest: opt-ds import table {path} --output manifest.jsonl makes a manifest of it"
        )
    if found is not None and found.kind in ("image", "audio", "video"):
        raise UserError(
            f"{path}: a file of the format {found.name}, not a manifest: give a manifest (JSONL, one sample per line), or the "
            "folder that holds the files"
        )


def _refuse_tar(path: Path, head: bytes) -> None:
    found = format_of_content(head)
    if found is not None and found.name == "tar":
        raise UserError(
            f"{path}: a tar, not a manifest: opt-ds import webdataset {path} --output manifest.jsonl makes a manifest of it"
        )


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with open_bytes(path) as file:
        yield from byte_lines(file)


class _LineError(Exception):
    """What is wrong with a line. `id` is the id of the line if it is usable."""

    def __init__(self, message: str, id: object = None) -> None:
        super().__init__(message)
        name = _name(id)
        self.id = name if name and is_encodable(name) else None


def _parse(raw: bytes, further: Sequence[str]) -> tuple[ManifestLine, bytes]:
    """Return the line, and its canonical JSON."""
    try:
        fields = parse_json(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _LineError(f"not UTF-8 text (byte {error.start})") from None
    except JsonError as error:
        raise _LineError(f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise _LineError("not a JSON object: write one sample per line")
    own_id = fields.get("id")
    unknown = [key for key in fields if key not in FIELDS and key not in further]
    if unknown:
        meant = _FIELD_OF_WORD.get(unknown[0].strip().lower())
        near = f' (did you mean "{meant}"?)' if meant else did_you_mean(unknown[0], (*FIELDS, *further))
        raise _LineError(f'unknown field "{_shown(unknown[0])}"{near}', own_id)
    if own_id is None:
        raise _LineError("field id: it is missing: every sample needs one")
    values = {name: _value(name, value, own_id) for name, value in fields.items()}
    files = {name: values.pop(name) for name in further if name in values}
    line = ManifestLine.model_validate({**values, "further": {name: file for name, file in files.items() if file is not None}})
    if not line.id:
        raise _LineError("field id: it is empty")
    if line.text is None and not line.files():
        raise _LineError(f"none of {', '.join(('image', 'text', 'audio', *further))}: a sample needs at least one", own_id)
    try:
        return line, line.canonical()
    except ValueError:
        raise _LineError("it contains half of a surrogate pair, which is not valid text", own_id) from None


def _value(name: str, value: Any, id: object) -> Any:
    """Return the value of a field in ManifestLine's type.

    Integers that are names become text, null labels an empty tuple.
    """
    if name == "labels":
        if value is None:
            return ()
        labels = [_name(label) for label in value] if isinstance(value, list) else [None]
        if None in labels:
            raise _LineError('field labels: give a list of names, such as ["cat"]', id)
        return tuple(labels)
    if value is None:
        return None
    text = _name(value) if name in _NAMES else value
    if not isinstance(text, str):
        what = "a text" if name == "text" else "a name" if name in _NAMES else "a file's name"
        raise _LineError(f"field {name}: give {what} in quotes", id)
    return text


def _name(value: Any) -> str | None:
    """Return a name as text, also if it is an integer; None for anything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) else None


def _check_line(line: ManifestLine, seen: dict[str, int], folder: Path, allow_outside: bool) -> None:
    if line.id in seen:
        raise _LineError(f'id "{line.id}" is also on line {seen[line.id]}: ids must differ', line.id)
    for kind, name in line.files().items():
        if kind not in FILE_FIELDS and member_reference(name) is not None:
            raise _LineError(f'{kind} "{name}" is in a tar: only {" and ".join(FILE_FIELDS)} can be read there', line.id)
        if not allow_outside and not _is_inside(file_on_disk(name), folder):
            raise _LineError(f'{kind} "{name}" is outside the manifest\'s folder (--allow-outside)', line.id)


def _is_inside(name: Path, folder: Path) -> bool:
    top = os.path.abspath(folder)
    return os.path.abspath(os.path.join(top, name)).startswith(top.rstrip(os.sep) + os.sep)


def visible(text: str) -> str:
    """Return the text with control and direction characters escaped, so that an id cannot repaint the terminal."""
    return "".join(letter if letter.isprintable() else f"\\u{ord(letter):04x}" for letter in text)


def is_encodable(text: str) -> bool:
    """Return whether the text has no unpaired surrogate, which no file or terminal accepts."""
    return text == _shown(text)


def _shown(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _hashed_split(group: str) -> str:
    digest = hashlib.blake2b(f"split {group}".encode(), digest_size=8).digest()
    return "valid" if int.from_bytes(digest, "little") % 100 < _VALID_PERCENT else "train"
