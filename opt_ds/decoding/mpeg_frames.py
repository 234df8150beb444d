"""The length of an MP3 file without an index, found by counting its frames.

libsndfile computes the length from the bit rate of the first frame and reads no further. For files with a variable bit
rate that is too short or too long. With an index (in the first frame of LAME's files, called Xing or Info) its length
is correct.
"""

import struct
from dataclasses import dataclass
from typing import BinaryIO

_BIT_RATES = {  # kbit/s by (version is MPEG 1, layer), from ISO 11172-3 and 13818-3
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES_HZ = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}  # by the two version bits
_LARGE_FRAME = {True: 9, False: 8}  # 128 and 64 kbit/s: large enough for an index at any sample rate
_TAGS_AT_END = (b"TAG", b"APETAGEX", b"LYRICSBEGIN", b"ID3", b"3DI")
_MONO = 3
_MOST_UNANNOUNCED = 10  # frames; encoders differ in whether they count the index and the last frames


@dataclass(frozen=True)
class _Frame:
    """The header of one frame. `samples` is per channel."""

    head: bytes
    bytes: int
    samples: int

    @property
    def index_offset(self) -> int:
        """Offset of an index in the frame, after the side information."""
        mono = self.head[3] >> 6 == _MONO
        if self.head[1] >> 3 & 3 == 3:
            return 4 + (17 if mono else 32)
        return 4 + (9 if mono else 17)


@dataclass(frozen=True)
class MpegLength:
    """The length of an MP3 file, counted over its frames.

    `start` is the offset of the first frame, and `samples` is per channel. `is_truncated`: the last frame is
    incomplete.
    `index` is a frame that announces the number of frames. It is meant to replace everything before `start`.
    """

    start: int
    samples: int
    is_truncated: bool
    index: bytes


def count_frames(file: BinaryIO, size: int) -> MpegLength | None:
    """Return the length of an MP3 without an index; None if it has an index, or other content between its frames."""
    begin = start = _behind_tags(file)
    first = _frame_at(file, start)
    if first is None or _has_index(file, start, first):
        return None
    count, samples, is_truncated = 0, 0, False
    while start < size:
        frame = _frame_at(file, start)
        if frame is None:
            file.seek(start)
            rest = file.read(16)
            if not (rest.startswith(_TAGS_AT_END) or not rest.strip(b"\0")):
                return None
            break
        is_truncated = start + frame.bytes > size
        if is_truncated:
            break
        count, samples, start = count + 1, samples + frame.samples, start + frame.bytes
    return MpegLength(begin, samples, is_truncated, _index_of(first, count))


def holds_another(file: BinaryIO, size: int) -> bool:
    """Return whether more frames follow than the index announces.

    Of concatenated files only the first would be read.
    """
    start = _behind_tags(file)
    first = _frame_at(file, start)
    announced = None if first is None else _announced(file, start, first)
    if first is None or announced is None:
        return False
    start, count = start + first.bytes, 0
    while (frame := _frame_at(file, start)) is not None and start < size:
        start, count = start + frame.bytes, count + 1
    follows = _frame_at(file, _behind_tags(file, start)) is not None and start < size
    return follows or count > announced + _MOST_UNANNOUNCED


def _announced(file: BinaryIO, start: int, first: _Frame) -> int | None:
    """Return the number of frames that the index in the first frame announces; None if there is none."""
    file.seek(start + first.index_offset)
    fields = file.read(12)
    if fields[:4] in (b"Xing", b"Info") and len(fields) == 12 and fields[7] & 1:
        return int.from_bytes(fields[8:], "big")
    file.seek(start + 36)
    fields = file.read(18)
    return int.from_bytes(fields[14:], "big") if fields[:4] == b"VBRI" and len(fields) == 18 else None


def _behind_tags(file: BinaryIO, start: int = 0) -> int:
    while True:
        file.seek(start)
        head = file.read(10)
        if head[:3] != b"ID3" or len(head) < 10:
            return start
        length = sum((byte & 0x7F) << 7 * (3 - place) for place, byte in enumerate(head[6:10]))
        start += 10 + length + (10 if head[5] & 0x10 else 0)


def _frame_at(file: BinaryIO, start: int) -> _Frame | None:
    file.seek(start)
    head = file.read(4)
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version, layer = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3)
    rate_index, bit_rate_index = head[2] >> 2 & 3, head[2] >> 4
    if version == 1 or layer not in (2, 3) or rate_index == 3 or not 0 < bit_rate_index < 15:
        return None
    is_mpeg1 = version == 3
    samples = 1152 if is_mpeg1 or layer == 2 else 576
    bit_rate = 1000 * _BIT_RATES[is_mpeg1, layer][bit_rate_index]
    length = samples // 8 * bit_rate // _RATES_HZ[version][rate_index] + (head[2] >> 1 & 1)
    return _Frame(head, length, samples)


def _has_index(file: BinaryIO, start: int, first: _Frame) -> bool:
    file.seek(start + first.index_offset)
    xing = file.read(4)
    file.seek(start + 36)
    return xing in (b"Xing", b"Info") or file.read(4) == b"VBRI"


def _index_of(first: _Frame, count: int) -> bytes:
    """Return a silent frame of the same kind that announces `count` frames."""
    is_mpeg1 = first.head[1] >> 3 & 3 == 3
    # The frame has no checksum and no padding.
    head = bytes((0xFF, first.head[1] | 1, first.head[2] & 0x0C | _LARGE_FRAME[is_mpeg1] << 4, first.head[3]))
    rate_hz = _RATES_HZ[head[1] >> 3 & 3][head[2] >> 2 & 3]
    layer = 4 - (head[1] >> 1 & 3)
    length = first.samples // 8 * 1000 * _BIT_RATES[is_mpeg1, layer][_LARGE_FRAME[is_mpeg1]] // rate_hz
    frame = bytearray(length)
    frame[:4] = head
    frame[first.index_offset : first.index_offset + 12] = b"Xing" + struct.pack(">II", 1, count)
    return bytes(frame)
