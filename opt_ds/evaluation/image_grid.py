"""Image grid like the paper's last figure: true and generated images, with true and generated texts."""

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from opt_ds.abilities import WRITE_TEXT
from opt_ds.data.modalities import AUDIO, IMAGE, TEXT
from opt_ds.evaluation.evaluator import SUBSETS, Evaluator
from opt_ds.evaluation.image_generation import ImageGenerator, to_uint8
from opt_ds.model.generation import DecodingConfig

if TYPE_CHECKING:
    from opt_ds.dvae.model import DiscreteVAE

_IMAGE_SIDE, _MARGIN, _TEXT_WIDTH, _LINE = 128, 10, 470, 21
_COLUMNS = ("true image", "dVAE of it", "from text", "from audio")


def draw_image_grid(
    evaluator: Evaluator, generator: ImageGenerator, split: str, num_samples: int = 8, seed: int = 1
) -> np.ndarray:
    """Return the image grid, uint8 [H, W, 3], with one row per sample.

    The columns are: true image | its reconstruction by the dVAE | image from text | image from audio | the caption, and
    the texts generated from image, from audio and from both. What depends on audio is omitted if no sample has audio.
    Generated texts are omitted if the model does not learn to write text.

    Args:
        evaluator: The model and the store.
        generator: The image generator.
        split: Name of the split.
        num_samples: Number of rows.
        seed: Seed of the choice of samples.

    Returns:
        The grid.

    Raises:
        UserError: No sample has text and an image.
    """
    has_audio = evaluator.has_samples(split, (TEXT, IMAGE, AUDIO))
    gallery = evaluator.require_samples(split, (TEXT, IMAGE, AUDIO) if has_audio else (TEXT, IMAGE), num_samples, seed)
    rows = evaluator.store.rows[gallery, IMAGE]
    true = np.stack([evaluator.store.pixels(int(row)) for row in rows])
    codes = np.stack([evaluator.store.codes(int(row)) for row in rows]).astype(np.int64)
    images = [true, to_uint8(_decode(generator.dvae, codes))]
    for name in ("T", "A") if has_audio else ("T",):
        samples = [evaluator.read(index, SUBSETS[name]) for index in gallery]
        images.append(generator.generate(evaluator, samples)[0])
    texts = [("caption", [evaluator.caption(index) for index in gallery])]
    written = (("I", "from image"), ("A", "from audio"), ("A+I", "from both"))[: 3 if has_audio else 1]
    for name, label in written if evaluator.config.can(WRITE_TEXT) else ():
        samples = [evaluator.read(index, SUBSETS[name]) for index in gallery]
        texts.append((label, evaluator.write_text(samples, DecodingConfig())))
    return _draw(images, texts)


def _decode(dvae: "DiscreteVAE", codes: np.ndarray):
    import torch

    with torch.inference_mode():
        return dvae.decode(torch.from_numpy(codes))


def _draw(images: list[np.ndarray], texts: list[tuple[str, list[str]]]) -> np.ndarray:
    num_samples, columns = len(images[0]), len(images)
    step = _IMAGE_SIDE + _MARGIN
    width, height = columns * step + _MARGIN + _TEXT_WIDTH, _LINE + _MARGIN + num_samples * step
    canvas = Image.new("RGB", (width, height), "white")
    draw, font, bold = ImageDraw.Draw(canvas), ImageFont.load_default(15), ImageFont.load_default(16)
    for column, title in enumerate(_COLUMNS[:columns]):
        draw.text((_MARGIN + column * step, 5), title, fill="#555555", font=font)
    for sample in range(num_samples):
        top = _LINE + _MARGIN + sample * step
        for column in range(columns):
            tile = Image.fromarray(images[column][sample].transpose(1, 2, 0))
            tile = tile.resize((_IMAGE_SIDE, _IMAGE_SIDE), Image.Resampling.NEAREST)
            left = _MARGIN + column * step
            canvas.paste(tile, (left, top))
            draw.rectangle((left, top, left + _IMAGE_SIDE, top + _IMAGE_SIDE), outline="#dddddd")
        left = _MARGIN + columns * step
        truth = texts[0][1][sample]
        for line, (label, written) in enumerate(texts):
            colour = "#000000" if line == 0 else "#1a7f37" if written[sample] == truth.lower() else "#b35900"
            text = f"{label}: {written[sample]}"
            draw.text((left, top + 8 + line * (_LINE + 6)), text[:58], fill=colour, font=bold if line == 0 else font)
    return np.asarray(canvas)
