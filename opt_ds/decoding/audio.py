"""Decode audio files of all common formats to mono.

The formats are WAV (8-bit to float), RF64, W64, AIFF, AU, CAF, FLAC, OGG and MP3, at any rate and number of channels. With PyAV,
those of containers.py are decoded too.
Decoding runs in the decoding process (decoder.py) and does not import torch. Resampling to 16 kHz imports it, in the
calling process.
"""

import functools
from collections.abc import Callable
from fractions import Fraction
from typing import Any, BinaryIO

import numpy as np
import soundfile

from opt_ds.decoding.containers import decode_container, is_container
from opt_ds.decoding.limits import VALUES_PER_SECOND
from opt_ds.decoding.reasons import BrokenFileError, RefusedError, unreadable
from opt_ds.decoding.sound_headers import SoundHeader, read_sound_header, with_index

SAMPLE_RATE_HZ = 16_000
RATES_HZ = (1000, 768_000)  # lowest and highest accepted sample rate
#: Formats are detected by content, never by name. libsndfile also opens headerless formats, which match any bytes.
_FORMATS = ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC", "OGG", "MP3")
#: Codecs in which libsndfile cannot seek are read in one piece too. DWVW is refused: it cannot be read to the end.
_REFUSED_CODECS = ("DWVW_12", "DWVW_16", "DWVW_24", "DWVW_N", "VOX_ADPCM")
# The resampling filter has one phase per term of the ratio. Two rates without a common divisor would need gigabytes.
_MOST_PHASES = 1000
_SILENCE_DB, _SILENCE_FRAME, _SILENCE_MARGIN = -40.0, 320, 1600  # relative to the loudest frame; 20 ms; 100 ms
_CUT_S = 0.1  # seconds; the padding of an encoder is shorter


def decode_audio(file: BinaryIO, max_seconds: float, allow: Callable[[int], None]) -> tuple[np.ndarray, int]:
    """Decode audio to mono float32 [S], the mean of its channels, and its sample rate in Hz.

    Args:
        file: The audio file.
        max_seconds: Longest duration that is accepted.
        allow: Called with the number of values (over all channels), before they are decoded.

    Raises:
        RefusedError: The format is not accepted, the rate is outside 1 to 768 kHz, or the audio has more than
            `max_seconds` or more values than `max_seconds` at 192 kHz.
        BrokenFileError: The audio has no samples or NaN, is truncated, or would be read in part only.
        soundfile.LibsndfileError: The file is damaged.
    """
    if is_container(file):
        return _decode_container(file, max_seconds, allow)
    header = read_sound_header(file)
    if header is None:
        file.seek(0)
        raise unreadable("audio", file.read(4096))
    if header.problem is not None:
        raise BrokenFileError(header.problem)
    with _opened(header, file) as sound:
        if sound.format not in _FORMATS or sound.subtype in _REFUSED_CODECS:
            raise RefusedError(
                f"its encoding ({sound.format}, {sound.subtype}) is not accepted: save it as WAV or FLAC"
            )
        rate_hz, channels = sound.samplerate, sound.channels
        _check_rate(rate_hz)
        frames = sound.frames
        if header.length_unknown and sound.format == "FLAC":
            raise RefusedError(
                "its header does not contain its length (a FLAC written to a pipe): encode it again into a file"
            )
        _check_length(frames, channels, rate_hz, max_seconds)
        if header.is_truncated:
            assert header.announced is not None and header.held is not None
            expected = frames * header.announced / max(1, header.held)
            raise BrokenFileError(f"it is truncated: {frames / rate_hz:.1f} of {expected / rate_hz:.1f} s")
        allow(frames * channels)
        # Read in one piece: where reading stops and resumes, the last bits of MP3 samples differ.
        samples = sound.read(frames=frames, dtype="float32", always_2d=True)
    if frames - len(samples) > _CUT_S * rate_hz:
        raise BrokenFileError(f"it is truncated: {len(samples) / rate_hz:.1f} of {frames / rate_hz:.1f} s")
    return _checked(samples.mean(1)), rate_hz


