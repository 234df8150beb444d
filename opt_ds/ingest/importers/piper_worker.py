"""Speak captions with Piper, as a separate program. It reads JSON job lines and prints one answer line per job.

    python piper_worker.py MODEL CONFIG
    stdin:  {"text": "love letter", "length_scale": 1.0, "path": "out.flac"}
    stdout: {"path": "out.flac", "seconds": 0.9} or {"path": "out.flac", "error": "..."}

Piper is GPL-3 software. This file imports nothing of opt_ds, and opt_ds never imports it but runs it as a tool.
Noise is 0, so that equal jobs produce equal files. The output is 16 kHz mono 16-bit FLAC.
"""

import json
import math
import os
import sys

import numpy as np
import onnxruntime
import soundfile
from piper import PiperVoice, SynthesisConfig
from piper.config import PiperConfig
from scipy.signal import resample_poly

SAMPLE_RATE_HZ = 16_000
PEAK = 0.9  # headroom for the overshoot of the resampling filter


def load_voice(model: str, config: str) -> PiperVoice:
    """Load a voice for the CPU, with one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, sess_options=options, providers=["CPUExecutionProvider"])
    with open(config, encoding="utf-8") as file:
        return PiperVoice(config=PiperConfig.from_dict(json.load(file)), session=session)


def speak(voice: PiperVoice, text: str, length_scale: float, path: str) -> float:
    """Speak a text into a FLAC file, atomically.

    Args:
        voice: The voice.
        text: The text.
        length_scale: Duration relative to the voice's normal speed; above 1 is slower.
        path: The FLAC file to write.

    Returns:
        The duration of the audio in seconds.
    """
    settings = SynthesisConfig(length_scale=length_scale, noise_scale=0.0, noise_w_scale=0.0)
    chunks = [chunk.audio_float_array for chunk in voice.synthesize(text, settings)]
    if not chunks:
        raise ValueError("nothing to speak")
    rate_hz = voice.config.sample_rate
    common = math.gcd(rate_hz, SAMPLE_RATE_HZ)
    samples = resample_poly(np.concatenate(chunks) * PEAK, SAMPLE_RATE_HZ // common, rate_hz // common)
    temporary = f"{path}.{os.getpid()}.tmp"
    soundfile.write(temporary, np.clip(samples, -1, 1), SAMPLE_RATE_HZ, subtype="PCM_16", format="FLAC")
    os.replace(temporary, path)
    return len(samples) / SAMPLE_RATE_HZ


def main() -> None:
    """Answer job lines until the end of the input."""
    voice = load_voice(*sys.argv[1:3])
    for line in sys.stdin:
        job = json.loads(line)
        try:
            answer = {"path": job["path"], "seconds": speak(voice, job["text"], job["length_scale"], job["path"])}
        except Exception as error:
            answer = {"path": job["path"], "error": str(error) or type(error).__name__}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
