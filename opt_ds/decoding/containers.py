"""Decode the sound of formats that libsndfile does not have, with PyAV (FFmpeg): M4A, AAC, WebM, AC-3, WMA and videos.

PyAV is the package of the extra "media". FFmpeg is told the format, which the first bytes state: it does not probe, so it opens
no playlist and no other file. Decoding runs in the decoding process, on one thread.
"""

from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np

from opt_ds.decoding.file_kinds import HEAD_BYTES, container_of_content
from opt_ds.decoding.reasons import BrokenFileError, RefusedError

_SLACK_S = 0.25  # seconds; the padding of an encoder, and a frame, are shorter
_FIRST_S = 60.0  # the sound of unknown length that is allowed for at first
#: Formats whose header states the length of the sound. Others are frames without a header.
_STATE_LENGTH = ("mov", "matroska", "asf", "flv")

CheckLength = Callable[[int, int, int], None]


def is_container(file: BinaryIO) -> bool:
    """Return whether a file is of one of the formats. The file position changes."""
    file.seek(0)
    return container_of_content(file.read(HEAD_BYTES)) is not None


def decode_container(file: BinaryIO, check: CheckLength, allow: Callable[[int], None]) -> tuple[np.ndarray, int]:
    """Decode the only sound track to mono float32 [S], the mean of its channels, and its sample rate in Hz.

    Args:
        file: A file of one of the formats.
        check: Called with frames, channels and rate; raises RefusedError if they are too many or out of range.
        allow: Called with a number of values (over all channels), before they are decoded.

    Raises:
        RefusedError: The file has several sound tracks, or `check` refuses it.
        BrokenFileError: The file has no sound, or less than its header states.
        Exception: FFmpeg cannot decode it.
    """
    import av

    size = file.seek(0, 2)
    file.seek(0)
    head = file.read(HEAD_BYTES)
    name = container_of_content(head)
    if name == "avi" and (announced := 8 + int.from_bytes(head[4:8], "little")) > size:
        raise BrokenFileError(f"it is truncated: {size} of {announced} bytes")
    file.seek(0)
    with av.open(file, format=name, metadata_errors="ignore") as container:
        tracks = container.streams.audio
        if not tracks:
            raise BrokenFileError("it has no sound")
        if len(tracks) > 1:
            raise RefusedError(f"it has {len(tracks)} sound tracks, of which one would be read: extract that as WAV or FLAC")
        track = tracks[0]
        track.codec_context.thread_count = 1
        rate_hz, channels = track.codec_context.sample_rate, track.codec_context.channels
        if not (rate_hz and channels):
            raise ValueError("its headers describe no sound")  # reported as damaged
        stated_s = _stated_length(container, track) if name in _STATE_LENGTH else None
        check(int((stated_s or 0) * rate_hz), channels, rate_hz)
        parts, count, allowed = [], 0, int((stated_s or _FIRST_S) * rate_hz)
        allow(allowed * channels)
        for part in _decoded(container, track):
            count += len(part)
            check(count, channels, rate_hz)
            if count > allowed:
                allowed = 2 * count
                allow(allowed * channels)
            parts.append(part)
    if stated_s is not None and count / rate_hz < stated_s - _SLACK_S:
        raise BrokenFileError(f"it is truncated: {count / rate_hz:.1f} of {stated_s:.1f} s")
    return np.concatenate([np.zeros(0, "float32"), *parts]), rate_hz


def _decoded(container: Any, track: Any) -> Iterator[np.ndarray]:
    """Yield the sound of the track piece by piece, float32 [n], as the mean of its channels."""
    import av

    planar = av.AudioResampler(format="fltp")  # converts the samples only: rate and channels stay
    for frame in container.decode(track):
        for converted in planar.resample(frame):
            yield converted.to_ndarray().mean(0, dtype="float32")
    for converted in planar.resample(None):
        yield converted.to_ndarray().mean(0, dtype="float32")


def _stated_length(container: Any, track: Any) -> float | None:
    """Return the length of the sound in seconds according to the header; None if it does not state that of the track."""
    if track.duration is not None and track.time_base is not None:
        return float(track.duration * track.time_base)
    if container.duration is not None and len(container.streams) == 1:
        return float(container.duration) / 1e6
    return None
