"""Show one sample completely, as a model will read it: its text, and an image of the rest."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from opt_ds.errors import UserError, did_you_mean
from opt_ds.store.files import atomic_file
from opt_ds.store.reader import FeatureStore
from opt_ds.store.schema import MISSING

_MOST_BOXES = 20
_MOST_VALUES = 20
_FURTHER = "features of "  # begins the title of a panel of a further modality


def find_sample(store: FeatureStore, name: str) -> int:
    """Return the index of the sample with this id, or with the number in "#7". Raise UserError if there is none."""
    if name.startswith("#") and name[1:].isdigit() and int(name[1:]) < store.num_samples:
        return int(name[1:])
    ids = (store.sample_id(index) for index in range(store.num_samples))
    found = next((index for index, id in enumerate(ids) if id == name), None)
    if found is None:
        near = did_you_mean(name, (store.sample_id(index) for index in range(min(store.num_samples, 10_000))))
        raise UserError(f'{store.path}: no sample "{name}"{near}: give an id, or #0 to #{store.num_samples - 1}')
    return found


def describe_sample(store: FeatureStore, index: int) -> list[tuple[str, str]]:
    """Return the parts of a sample as (name, value): ids and labels, caption and tokens, sizes."""
    text, image, audio, *further = store.rows[index]
    split = store.description.split_names[int(store.split_codes[index])]
    lines = [("sample", f"#{index}"), ("id", store.sample_id(index)), ("split", split)]
    lines.append(("labels", ", ".join(store.labels(index)) or "none"))
    if text != MISSING:
        tokens = store.text(text)
        tokenizer = store.tokenizer()
        pieces = " ".join(tokenizer.convert_ids_to_tokens(tokens.tolist()))
        lines += [("caption", store.caption(text)), (f"{len(tokens)} tokens", pieces)]
        lines.append(("decoded", str(tokenizer.decode(tokens))))
    if image != MISSING:
        regions = store.regions(image)
        lines.append(("regions", f"{len(regions.features)}, features {_spread(regions.features)}"))
        for box, label, score in list(zip(regions.boxes, regions.labels, regions.scores, strict=True))[:_MOST_BOXES]:
            corners = ", ".join(f"{value:.2f}" for value in box[:4])
            name = f"class {label}" if store.description.dims.image_num_classes > 1 else "region"
            lines.append((f"  {name}", f"score {float(score):.2f}, box {corners}"))
        if store.has_codes:
            lines.append(("image codes", " ".join(map(str, store.codes(image).tolist()))))
    if audio != MISSING:
        frames = store.frames(audio)
        seconds = len(frames) / store.description.dims.audio_frame_rate_hz
        lines.append(("frames", f"{len(frames)} ({seconds:.1f} s), features {_spread(frames)}"))
    for (name, modality), row in zip(store.description.further.items(), further, strict=True):
        if row != MISSING:
            columns = store.columns(name, row)
            lines.append((f"{name} {modality.item}", str(len(columns["features"]))))
            lines += [(f"  {column}", _of_column(values)) for column, values in columns.items()]
    return lines


def draw_sample(store: FeatureStore, index: int, path: Path, original: Image.Image | None = None) -> None:
    """Write a PNG with the boxes, the stored 64 x 64 pixels, the frames and the further features of a sample.

    Args:
        store: The store.
        index: The sample.
        path: The PNG to write.
        original: The original image, over which the boxes are drawn. None: an empty square.
    """
    from matplotlib.figure import Figure

    _, image, audio, *rows = store.rows[index]
    further = dict(zip(store.description.further, rows, strict=True))
    shown = {
        "boxes": image != MISSING,
        "pixels": image != MISSING and store.has_pixels,
        "frames": audio != MISSING,
        **{_FURTHER + name: row != MISSING for name, row in further.items()},
    }
    panels = [name for name, is_there in shown.items() if is_there]
    figure = Figure(figsize=(5 * max(1, len(panels)), 5), layout="constrained")
    figure.suptitle(store.sample_id(index)[:80])
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1)
        axes.set_title(panel)
        if panel == "boxes":
            _draw_boxes(axes, store, image, original)
        elif panel == "pixels":
            axes.imshow(store.pixels(image).transpose(1, 2, 0))
        elif panel.startswith(_FURTHER):
            name = panel.removeprefix(_FURTHER)
            features = np.asarray(store.columns(name, further[name])["features"], "float32")
            axes.imshow(features.T, aspect="auto", origin="lower")
            axes.set_xlabel(store.description.further[name].item)
        else:
            frames = np.asarray(store.frames(audio), "float32")
            rate = store.description.dims.audio_frame_rate_hz
            axes.imshow(frames.T, aspect="auto", origin="lower", extent=(0, len(frames) / rate, 0, frames.shape[1]))
            axes.set_xlabel("seconds")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png", metadata={"Software": None})


def _draw_boxes(axes: Any, store: FeatureStore, row: int, original: Image.Image | None) -> None:
    from matplotlib.patches import Rectangle

    width, height = (1, 1) if original is None else original.size
    if original is not None:
        axes.imshow(np.asarray(original))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    regions = store.regions(row)
    for box, label in list(zip(regions.boxes, regions.labels, strict=True))[:_MOST_BOXES]:
        corner = (box[0] * width, box[1] * height)
        axes.add_patch(Rectangle(corner, box[4] * width, box[5] * height, fill=False, edgecolor="red"))
        axes.text(*corner, str(label), color="white", fontsize=7, backgroundcolor="red", verticalalignment="top")


def _spread(values: np.ndarray) -> str:
    numbers = np.asarray(values, "float32")
    return f"of mean {numbers.mean():.3f}, standard deviation {numbers.std():.3f}" if numbers.size else "none"


def _of_column(values: np.ndarray) -> str:
    """Return the shape and the mean of a column of several values per item, or the first values of one per item."""
    if values.ndim > 1:
        return f"{values.dtype} {list(values.shape)} {_spread(values)}"
    more = " …" if len(values) > _MOST_VALUES else ""
    shown = values[:_MOST_VALUES].tolist()
    return " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in shown) + more
