"""Sound files of any usual kind as mono 16 kHz: WAV (8-bit to float), FLAC, OGG, MP3; any rate and number of channels."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio

SAMPLE_RATE_HZ = 16_000
MAX_SECONDS = 3600.0
_RATES_HZ = (1000, 768_000)
_VALUES_PER_SECOND = 192_000  # over all channels, on average: silence of any size is a small file
# The resampling filter has one phase a term of the ratio: two rates without a common divisor would need gigabytes.
_MOST_PHASES = 1000
_SILENCE_DB, _SILENCE_FRAME, _SILENCE_MARGIN = -40.0, 320, 1600  # below the loudest frame; 20 ms; 100 ms are kept


def load_recording(path: Path, max_seconds: float = MAX_SECONDS) -> np.ndarray:
    """Return a recording as mono float32 [S] at 16 kHz: channels averaged, resampled.

    Raises soundfile's error for a broken file; ValueError for one without samples, with NaN, of a rate outside 1 to 768 kHz,
    of more than `max_seconds`, or of more values than so many seconds at 192 kHz have (both before it is decoded).
    """
    with soundfile.SoundFile(path) as file:
        rate_hz = file.samplerate
        if not _RATES_HZ[0] <= rate_hz <= _RATES_HZ[1]:
            raise ValueError(f"a rate of {rate_hz} Hz is no recording's")
        if file.frames > max_seconds * rate_hz:
            raise ValueError(f"{file.frames / rate_hz:.0f} s are more than {max_seconds:g} (--max-seconds)")
        if file.frames * file.channels > max_seconds * _VALUES_PER_SECOND:
            raise ValueError(
                f"{file.frames / rate_hz:.0f} s of {file.channels} channels at {rate_hz} Hz are more than {max_seconds:g} s of "
                f"one at {_VALUES_PER_SECOND} Hz (--max-seconds)"
            )
        # In one piece: MP3 comes out otherwise, in the last bits, where reading stops and goes on.
        samples = file.read(dtype="float32", always_2d=True)
    mono = samples.mean(1)
    if not len(mono):
        raise ValueError("the recording has no samples")
    if not np.isfinite(mono).all():
        raise ValueError("the recording has NaN or infinite samples")
    return resample(mono, rate_hz)


def resample(mono: np.ndarray, rate_hz: int) -> np.ndarray:
    """Return float32 samples at 16 kHz. Of an odd rate (such as 44,057 Hz) the ratio is rounded: by 1e-6 at most."""
    if rate_hz == SAMPLE_RATE_HZ:
        return mono
    ratio = Fraction(rate_hz, SAMPLE_RATE_HZ).limit_denominator(_MOST_PHASES)
    return torchaudio.functional.resample(torch.from_numpy(mono), ratio.numerator, ratio.denominator).numpy()


def trim_silence(mono: np.ndarray) -> np.ndarray:
    """Return the recording without the silence at its ends: frames 40 dB below the loudest one; 100 ms of it stay."""
    count = -(-len(mono) // _SILENCE_FRAME)
    frames = np.pad(mono, (0, count * _SILENCE_FRAME - len(mono))).reshape(count, _SILENCE_FRAME)
    power = np.square(frames, dtype="float64").mean(1)
    loud = np.flatnonzero(power > power.max() * 10 ** (_SILENCE_DB / 10))
    if not len(loud):  # silence alone
        return mono
    start, stop = loud[0] * _SILENCE_FRAME - _SILENCE_MARGIN, (loud[-1] + 1) * _SILENCE_FRAME + _SILENCE_MARGIN
    return mono[max(0, start) : stop]
