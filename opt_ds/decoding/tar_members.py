"""Members of uncompressed tar files, read in place by a reference such as `shards/00000.tar#000001.jpg@1536+20480`.

A reference states the tar, the member, the byte at which the member's headers begin, and the size of its content. It is
checked whenever it is read: the headers at that byte must name the same member with the same size. Nothing is unpacked.

Only the blocks of a header are parsed by `tarfile`. Its own iteration ends without an error at a damaged header, and
reads names and extended headers of any size into memory.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from opt_ds.decoding.reasons import BrokenFileError

BLOCK_BYTES = 512
MemberKind = Literal["file", "folder", "link", "sparse file", "special file"]
_MOST_HEADERS, _MOST_HEADER_BYTES = 16, 2**20  # extended headers of one member
_LONGEST_NAME, _LONGEST_REFERENCE = 1000, 6000  # a path of Linux has at most 4,096 bytes
_REFERENCE = re.compile(r"(.+\.tar)#(.+)@([0-9]{1,18})\+([0-9]{1,18})", re.DOTALL | re.IGNORECASE)
_BETWEEN = ".tar#"  # what ends the tar's name in a reference
_UNUSABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # control characters; bytes that are not UTF-8
_RECORD = re.compile(rb"([0-9]{1,7}) ([^=\n]+)=")
_LONG_NAME, _LONG_LINK, _GLOBAL = b"L", b"K", b"g"
_EXTENDED = (b"x", b"X")
_SPARSE = b"S"
_MAP_CONTINUES, _MAP_CONTINUES_AGAIN = 482, 504  # byte in the header of a sparse member, and in the further blocks of its map
_KINDS: dict[bytes, MemberKind] = {
    b"0": "file", b"\0": "file", b"7": "file", b"5": "folder", b"1": "link", b"2": "link", b"S": "sparse file",
}  # fmt: skip


class JoinedTarError(BrokenFileError):
    """More follows after the end marker of a tar, as in joined tars. The members before it are complete."""


@dataclass(frozen=True)
class MemberReference:
    """The place of a member: path of the tar, name, first byte of the headers, bytes of the content."""

    tar: str
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.tar}#{self.name}@{self.offset}+{self.size}"


@dataclass(frozen=True)
class TarMember:
    """A member as its headers describe it: name, kind, first byte of the headers and of the content, bytes of the content."""

    name: str
    kind: MemberKind
    offset: int
    content_offset: int
    size: int

    @property
    def end(self) -> int:
        """Return the byte at which the next member's headers begin."""
        return self.content_offset + -(-self.size // BLOCK_BYTES) * BLOCK_BYTES


def member_reference(path: str | os.PathLike[str]) -> MemberReference | None:
    """Return the reference that a path is; None for the path of an ordinary file."""
    text = os.fspath(path)
    match = _REFERENCE.fullmatch(text) if len(text) <= _LONGEST_REFERENCE else None
    return MemberReference(match[1], match[2], int(match[3]), int(match[4])) if match else None


def file_on_disk(path: str | os.PathLike[str]) -> Path:
    """Return the file to open for a path: the tar of a reference, otherwise the path itself."""
    reference = member_reference(path)
    return Path(path if reference is None else reference.tar)


def shown_name(path: str | os.PathLike[str]) -> str:
    """Return the name of a file for messages, without its folder: `cat.jpg`, or `00000.tar#cat.jpg` for a reference."""
    reference = member_reference(path)
    return Path(path).name if reference is None else f"{Path(reference.tar).name}#{reference.name}"


def plain_name(name: str) -> str | None:
    """Return a member's name without a leading "./", as references have it.

    Return None for a name that is absolute, leaves the tar, or cannot be part of a reference.
    """
    name = re.sub(r"\A(\./)+", "", name)
    is_plain = not {"", ".", ".."} & set(name.split("/")) and not _UNUSABLE.search(name) and _BETWEEN not in name.lower()
    return name if is_plain and len(name) <= _LONGEST_NAME else None


def find_member(file: BinaryIO, reference: MemberReference) -> TarMember:
    """Return the member of an open tar that a reference states. Raise BrokenFileError if another one is there."""
    tar = Path(reference.tar).name
    try:
        member = read_member(file, reference.offset)
    except BrokenFileError:
        member = None
    if member is None or member.kind != "file" or (plain_name(member.name), member.size) != (reference.name, reference.size):
        raise BrokenFileError(f"{tar} does not have it at byte {reference.offset}: import the tar again if it has changed")
    if member.content_offset + member.size > os.fstat(file.fileno()).st_size:
        raise BrokenFileError(f"{tar} is truncated")
    return member


def content_blocks(file: BinaryIO, member: TarMember) -> Iterator[bytes]:
    """Yield the content of a member block by block. Raise BrokenFileError if the tar ends before it does."""
    offset, end = member.content_offset, member.content_offset + member.size
    while offset < end:
        block = os.pread(file.fileno(), min(end - offset, 2**20), offset)
        if not block:
            raise BrokenFileError("the tar is truncated")
        yield block
        offset += len(block)


def iterate_members(file: BinaryIO) -> Iterator[TarMember]:
    """Yield the members of an open tar, in order.

    Raise BrokenFileError where it is truncated or damaged, also if its end marker is missing, and JoinedTarError if more
    follows after the end marker.
    """
    size, offset = os.fstat(file.fileno()).st_size, 0
    while (member := read_member(file, offset)) is not None:
        if member.content_offset + member.size > size:
            raise BrokenFileError(f"it ends inside of the member {member.name[:100]} of {member.size} bytes")
        yield member
        offset = member.end
    while offset < size:
        block = os.pread(file.fileno(), 2**20, offset)
        if block.strip(b"\0"):
            raise JoinedTarError("more follows after its end marker, as in joined tars, which is not read")
        offset += len(block) or size


def read_member(file: BinaryIO, offset: int) -> TarMember | None:
    """Return the member whose headers begin at a byte of an open tar; None for the end marker.

    Raise BrokenFileError if no valid header is there.
    """
    start, name, size = offset, None, None
    is_sparse = False
    for _ in range(_MOST_HEADERS):
        block = os.pread(file.fileno(), BLOCK_BYTES, offset)
        if offset == start and len(block) == BLOCK_BYTES and not any(block):
            return None
        header = _parse_block(block, offset)
        offset += BLOCK_BYTES
        if header.type not in (_LONG_NAME, _LONG_LINK, _GLOBAL, *_EXTENDED):
            size = header.size if size is None else size
            kind = "sparse file" if is_sparse else _KINDS.get(header.type, "special file")
            if kind == "file" and header.name.endswith("/"):  # as the oldest tars write folders
                kind = "folder"
            offset = _after_sparse_map(file, block, offset) if header.type == _SPARSE else offset
            has_content = kind in ("file", "sparse file", "special file")
            return TarMember(header.name if name is None else name, kind, start, offset, size if has_content else 0)
        content = _header_content(file, offset, header)
        offset += -(-header.size // BLOCK_BYTES) * BLOCK_BYTES
        if header.type == _LONG_NAME:
            name = _text(content.split(b"\0")[0])
        elif header.type != _LONG_LINK:
            records = _records(content)
            is_sparse = is_sparse or any(key.startswith("GNU.sparse.") for key in records)
            if header.type == _GLOBAL and (is_sparse or records.keys() & {"path", "size"}):
                raise BrokenFileError("a global header changes the names or sizes of its members, which is not supported")
            name = records.get("path", name)
            size = _number(records["size"]) if "size" in records else size
    raise BrokenFileError(f"more than {_MOST_HEADERS} headers of one member at byte {start}")


def _after_sparse_map(file: BinaryIO, block: bytes, offset: int) -> int:
    """Return the first byte after the map of a sparse member, which may continue in further blocks after the header."""
    place = _MAP_CONTINUES
    while len(block) == BLOCK_BYTES and block[place]:
        block = os.pread(file.fileno(), BLOCK_BYTES, offset)
        offset, place = offset + BLOCK_BYTES, _MAP_CONTINUES_AGAIN
    return offset


def _parse_block(block: bytes, offset: int) -> tarfile.TarInfo:
    if len(block) < BLOCK_BYTES:
        raise BrokenFileError("it has no end marker: it is truncated" if not block else "it ends inside of a header")
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError, OverflowError):
        raise BrokenFileError(f"no member begins at byte {offset}, although one should: it is damaged") from None
    if header.size < 0:
        raise BrokenFileError(f"the member at byte {offset} has a negative size")
    return header


def _header_content(file: BinaryIO, offset: int, header: tarfile.TarInfo) -> bytes:
    if header.size > _MOST_HEADER_BYTES:
        raise BrokenFileError(f"the extended header at byte {offset} has {header.size} bytes, {_MOST_HEADER_BYTES} are allowed")
    content = os.pread(file.fileno(), header.size, offset)
    if len(content) < header.size:
        raise BrokenFileError("it ends inside of a header")
    return content


def _records(content: bytes) -> dict[str, str]:
    """Return the records of a pax header, which are written as `length key=value` and a line end."""
    records: dict[str, str] = {}
    place = 0
    while place < len(content) and content[place]:
        match = _RECORD.match(content, place)
        end = place + int(match[1]) if match else 0
        if match is None or end > len(content) or end <= match.end() or content[end - 1 : end] != b"\n":
            raise BrokenFileError("a damaged extended header")
        records[_text(match[2])] = _text(content[match.end() : end - 1])
        place = end
    return records


def _number(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise BrokenFileError("a damaged extended header")
    return int(text)


def _text(content: bytes) -> str:
    return content.decode("utf-8", "surrogateescape")
