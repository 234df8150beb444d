"""The manifest: one JSON object a line, one line a sample. What may be in it, and how lines form shards and splits."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from opt_ds.errors import UserError, did_you_mean

DEFAULT_SPLITS = ("train", "valid")
_VALID_PERCENT = 5


class ManifestLine(BaseModel):
    """A sample: `id`, and any of image, text, audio (files relative to the manifest's folder), labels, group, split."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=False)

    id: str
    image: str | None = None
    text: str | None = None
    audio: str | None = None
    labels: tuple[str, ...] = ()
    group: str | None = None
    split: str | None = None

    @property
    def group_name(self) -> str:
        """The named group; else lines that share a picture are one group, and any other line is alone."""
        if self.group is not None:
            return self.group
        return f"image {self.image}" if self.image is not None else f"id {self.id}"


@dataclass(frozen=True)
class Manifest:
    """A checked manifest. `splits` holds one split name per line, `splits_source` where they come from."""

    path: Path
    lines: list[ManifestLine]
    splits: list[str]
    split_names: list[str]
    splits_source: Literal["manifest", "group hash"]
    sha256: str

    @property
    def folder(self) -> Path:
        """What the lines' files are relative to."""
        return self.path.parent

    @property
    def label_names(self) -> list[str]:
        """All labels, sorted."""
        return sorted({label for line in self.lines for label in line.labels})

    def shards(self, samples_per_shard: int) -> list[list[int]]:
        """Cut the lines into shards: lists of line indices. Lines that share a picture are neighbours in one shard."""
        first_line: dict[str, int] = {}
        place = [first_line.setdefault(line.image or f"\0{index}", index) for index, line in enumerate(self.lines)]
        shards: list[list[int]] = []
        for index in sorted(range(len(self.lines)), key=lambda line: (place[line], line)):
            full = not shards or len(shards[-1]) >= samples_per_shard
            if full and (not shards or place[shards[-1][-1]] != place[index]):
                shards.append([])
            shards[-1].append(index)
        return shards


def read_manifest(path: Path, *, limit: int | None = None) -> Manifest:
    """Read and check a manifest, at most its first `limit` samples.

    Raises UserError, naming the line, for bad JSON, unknown or missing fields, a repeated id, a line without any
    modality, and a manifest that names the split on some lines only.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such manifest")
    lines: list[ManifestLine] = []
    seen: dict[str, int] = {}  # id -> line number
    digest = hashlib.sha256()
    with open(path, encoding="utf-8-sig") as file:
        for number, text in enumerate(_decoded(file, path), 1):
            if not text.strip():
                continue
            line = _parse(text, f"{path} line {number}")
            if line.id in seen:
                raise UserError(
                    f'{path} line {number}: id "{line.id}" is also on line {seen[line.id]}: ids must differ'
                )
            seen[line.id] = number
            lines.append(line)
            digest.update(line.model_dump_json().encode() + b"\n")
            if limit is not None and len(lines) >= limit:
                break
    if not lines:
        raise UserError(f"{path}: the manifest has no lines")
    named = sum(line.split is not None for line in lines)
    if named not in (0, len(lines)):
        without = next(line.id for line in lines if line.split is None)
        raise UserError(f'{path}: id "{without}" has no "split" though others have: name it on all lines or on none')
    splits = [line.split or _hashed_split(line.group_name) for line in lines]
    names = list(DEFAULT_SPLITS) if not named else sorted(set(splits), key=lambda name: (name != "train", name))
    return Manifest(path, lines, splits, names, "manifest" if named else "group hash", digest.hexdigest())


def groups_across_splits(manifest: Manifest) -> int:
    """Return how many groups have samples in more than one split."""
    pairs = {(line.group_name, split) for line, split in zip(manifest.lines, manifest.splits, strict=True)}
    return sum(count > 1 for count in Counter(group for group, _ in pairs).values())


def _decoded(file, path: Path):
    try:
        yield from file
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def _parse(text: str, where: str) -> ManifestLine:
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise UserError(f"{where}: not a JSON object: one sample a line")
    unknown = [key for key in fields if key not in ManifestLine.model_fields]
    if unknown:
        raise UserError(f'{where}: unknown field "{unknown[0]}"{did_you_mean(unknown[0], ManifestLine.model_fields)}')
    try:
        line = ManifestLine.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{where}: field {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if line.image is None and line.text is None and line.audio is None:
        raise UserError(f"{where}: none of image, text, audio: a sample needs at least one")
    return line


def _hashed_split(group: str) -> str:
    digest = hashlib.blake2b(f"split {group}".encode(), digest_size=8).digest()
    return "valid" if int.from_bytes(digest, "little") % 100 < _VALID_PERCENT else "train"
