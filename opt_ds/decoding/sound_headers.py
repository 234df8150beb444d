"""Compare what the headers of audio files announce with what the files contain, to detect truncated files.

libsndfile silently clamps the announced length to the available one, and it silently reads only the first stream of an
OGG file. MP3 and FLAC are compared after decoding (audio.py), when the number of their frames is known. The length
of an MP3 without an index is only an estimate, so its frames are counted.
"""

import io
import mmap
import os
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from opt_ds.decoding.mpeg_frames import MpegLength, count_frames, holds_another

_SLACK_BYTES = 256  # some writers include their own header in the length
_UNKNOWN_MARGIN = 2**16  # programs that write to a pipe announce the maximum length minus a header
_MOST_CHUNKS = 10_000
_W64_RIFF, _W64_DATA = (bytes.fromhex(text) for text in ("726966662e91cf11a5d628db04c10000", "64617461f3acd3118cd100c04f8edb8a"))
_OGG_FIRST, _OGG_LAST = 2, 4  # page flags
_FOREIGN_IN_OGG = {b"Speex": "Speex", b"\x7fFLAC": "FLAC", b"\x80theora": "Theora video", b"fishead": "a video"}
_SEVERAL = "it holds several streams one after another, of which one would be read: split it"


@dataclass
class SoundHeader:
    """The lengths of an audio file, as far as its header states them.

    `announced` and `held` are bytes of sound; None if the format does not state them. `problem` is why the file must
    not be used. `patches` are (offset, bytes) that a reader must see instead of the file's own, where a writer left a
    length of zero. `mpeg` is the content of the frames of an MP3 without an index.
    """

    announced: int | None = None
    held: int | None = None
    problem: str | None = None
    length_unknown: bool = False
    patches: list[tuple[int, bytes]] = field(default_factory=list)
    mpeg: MpegLength | None = None

    @property
    def is_truncated(self) -> bool:
        """Whether the file contains less sound than it announces."""
        return self.announced is not None and self.held is not None and self.held + _SLACK_BYTES < self.announced

    def readable(self, file: BinaryIO) -> Any:
        """Return the file in a form that soundfile accepts: a path, or an object that applies the patches."""
        file.seek(0)
        return _Patched(file, self.patches) if self.patches else f"/proc/self/fd/{file.fileno()}"


def read_sound_header(file: BinaryIO) -> SoundHeader | None:
    """Return what the file's header states; None if it has none of the accepted formats. The file position changes."""
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    head = file.read(16)
    if head[:4] in (b"RIFF", b"RIFX", b"RF64") and head[8:12] == b"WAVE":
        return _wav(file, size, "<" if head[:4] != b"RIFX" else ">")
    if head == _W64_RIFF:
        return _w64(file, size)
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return _aiff(file, size)
    if head[:4] == b".snd":
        return _au(head, size)
    if head[:4] == b"caff":
        return _caf(file, size)
    if head[:4] == b"fLaC":
        return _flac(file)
    if head[:4] == b"OggS":
        return _ogg(file, size)
    is_mpeg = len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0
    return _mpeg(file, size) if head[:3] == b"ID3" or is_mpeg else None


def _chunks(file: BinaryIO, start: int, size: int, layout: str, padding: int = 2) -> Iterator[tuple[bytes, int, int]]:
    """Yield (name, announced bytes, offset of the content) of a chain of chunks. The last may end beyond the file."""
    length = struct.calcsize(layout)
    for _ in range(_MOST_CHUNKS):
        file.seek(start)
        head = file.read(length)
        if len(head) < length:
            return
        name, count = struct.unpack(layout, head)
        yield name, count, start + length
        if count < 0:
            return
        start += length + count + -count % padding
        if start >= size:
            return


def _is_unknown(count: int) -> bool:
    return any(limit - _UNKNOWN_MARGIN <= count <= limit for limit in (2**31, 2**32 - 1))


def _wav(file: BinaryIO, size: int, order: str) -> SoundHeader:
    long_size = None
    for name, count, start in _chunks(file, 12, size, f"{order}4sI"):
        if name == b"ds64":
            file.seek(start + 8)
            fields = file.read(8)
            long_size = struct.unpack("<Q", fields)[0] if len(fields) == 8 else None
        if name != b"data":
            continue
        held = size - start
        if count == 2**32 - 1 and long_size:
            return SoundHeader(long_size, held)
        if _is_unknown(count) and held < count:
            return SoundHeader(length_unknown=True)
        if count == 0 and held > 0 and not _ends_as_chunks(file, start, size, order):
            return SoundHeader(length_unknown=True, patches=[(start - 4, struct.pack(f"{order}I", min(held, 2**32 - 1)))])
        return SoundHeader(count, held)
    return SoundHeader(problem="it is truncated: it has no sound")


def _ends_as_chunks(file: BinaryIO, start: int, size: int, order: str) -> bool:
    end = start
    for name, count, content in _chunks(file, start, size, f"{order}4sI"):
        if not all(32 <= letter < 127 for letter in name):
            return False
        end = content + count
    return abs(end - size) <= 1


