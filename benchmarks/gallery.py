"""Make a larger gallery for benchmarks/retrieval.py: the emoji corpus, and mirrored images of it with slower speech.

    python benchmarks/gallery.py --corpus data/emoji-corpus --output data/gallery-corpus [--size 5000]
    opt-ds prepare --manifest data/gallery-corpus/manifest.jsonl --allow-outside --text data/emoji/tokenizer --output data/gallery

The added samples (a seeded choice of the training samples, with the caption "mirrored …") have the split `mirrored`.
Nothing is fitted on it, and none of them is a correct candidate.
"""

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

SLOWER = 0.9  # factor on the audio's rate, which makes it slower and lower


def mirrored(line: dict[str, Any], corpus: Path, output: Path) -> dict[str, Any]:
    """Write the sample's image mirrored and its audio slowed down, and return the manifest line of the new sample."""
    new = {
        "id": f"{line['id']}-mirrored",
        "text": f"mirrored {line['text']}",
        "group": line["group"],
        "split": "mirrored",
    }
    svg = (corpus / line["image"]).read_text(encoding="utf-8")
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', svg).group(1))  # type: ignore[union-attr]
    start = re.search(r"<svg[^>]*>", svg)
    assert start is not None, f"{line['image']} is an SVG"
    inner = svg[start.end() : svg.rindex("</svg>")]
    new["image"] = f"images/{new['id']}.svg"
    turned = f'{svg[: start.end()]}<g transform="matrix(-1 0 0 1 {width:g} 0)">{inner}</g></svg>'
    (output / new["image"]).write_text(turned, encoding="utf-8")
    wave, rate = soundfile.read(corpus / line["audio"], dtype="int16")
    new["audio"] = f"audio/{new['id']}.flac"
    soundfile.write(output / new["audio"], wave, int(rate * SLOWER))
    return new


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--size", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()

    lines = [json.loads(line) for line in (options.corpus / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    train = [line for line in lines if line["split"] == "train"]
    missing = options.size - len(lines)
    if not 0 <= missing <= len(train):
        parser.error(
            f"--size {options.size}: {options.corpus} allows {len(lines)} to {len(lines) + len(train)} samples"
        )
    for folder in ("images", "audio"):
        (options.output / folder).mkdir(parents=True, exist_ok=True)
    chosen = np.random.default_rng(options.seed).choice(len(train), missing, replace=False)
    added = [mirrored(train[k], options.corpus, options.output) for k in sorted(chosen.tolist())]
    for line in lines:
        for part in ("image", "audio"):
            line[part] = os.path.relpath(options.corpus / line[part], options.output)
    manifest = "".join(json.dumps(line) + "\n" for line in lines + added)
    (options.output / "manifest.jsonl").write_text(manifest, encoding="utf-8")
    print(f"{len(lines)} + {len(added)} samples: {options.output / 'manifest.jsonl'}")


if __name__ == "__main__":
    main()
