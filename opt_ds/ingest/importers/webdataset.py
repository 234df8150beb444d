"""WebDataset: tar files whose members `key.jpg`, `key.txt`, `key.json` and `key.flac` are one sample, read in place.

A member's key is its path up to the first dot of its name. The rest, in lower case, is its ending. img2dataset writes
`key.jpg`, `key.txt` with the caption, and `key.json` with caption, url and more; other collections add audio. Texts are
read into the manifest. Images and audio stay in the tars: the manifest refers to them (opt_ds/decoding/tar_members.py).
"""

import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from opt_ds.decoding.file_kinds import HEAD_BYTES, format_of_content, is_clutter, kind_of_name, why_not_decodable
from opt_ds.decoding.reasons import BrokenFileError
from opt_ds.decoding.tar_members import (
    JoinedTarError,
    MemberReference,
    TarMember,
    content_blocks,
    iterate_members,
    plain_name,
)
from opt_ds.errors import UserError, did_you_mean
from opt_ds.ingest.importers.captions import captions_of, samples_of_captions
from opt_ds.ingest.importers.common import Entry, Note, Unused, guarded, write_import
from opt_ds.ingest.importers.files import Found, Problem
from opt_ds.ingest.importers.shards import Shard, find_shards, named_together
from opt_ds.ingest.manifest import ManifestLine, Skipped, is_encodable
from opt_ds.ingest.text_files import JsonError, parse_json
from opt_ds.user_files import decode_text

_FIELDS = ("image", "audio", "text", "labels")
_MEDIA = ("image", "audio")
_TEXT_ENDINGS = ("txt", "text", "transcript", "caption")
_JSON_ENDINGS = ("json", "jsn")
#: Fields of a .json member that hold the text, if the sample has no text member. The first one that is not null is used.
_TEXT_FIELDS = ("caption", "captions", "text", "texts", "transcript", "transcription", "sentence")
_MOST_TEXT_BYTES = 16 * 2**20
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")  # found in a folder in order to refuse them
_ZSTD = b"\x28\xb5\x2f\xfd"


@dataclass
class _Parts:
    """The members of a key: ending -> member. `problem` is why the key is not a sample."""

    members: dict[str, TarMember] = field(default_factory=dict)
    problem: str | None = None


@dataclass
class _Usage:
    """What all tars hold: members by ending, those that were used, fields of .json members, and samples by modalities."""

    endings: Counter[str] = field(default_factory=Counter)
    used: Counter[str] = field(default_factory=Counter)
    fields: set[str] = field(default_factory=set)
    used_fields: set[str] = field(default_factory=set)
    without_key: list[str] = field(default_factory=list)
    apart: list[str] = field(default_factory=list)  # tars whose members of a sample are not adjacent
    held: Counter[str] = field(default_factory=Counter)


class _NotUsableError(Exception):
    """Why a sample is not used."""


def import_webdataset(
    shards: Sequence[str], output: Path, *, members: Sequence[str] = (), last_dot: bool = False
) -> Path:
    """Write the manifest `output` for tar files, without unpacking them.

    A sample's id is `SHARD/KEY`. A member that is named twice, a link, a sparse or truncated member, and a name that leaves
    the tar skip their sample. Of a truncated tar, the samples before the end are used.

    Args:
        shards: [SPLIT=]PATTERN of the tars, with braces or `*`, or a folder of them (see shards.py).
        output: The manifest to write.
        members: FIELD=ENDING, or FIELD=ENDING:KEY for a field of a .json member, such as "image=png", "text=json:caption".
        last_dot: The key ends at the last dot of a name, not at the first.

    Raises:
        UserError: A shard is missing, compressed or not a tar, or `members` is invalid.
    """
    chosen = _parse_members(members)
    found = find_shards(shards, (".tar", *_COMPRESSED))
    for shard in found:
        _check_is_tar(shard.path)

    def entries() -> Iterator[Entry]:
        usage = _Usage()
        for shard in found:
            yield from _entries(shard, output.parent.resolve(), chosen, last_dot, usage)
        yield from _remarks(usage, last_dot)

    return write_import(output, entries(), source=named_together(shards))