def _decode_container(file: BinaryIO, max_seconds: float, allow: Callable[[int], None]) -> tuple[np.ndarray, int]:
    def check(frames: int, channels: int, rate_hz: int) -> None:
        _check_rate(rate_hz)
        _check_length(frames, channels, rate_hz, max_seconds)

    try:
        mono, rate_hz = decode_container(file, check, allow)
    except ImportError:  # PyAV is not installed
        file.seek(0)
        raise unreadable("audio", file.read(4096)) from None
    return _checked(mono), rate_hz


def _checked(mono: np.ndarray) -> np.ndarray:
    if not len(mono):
        raise BrokenFileError("the audio has no samples")
    if not np.isfinite(mono).all():
        raise BrokenFileError("the audio has NaN or infinite samples")
    return mono


def _check_rate(rate_hz: int) -> None:
    if not RATES_HZ[0] <= rate_hz <= RATES_HZ[1]:
        raise RefusedError(f"its sample rate of {rate_hz} Hz is outside {RATES_HZ[0]} to {RATES_HZ[1]} Hz")


def _opened(header: SoundHeader, file: BinaryIO) -> soundfile.SoundFile:
    try:
        sound = soundfile.SoundFile(header.readable(file))
    except soundfile.LibsndfileError:
        if header.is_truncated:  # libsndfile does not open some truncated formats
            raise BrokenFileError(f"it is truncated: {header.held} of {header.announced} bytes of sound") from None
        raise
    if header.mpeg is None or abs(sound.frames - header.mpeg.samples) <= _CUT_S * sound.samplerate:
        return sound
    sound.close()
    with with_index(header.mpeg, file) as indexed:
        return soundfile.SoundFile(f"/proc/self/fd/{indexed.fileno()}")


def _check_length(frames: int, channels: int, rate_hz: int, max_seconds: float) -> None:
    if frames > max_seconds * rate_hz:
        raise RefusedError(f"{frames / rate_hz:.0f} s are more than {max_seconds:g} (--max-seconds)")
    if frames * channels > max_seconds * VALUES_PER_SECOND:
        raise RefusedError(
            f"{frames / rate_hz:.0f} s of {channels} channels at {rate_hz} Hz are more than {max_seconds:g} s of "
            f"one at {VALUES_PER_SECOND} Hz (--max-seconds)"
        )


def resample(mono: np.ndarray, rate_hz: int) -> np.ndarray:
    """Resample to float32 at 16 kHz. For unusual rates (such as 44,057 Hz) the ratio is rounded, by at most 1e-6."""
    if rate_hz == SAMPLE_RATE_HZ:
        return mono
    import torch

    ratio = Fraction(rate_hz, SAMPLE_RATE_HZ).limit_denominator(_MOST_PHASES)
    return _resampler(ratio.numerator, ratio.denominator)(torch.from_numpy(mono)).numpy()


@functools.lru_cache(maxsize=16)
def _resampler(rate: int, new_rate: int) -> Any:
    """Return a cached resampler between two rates. Building its filter costs as much as resampling a short file."""
    import torch
    import torchaudio

    return torchaudio.transforms.Resample(rate, new_rate, dtype=torch.float32)


def trim_silence(mono: np.ndarray) -> np.ndarray:
    """Remove silence at both ends: frames 40 dB below the loudest frame. 100 ms of silence are kept."""
    count = -(-len(mono) // _SILENCE_FRAME)
    frames = np.pad(mono, (0, count * _SILENCE_FRAME - len(mono))).reshape(count, _SILENCE_FRAME)
    power = np.square(frames, dtype="float64").mean(1)
    loud = np.flatnonzero(power > power.max() * 10 ** (_SILENCE_DB / 10))
    if not len(loud):  # the audio is all silence
        return mono
    start, stop = loud[0] * _SILENCE_FRAME - _SILENCE_MARGIN, (loud[-1] + 1) * _SILENCE_FRAME + _SILENCE_MARGIN
    return mono[max(0, start) : stop]
