"""Speak captions with eSpeak NG, as a separate program. It reads JSON job lines and prints one answer line per job.

    python espeak_worker.py
    stdin:  {"text": "a red cat", "voice": "en-us+f2", "length_scale": 1.0, "path": "out.flac"}
    stdout: {"path": "out.flac", "seconds": 0.9} or {"path": "out.flac", "error": "..."}

eSpeak NG is GPL-3 software. Its library and voices are part of the package piper-tts. This file imports nothing of
opt_ds, and opt_ds never imports it but runs it as a tool. The output is 16 kHz mono 16-bit FLAC.

The library keeps state between utterances, on which the samples depend. Each job therefore runs in a forked process
that starts from the same state, so that equal jobs produce equal files.
"""

import ctypes
import importlib.util
import json
import os
import sys
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import resample_poly

SAMPLE_RATE_HZ = 16_000
PEAK = 0.8  # headroom: some voices are close to the largest value
NORMAL_WORDS_PER_MINUTE = 175
_SYNCHRONOUS, _RATE, _UTF8 = 2, 1, 1  # from speak_lib.h
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class Engine:
    """The library, loaded and initialised."""

    def __init__(self) -> None:
        package = importlib.util.find_spec("piper")
        if package is None or not package.submodule_search_locations:
            raise ImportError("piper-tts is not installed")
        folder = Path(next(iter(package.submodule_search_locations)))
        self._library = ctypes.CDLL(str(next(folder.glob("espeakbridge*.so"))))
        data = str(folder / "espeak-ng-data").encode()
        self.rate_hz = self._library.espeak_Initialize(_SYNCHRONOUS, 0, data, 0)
        if self.rate_hz <= 0:
            raise OSError("eSpeak NG does not start")
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # of the noise in a voice; it was seeded with the time
        self._chunks: list[np.ndarray] = []
        self._callback = _CALLBACK(self._take)  # the library keeps no reference
        self._library.espeak_SetSynthCallback(self._callback)

    def speak(self, text: str, voice: str, length_scale: float) -> np.ndarray:
        """Return the samples of a text, int16 [S] at `rate_hz`."""
        if self._library.espeak_SetVoiceByName(voice.encode()):
            raise ValueError(f"no voice {voice}")
        self._library.espeak_SetParameter(_RATE, round(NORMAL_WORDS_PER_MINUTE / length_scale), 0)
        self._chunks.clear()
        words = text.encode()
        if self._library.espeak_Synth(words, len(words) + 1, 0, 1, 0, _UTF8, None, None):
            raise ValueError("eSpeak NG cannot speak it")
        if not self._chunks:
            raise ValueError("nothing to speak")
        return np.concatenate(self._chunks)

    def _take(self, samples: "ctypes._Pointer[ctypes.c_short]", count: int, events: int | None) -> int:
        if count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0


def speak_file(synthesiser: Engine, job: dict[str, str]) -> dict[str, object]:
    """Speak a job into its FLAC file, atomically, and return the answer."""
    path = job["path"]
    try:
        spoken = synthesiser.speak(job["text"], job["voice"], float(job["length_scale"]))
        samples = resample_poly(spoken * (PEAK / 32768), SAMPLE_RATE_HZ, synthesiser.rate_hz)
        temporary = f"{path}.{os.getpid()}.tmp"
        soundfile.write(temporary, np.clip(samples, -1, 1), SAMPLE_RATE_HZ, subtype="PCM_16", format="FLAC")
        os.replace(temporary, path)
    except Exception as error:
        return {"path": path, "error": str(error) or type(error).__name__}
    return {"path": path, "seconds": len(samples) / SAMPLE_RATE_HZ}


def main() -> None:
    """Answer job lines until the end of the input."""
    try:
        synthesiser = Engine()
    except (ImportError, OSError, AttributeError, StopIteration) as error:
        for line in sys.stdin:
            reason = f"eSpeak NG of piper-tts cannot be loaded: {error or type(error).__name__}"
            print(json.dumps({"path": json.loads(line)["path"], "error": reason}), flush=True)
        return
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            print(json.dumps(speak_file(synthesiser, json.loads(line))), flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            print(
                json.dumps({"path": json.loads(line)["path"], "error": f"eSpeak NG ended with status {status}"}),
                flush=True,
            )


if __name__ == "__main__":
    main()
