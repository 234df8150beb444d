"""Tables of the report: figures with their controls below and, where there are any, the paper's figures beside."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from opt_ds.evaluation import paper
from opt_ds.evaluation.figures import Figure, FigureRow, Form, decimals, figure_rows, percent
from opt_ds.evaluation.projections import DIRECTIONS
from opt_ds.evaluation.ranking import RANKS
from opt_ds.evaluation.reading import (
    CAPTION_FORMS,
    IMAGE_INPUTS,
    NO_UNTRAINED_ANSWERS,
    SCORES,
    TEXT_INPUTS,
    generated_metrics,
    read_answers,
    read_bits,
    read_captioning,
    read_classification,
    read_error_rates,
    read_loss,
    read_loss_accuracy,
    read_recall,
    read_scenes,
    read_whisper_error_rates,
    score_name,
)


class Block(NamedTuple):
    """Some figures of one thing: their line, one line per control, what the controls reveal, and the paper's figures."""

    figures: FigureRow
    controls: list[FigureRow]
    verdicts: list[str]
    paper: Sequence[str] = ()


class FigureTable(NamedTuple):
    """A table of blocks."""

    caption: str
    columns: Sequence[str]
    blocks: list[Block]
    paper: Sequence[str] = ()  # titles of the columns of the paper


def validation_table(validation: Mapping[str, Any]) -> FigureTable:
    """Return the validation losses and accuracies beside those of the trivial baselines."""
    blocks = []
    for loss, row in validation.items():
        figures = {"loss": read_loss(row)}
        if row["accuracy"] is not None:
            figures["accuracy"] = read_loss_accuracy(row)
        blocks.append(_block(loss, figures, {"loss": decimals(3), "accuracy": percent}, ("loss", "accuracy")))
    return FigureTable("", ("loss", "accuracy"), blocks)


def classification_table(found: Mapping[str, Any]) -> FigureTable:
    """Return the mAP per subset."""
    columns = ("mAP", "of the fine-tuned head")
    blocks = [
        _block(subset, figures, percent, columns, [str(paper.CLASSIFICATION_MAP)])
        for subset, figures in read_classification(found).items()
    ]
    caption = (
        f"mAP of a linear probe on the frozen [CLS]: {found['labels']} labels, {found['test_samples']} samples of "
        f"{found['split']}, {found['train_samples']} to fit on. The paper's input is not stated."
    )
    return FigureTable(caption, columns, blocks, ("paper mAP, %",))


def retrieval_tables(found: Mapping[str, Any]) -> list[tuple[str, FigureTable]]:
    """Return (split, table), with one block per direction and score."""
    by_split: dict[str, dict[str, Any]] = {}
    for split, figures in found.get("summary", {}).get("splits", {}).items():
        by_split[split] = dict(figures["retrieval"])
    if "retrieval" in found and "split" in found["retrieval"]:
        by_split.setdefault(found["retrieval"]["split"], {}).update(found["retrieval"])
    two_stages, columns = found.get("two_stages", {}), tuple(f"R@{k}" for k in RANKS)
    tables = []
    for split, figures in by_split.items():
        blocks = []
        for direction in (name for name in DIRECTIONS if name in figures):
            scored = [(score_name(direction, score, row), row) for score, row in _scored(figures[direction])]
            if two_stages.get("split") == split and direction in two_stages:
                scored += _two_stage_rows(two_stages, direction)
            title, papers = direction.replace("_to_", " → ").replace("_", " + "), paper.RETRIEVAL[direction]
            blocks += [
                _block(f"{title}, {name} of {row['candidates']}", read_recall(row), percent, columns, map(_paper, papers))
                for name, row in scored
            ]
        caption = "Each sample of the gallery is a query and a candidate; equal captions and identical images count as correct."
        tables.append((split, FigureTable(caption, columns, blocks, tuple(f"paper {column}, %" for column in columns))))
    return tables


def _scored(own: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(score, own[score]) for score in SCORES if score in own]


def _two_stage_rows(two_stages: Mapping[str, Any], direction: str) -> list[tuple[str, Mapping[str, Any]]]:
    own = two_stages[direction]
    shared = {"candidates": two_stages["candidates"], "chance": own["chance"]}
    first = "alignment" if "alignment" in own else "a projection"
    return [
        (f"{score}, best {two_stages['shortlist']} of {first}", {**own[score], **shared})
        for score in ("likelihood", "matching") if score in own
    ]  # fmt: skip