def _w64(file: BinaryIO, size: int) -> SoundHeader:
    start = 40
    for _ in range(_MOST_CHUNKS):
        file.seek(start)
        head = file.read(24)
        if len(head) < 24:
            break
        name, count = head[:16], struct.unpack("<Q", head[16:])[0]
        if name == _W64_DATA:
            return SoundHeader(count - 24, size - start - 24)
        if count < 24:
            break
        start += count + -count % 8
    return SoundHeader(problem="it is truncated: it has no sound")


def _aiff(file: BinaryIO, size: int) -> SoundHeader:
    for name, count, start in _chunks(file, 12, size, ">4sI"):
        if name == b"SSND":
            return SoundHeader(length_unknown=True) if _is_unknown(count) else SoundHeader(count, size - start)
    return SoundHeader(problem="it is truncated: it has no sound")


def _au(head: bytes, size: int) -> SoundHeader:
    if len(head) < 12:
        return SoundHeader(problem="it is truncated: it has no sound")
    start, count = struct.unpack(">II", head[4:12])
    return SoundHeader(length_unknown=True) if _is_unknown(count) else SoundHeader(count, max(0, size - start))


def _caf(file: BinaryIO, size: int) -> SoundHeader:
    for name, count, start in _chunks(file, 8, size, ">4sq", padding=1):
        if name == b"data":
            return SoundHeader(length_unknown=True) if count < 0 else SoundHeader(count, size - start)
    return SoundHeader(problem="it is truncated: it has no sound")


def _flac(file: BinaryIO) -> SoundHeader:
    file.seek(21)  # STREAMINFO: 4 bits of other fields, then 36 bits with the number of samples
    fields = file.read(5)
    if len(fields) < 5:
        return SoundHeader(problem="it is truncated: its header is incomplete")
    if _another_flac(file):
        return SoundHeader(problem=_SEVERAL)
    return SoundHeader(length_unknown=not (fields[0] & 0x0F or any(fields[1:])))


def _another_flac(file: BinaryIO) -> bool:
    """Return whether the magic bytes and STREAMINFO of a second file follow within the first one."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = 4
        while (start := content.find(b"fLaC", start)) >= 0:
            if content[start + 4] & 0x7F == 0 and content[start + 5 : start + 8] == b"\0\0\x22":
                return True
            start += 4
    return False


def _foreign_codec(file: BinaryIO, start: int) -> str | None:
    file.seek(start)
    head = file.read(8)
    return next((name for mark, name in _FOREIGN_IN_OGG.items() if head.startswith(mark)), None)


def _ogg(file: BinaryIO, size: int) -> SoundHeader:
    """Check all pages: the last one must be complete and marked as last, and no second stream may follow the first."""
    start, began, ended = 0, False, False
    while True:
        file.seek(start)
        head = file.read(27)
        if len(head) < 27 or head[:4] != b"OggS":
            break
        lengths = file.read(head[26])
        end = start + 27 + head[26] + sum(lengths)
        if len(lengths) < head[26] or end > size:
            return SoundHeader(problem="it is truncated: its last page is incomplete")
        flags = head[5]
        if flags & _OGG_FIRST and began:
            return SoundHeader(problem=_SEVERAL)
        if not start and (codec := _foreign_codec(file, end - sum(lengths))) is not None:
            return SoundHeader(problem=f"it is {codec} in OGG, which cannot be decoded here: convert it to WAV or FLAC")
        began = began or not flags & _OGG_FIRST
        ended = bool(flags & _OGG_LAST)
        start = end
    if not ended:
        return SoundHeader(problem="it is truncated: the end of its stream is missing")
    return SoundHeader()


def _mpeg(file: BinaryIO, size: int) -> SoundHeader:
    if holds_another(file, size):
        return SoundHeader(problem=_SEVERAL)
    length = count_frames(file, size)
    truncated = length is not None and length.is_truncated
    return SoundHeader(problem="it is truncated: its last frame is incomplete" if truncated else None, mpeg=length)


def with_index(length: MpegLength, file: BinaryIO) -> BinaryIO:
    """Return an in-memory copy of an MP3 that begins with an index of its frames instead of tags."""
    copy = os.fdopen(os.memfd_create("mp3"), "w+b")
    copy.write(length.index)
    file.seek(length.start)
    shutil.copyfileobj(file, copy)
    copy.flush()
    return copy


class _Patched(io.RawIOBase):
    """A file that shows other bytes at some offsets."""

    def __init__(self, file: BinaryIO, patches: list[tuple[int, bytes]]) -> None:
        self._file, self._patches = file, patches

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move the position of the underlying file."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Return the position of the underlying file."""
        return self._file.tell()

    def readinto(self, target: Any) -> int:
        """Read into `target` with the patches applied; return the number of bytes."""
        start, view = self._file.tell(), memoryview(target).cast("B")
        content = self._file.read(len(view))
        view[: len(content)] = content
        for offset, patch in self._patches:
            for index, value in enumerate(patch, offset - start):
                if 0 <= index < len(content):
                    view[index] = value
        return len(content)