def _parse_members(members: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return field -> (ending, field of a .json member or "")."""
    chosen: dict[str, tuple[str, str]] = {}
    for each in members:
        name, _, source = each.partition("=")
        ending, _, key = source.partition(":")
        ending = ending.lower().removeprefix(".")
        if name not in _FIELDS or not ending:
            near = did_you_mean(name, _FIELDS)
            raise UserError(f'--member "{each}": write FIELD=ENDING, such as image=png{near}: one of {", ".join(_FIELDS)}')
        if bool(key) != _is_json(ending) or (key and name in _MEDIA):
            raise UserError(f'--member "{each}": name a field of a .json member for a text or labels, such as text=json:caption')
        if name in chosen:
            raise UserError(f"--member {name}=… is given twice: give it once")
        chosen[name] = (ending, key)
    return chosen


def _is_json(ending: str) -> bool:
    return ending.split(".")[-1] in _JSON_ENDINGS


def _check_is_tar(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path}: {'is a folder' if path.is_dir() else 'not a regular file'}: name tar files")
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    found = format_of_content(head)
    if head.startswith(_ZSTD) or (found is not None and found.name in ("gzip", "bzip2", "xz")):
        raise UserError(f"{path}: compressed, so its members cannot be read in place: decompress it (gunzip) and name the .tar")
    if path.suffix.lower() != ".tar":
        raise UserError(f"{path}: the name of a tar must end with .tar: rename it")
    if found is not None and found.name != "tar":
        raise UserError(f"{path}: {found}, not a tar")
    if not head:
        raise UserError(f"{path}: the file is empty")


def _entries(
    shard: Shard, start: Path, chosen: dict[str, tuple[str, str]], last_dot: bool, usage: _Usage
) -> Iterator[Entry]:
    with open(shard.path, "rb") as tar:
        keys, damage = _keys(shard, tar, last_dot, usage)
        path = os.path.relpath(shard.path.parent.resolve() / shard.path.name, start)
        for key, parts in keys.items():
            id = f"{shard.name}/{key}"
            if parts.problem is not None:
                yield Skipped(id, parts.problem)
                continue
            reader = _SampleReader(shard, tar, path, chosen, parts.members)
            try:
                made = list(guarded(id, partial(reader.samples, id)))
                yield from made
                reader.add_to(usage, is_used=any(isinstance(each, ManifestLine) for each in made))
            except _NotUsableError as error:
                yield Skipped(id, str(error))
    if damage is not None:
        yield Skipped(shard.name, f"the tar is truncated or damaged: {shard.path.name}: {damage}")
    elif not keys:
        yield Skipped(shard.name, f"the tar has no members of samples: {shard.path.name}")


def _keys(shard: Shard, tar: BinaryIO, last_dot: bool, usage: _Usage) -> tuple[dict[str, _Parts], str | None]:
    """Return the members of each key, and what is wrong with the tar if it cannot be read to its end."""
    keys: dict[str, _Parts] = defaultdict(_Parts)
    last: str | None = None
    are_apart = False
    damage = None
    try:
        for member in iterate_members(tar):
            if member.kind == "folder":
                continue
            key, ending = _key_and_ending(member.name, last_dot)
            if not ending or is_clutter(member.name.removeprefix("./")):
                usage.without_key.append(member.name)
                continue
            are_apart = are_apart or (key != last and key in keys)
            last = key
            _add(keys[key], ending, member)
    except JoinedTarError as error:
        damage = str(error)
    except BrokenFileError as error:
        damage = str(error)
        if last is not None:  # its further members may be missing, or its last one may be wrong
            keys[last].problem = f"the tar is truncated or damaged: {shard.path.name}: at its last sample"
    if are_apart:
        usage.apart.append(shard.path.name)
    return dict(keys), damage


def _key_and_ending(name: str, last_dot: bool) -> tuple[str, str]:
    """Split a name into key and ending, which is lower-cased; ("", "") for a name without one of them.

    Unicode is composed, since tars made on a Mac may hold decomposed names next to composed ones.
    """
    name = unicodedata.normalize("NFC", plain_name(name) or name)
    folder, slash, last = name.rpartition("/")
    stem, _, ending = last.rpartition(".") if last_dot else last.partition(".")
    return (f"{folder}{slash}{stem}", ending.lower()) if stem and ending else ("", "")


def _add(parts: _Parts, ending: str, member: TarMember) -> None:
    problem = None
    if plain_name(member.name) is None or not is_encodable(member.name):
        problem = f"the name of a member is not usable: {member.name[:200]}"
    elif member.kind != "file":
        problem = f"a member is a {member.kind}: {member.name}"
    elif ending in parts.members:
        problem = f"two members have one name: {member.name}"
    parts.problem = parts.problem or problem
    parts.members[ending] = member


class _SampleReader:
    """Makes samples of the members of a key.

    Args:
        shard: The tar.
        tar: The tar, open.
        path: The tar, relative to the manifest.
        chosen: Field -> (ending, field of a .json member or "").
        members: Ending -> member, of one key.
    """

    def __init__(
        self,
        shard: Shard,
        tar: BinaryIO,
        path: str,
        chosen: dict[str, tuple[str, str]],
        members: dict[str, TarMember],
    ) -> None:
        self._shard, self._tar, self._path, self._chosen, self._members = shard, tar, path, chosen, members
        self._used: set[str] = set()
        self._fields: set[str] = set()
        self._used_fields: set[str] = set()
        self._held = ""

    def samples(self, id: str) -> Iterator[Entry]:
        """Yield the sample, or one per caption if it has several. Raise _NotUsableError if it cannot be used."""
        contents = self._json(next((ending for ending in _JSON_ENDINGS if ending in self._members), None))
        files: dict[str, tuple[str, Found] | None] = {
            kind: (self._members[ending].name, self._reference(self._members[ending]))
            for kind in _MEDIA
            if (ending := self._media_ending(kind)) is not None
        }
        texts = captions_of(self._text(contents), "the text")
        labels = captions_of(_labels(self._chosen_value("labels")), "the labels")
        if not files and not texts:
            raise _NotUsableError(f"no image, audio or text member: it has {', '.join(sorted(self._members))}"[:300])
        self._held = " and ".join([*files, *(["text"] if texts else [])])
        # The group does not depend on the place of the image in the tar, and so neither does its split.
        group = id if "image" in files or len(texts) > 1 else None
        yield from samples_of_captions(
            id, texts, files=files, labels=tuple(dict.fromkeys(labels)), group=group, split=self._shard.split
        )

    def add_to(self, usage: _Usage, *, is_used: bool) -> None:
        """Count what a sample has and what was used of it."""
        usage.endings.update(list(self._members))
        usage.used.update(self._used)
        usage.fields |= self._fields
        usage.used_fields |= self._used_fields
        usage.held.update([self._held] if is_used else [])

    def _media_ending(self, kind: str) -> str | None:
        if kind in self._chosen:
            ending = self._chosen[kind][0]
            if ending not in self._members:
                return None
        else:
            fitting = [ending for ending in self._members if kind_of_name(f"x.{ending}") == kind]
            fitting = [ending for ending in fitting if "." not in ending] or fitting
            if not fitting:
                return None
            if len(fitting) > 1:
                names = " and ".join(self._members[each].name for each in fitting[:2])
                raise _NotUsableError(f"several {kind} members: {names}: choose one with --member {kind}=…, or use --last-dot")
            ending = fitting[0]
        self._used.add(ending)
        return ending

    def _reference(self, member: TarMember) -> Found:
        start = replace(member, size=min(HEAD_BYTES, member.size))
        reason = why_not_decodable(member.name, b"".join(content_blocks(self._tar, start)))
        if reason is not None:
            what, _, advice = reason.partition(": ")
            return Problem(f"{what}: {member.name}: {advice}")
        return str(MemberReference(self._path, plain_name(member.name) or "", member.offset, member.size))

    def _text(self, contents: dict[str, Any]) -> Any:
        if "text" in self._chosen:
            return self._chosen_value("text")
        ending = next((ending for ending in _TEXT_ENDINGS if ending in self._members), None)
        if ending is not None:
            return self._read(ending).strip()
        name = next((name for name in _TEXT_FIELDS if contents.get(name) is not None), None)
        if name is None:
            return None
        self._used_fields.add(name)
        return contents[name]

    def _chosen_value(self, name: str) -> Any:
        ending, key = self._chosen.get(name, ("", ""))
        if ending not in self._members:
            return None
        if not key:
            return self._read(ending).strip()
        self._used_fields.add(key)
        return self._json(ending).get(key)

    def _json(self, ending: str | None) -> dict[str, Any]:
        if ending is None:
            return {}
        name = self._members[ending].name
        try:
            content = parse_json(self._read(ending))
        except JsonError as error:
            raise _NotUsableError(f"not JSON: {name}: {error}") from None
        if not isinstance(content, dict):
            raise _NotUsableError(f"not JSON: {name}: not an object")
        self._fields |= content.keys()
        return content

    def _read(self, ending: str) -> str:
        member = self._members[ending]
        self._used.add(ending)
        if member.size > _MOST_TEXT_BYTES:
            raise _NotUsableError(f"a text is too large: {member.name}: {member.size} bytes, {_MOST_TEXT_BYTES} are allowed")
        try:
            text = decode_text(b"".join(content_blocks(self._tar, member)))
        except UnicodeDecodeError:
            raise _NotUsableError(f"the text is not UTF-8: {member.name}") from None
        if "\0" in text:
            raise _NotUsableError(f"a NUL character is in the text: {member.name}")
        return text


def _labels(value: Any) -> Any:
    """Return labels that are numbers as texts."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    return [str(each) if isinstance(each, int) else each for each in values]


def _remarks(usage: _Usage, last_dot: bool) -> Iterator[Entry]:
    """Yield what was not used, and findings about all tars."""
    left = usage.endings - usage.used
    for endings, why in (
        ([ending for ending in left if not usage.used[ending]], "--member FIELD=ENDING uses others"),
        ([ending for ending in left if usage.used[ending]], "of samples that have another member for that"),
    ):
        if endings:
            names = tuple(f".{ending} ({left[ending]})" for ending in sorted(endings))
            yield Unused("members", sum(left[ending] for ending in endings), names, why)
    fields = sorted(usage.fields - usage.used_fields)
    if fields:
        yield Unused("fields", len(fields), tuple(fields), "of .json members")
    if usage.without_key:
        why = f"hidden, or not of the form KEY.ENDING, up to the {'last' if last_dot else 'first'} dot"
        yield Unused("members", len(usage.without_key), tuple(usage.without_key), why)
    if len(usage.held) > 1:
        yield Note("samples with " + ", ".join(f"{what}: {count}" for what, count in usage.held.most_common()))
    if usage.apart:
        first = ", ".join(usage.apart[:3]) + (", …" if len(usage.apart) > 3 else "")
        yield Note(f"tars whose members of a sample are not adjacent, but were joined by key: {len(usage.apart)} ({first})")