def transcription_table(by_split: Iterable[tuple[str, Mapping[str, Any]]]) -> FigureTable:
    """Return the error rates per split and input."""
    blocks, texts = [], []
    for split, figures in by_split:
        for key, name in ((key, name) for key, name in TEXT_INPUTS.items() if key in figures):
            title = f"{split}, {name} ({figures[key]['samples']} samples)"
            papers = [str(paper.SPEECH_RECOGNITION_WER) if key == "A" else ""]
            blocks.append(_block(title, read_error_rates(figures, key), percent, ("WER", "CER"), papers))
            blocks += [
                _block(f"{title}, {normalizer}", rates, percent, ("WER", "CER"), [""])
                for normalizer, rates in read_whisper_error_rates(figures[key]).items()
            ]
        texts.append(f"{split}: “{figures['constant_caption']['text']}”")
    caption = f"Word and character error rate, lower case without punctuation. One caption for all: {'; '.join(texts)}."
    return FigureTable(caption, ("WER", "CER"), blocks, ("paper WER, %",))


def captioning_table(found: Mapping[str, Any]) -> FigureTable:
    """Return the metrics of captions. Undefined figures are named in the caption."""
    figures = read_captioning(found)
    columns = tuple(column for column in CAPTION_FORMS if column in figures or column in ("BLEU-4", "CIDEr"))
    blocks = [_block("image → text", figures, CAPTION_FORMS, columns)] if figures else []
    undefined = "".join(f" {name} is undefined: {reason}." for name, reason in found.get("undefined", {}).items())
    signature = f" sacreBLEU: {found['sacrebleu_signature']}." if found.get("sacrebleu_signature") else ""
    about = f"Captions of {found['images']} images of {found['split']}. CIDEr compares models on one split only."
    return FigureTable(f"{about}{undefined}{signature}", columns, blocks)


def vqa_table(found: Mapping[str, Any]) -> FigureTable:
    """Return the VQA accuracy over all questions and over those of each kind. What is missing is named in the caption."""
    blocks = [
        _block(row.name, {"accuracy": row.figure}, percent, ("accuracy",)) for row in read_answers(found)
    ]
    missing = "".join(f" * Not measured: {what}." for what in found.get("not_measured", [NO_UNTRAINED_ANSWERS]))
    caption = f"Accuracy of the answers to questions of {found['split']} ({found['inputs']}).{missing}"
    return FigureTable(caption, ("accuracy",), blocks)


def image_generation_tables(found: Mapping[str, Any]) -> list[FigureTable]:
    """Return a table of bits per code, of every split of the summary or of the experiment; and one per other metric."""
    rows = [
        (f"{split}, {IMAGE_INPUTS[figures['image_generation']['inputs']]}", figures["image_generation"])
        for split, figures in found.get("summary", {}).get("splits", {}).items() if "image_generation" in figures
    ]  # fmt: skip
    own = found.get("image_generation", {})
    rows += [(f"{own[key]['split']}, {name}", own[key]) for key, name in IMAGE_INPUTS.items() if key in own]
    column = "bits per code"
    blocks = [_block(name, {column: read_bits(row)}, decimals(2), (column,)) for name, row in rows]
    tables = [FigureTable("Bits per image code of the true images.", (column,), blocks)] if blocks else []
    for key, name in ((key, name) for key, name in IMAGE_INPUTS.items() if key in own):
        for metric, figures, form in generated_metrics(own[key].get("generated", {})):
            tables.append(FigureTable("", tuple(figures), [_block(f"{name}, {metric}", figures, form, tuple(figures))]))
    return tables


def scene_tables(found: Mapping[str, Any]) -> list[FigureTable]:
    """Return the tables of the figures judged by the truth of scenes, of every split that has any.

    For the split of scenes.json, its figures replace those of the summary, which are of fewer samples.
    """
    by_split = {
        split: figures["scenes"]
        for split, figures in found.get("summary", {}).get("splits", {}).items() if "scenes" in figures
    }  # fmt: skip
    if "scenes" in found:
        by_split[found["scenes"]["split"]] = found["scenes"]
    return [
        FigureTable(f"Split {split}: {title}.", columns, [_block(name, shown, percent, columns) for name, shown in rows])
        for split, figures in by_split.items()
        for title, columns, rows in read_scenes(figures)
    ]


def _block(
    name: str, figures: Mapping[str, Figure], form: Form | Mapping[str, Form], columns: Sequence[str],
    papers: Iterable[str] = (),
) -> Block:  # fmt: skip
    """Return the block of figures, with an empty cell for each column that has no figure."""
    rows = figure_rows(name, figures, form)

    def filled(row: FigureRow) -> FigureRow:
        cells = dict(zip(figures, row.cells, strict=True))
        return FigureRow(row.name, [cells.get(column, "") for column in columns])

    return Block(filled(rows.figures), [filled(row) for row in rows.controls], rows.verdicts, list(papers))


def _paper(value: float | None) -> str:
    return "–" if value is None else str(value)
