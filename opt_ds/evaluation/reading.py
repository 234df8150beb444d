"""Read figures from the JSON that `opt-ds evaluate` writes, of this version or of an earlier one.

An earlier version wrote plain values, with fewer controls under keys of their own. This module requires no extra, so that
reports can be made anywhere.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from opt_ds.data.modalities import IMAGE, TEXT
from opt_ds.evaluation.controls import another
from opt_ds.evaluation.figures import FIGURES, NO_CONTROL, Control, Figure, Form, decimals, percent, read_figure
from opt_ds.evaluation.projections import DIRECTIONS
from opt_ds.evaluation.ranking import RANKS
from opt_ds.evaluation.reranking import RERANKERS
from opt_ds.evaluation.whisper_normalization import NORMALIZERS

#: Input -> its name in tables.
TEXT_INPUTS = {"A": "audio→text", "A+I": "audio+image→text", "I": "image→text"}
IMAGE_INPUTS = {"T": "text→image", "A": "audio→image", "T+A": "text+audio→image"}
PROBE_INPUTS = {"T": "text", "I": "image", "A": "audio"}
#: Scores of a direction, in the order in which they are printed, and their names.
SCORES = {
    "likelihood": "text likelihood",
    "likelihood_raw": "text likelihood, raw",
    "likelihood_transductive": "text likelihood, transductive",
    "matching": "matching head",
    "alignment": "alignment",
    "projection": "projection of [CLS]",
}
#: Column -> form of the figures of captions.
CAPTION_FORMS: dict[str, Form] = {
    "BLEU-4": decimals(1), "CIDEr": decimals(3), "ROUGE-L": decimals(3), "METEOR": decimals(3), "sacreBLEU": decimals(1),
}  # fmt: skip
_CAPTION_KEYS = dict(zip(CAPTION_FORMS, ("bleu_4", "cider", "rouge_l", "meteor", "bleu_sacrebleu"), strict=True))


def read_recall(row: Mapping[str, Any]) -> dict[str, Figure]:
    """Return "R@k" -> recall of a row with `chance`, which was the only control of an earlier version."""
    return {f"R@{k}": read_figure(row, f"R@{k}", {"chance": row["chance"][f"R@{k}"]}) for k in RANKS}


def score_name(direction: str, score: str, row: Mapping[str, Any]) -> str:
    """Return the name of a row's score. Without `prior`, the row is of a version whose prior was the test queries'."""
    transductive = score == "likelihood" and DIRECTIONS[direction][1] == TEXT and "prior" not in row
    return SCORES["likelihood_transductive" if transductive else score]


def read_error_rates(figures: Mapping[str, Any], key: str) -> dict[str, Figure]:
    """Return column -> error rate of an input. An earlier version had controls of the word error rate only."""
    row = figures[key]
    before = {"another_audio": row.get("wer_shuffled_audio"), "constant_caption": figures["constant_caption"]["wer"]}
    return {"WER": read_figure(row, "wer", before), "CER": read_figure(row, "cer")}


def read_whisper_error_rates(row: Mapping[str, Any]) -> dict[str, dict[str, Figure]]:
    """Return name of the normaliser -> column -> error rate of an input. Not every evaluation measures them."""
    found = {
        title: {
            column: read_figure(row, key)
            for column, key in (("WER", f"wer_whisper_{name}"), ("CER", f"cer_whisper_{name}")) if key in row
        }
        for name, title in NORMALIZERS.items()
    }  # fmt: skip
    return {title: rates for title, rates in found.items() if rates}


def read_captioning(figures: Mapping[str, Any]) -> dict[str, Figure]:
    """Return column -> figure, without those that are undefined or were not measured."""
    return {
        column: read_figure(figures, name, {
            "constant_caption": figures["constant_caption"][name], another(IMAGE): figures["another_image"][name],
        })
        for column, name in _CAPTION_KEYS.items() if figures.get(name) is not None
    }  # fmt: skip


def read_classification(figures: Mapping[str, Any]) -> dict[str, dict[str, Figure]]:
    """Return subset -> name -> figure: of the probe and, if there is one, of the fine-tuned head."""
    before = {"chance": figures["chance"]}
    return {
        subset: {
            name: read_figure(row, key, before)
            for name, key in (("mAP", "mAP"), ("of the fine-tuned head", "head_mAP")) if key in row
        }
        for subset, row in figures["subsets"].items()
    }  # fmt: skip


def read_accuracy(figures: Mapping[str, Any]) -> Figure:
    """Return the accuracy of a row of JSON."""
    return read_figure(figures, "accuracy", {"constant_answer": figures["constant_answer"]["accuracy"]})


#: Why a VQA accuracy is marked: its most important control is a run of its own.
NO_UNTRAINED_ANSWERS = (
    "an untrained model, fine-tuned the same way: opt-ds finetune vqa --untrained trains it, --untrained RUN adds it"
)


class AnswerRow(NamedTuple):
    """The accuracy over some questions, the most frequent training answer to them, and the best possible accuracy."""

    name: str
    figure: Figure
    constant: str
    best: float


def read_answers(figures: Mapping[str, Any]) -> list[AnswerRow]:
    """Return the accuracies over all questions and over those of each kind. A mark means that a control is missing.

    Questions without answers have none.
    """
    if "accuracy" not in figures:
        return []
    mark = " *" if figures.get("not_measured", True) else ""
    constant, best = figures["constant_answer"]["answer"], figures["best_possible"]
    overall = AnswerRow(f"VQA, {figures['questions']} questions{mark}", read_accuracy(figures), constant, best)
    by_kind = (
        AnswerRow(
            f"VQA, {kind}, {row['questions']} questions{mark}", read_figure(row, "accuracy"), row["constant_answer"],
            row["best_possible"],
        )
        for kind, row in figures.get("kinds", {}).items()
    )  # fmt: skip
    return [overall, *by_kind]


def read_bits(row: Mapping[str, Any]) -> Figure:
    """Return the bits per code of a row. An earlier version had the codes' frequencies beside it."""
    return read_figure(row, "bits_per_code", {"code_frequencies": row["unigram_bits_per_code"]})


def generated_metrics(generated: Mapping[str, Any]) -> list[tuple[str, dict[str, Figure], Callable[[float], str]]]:
    """Return the metrics of generated images: name, column -> figure, and the form of the values."""
    found: list[tuple[str, dict[str, Figure], Callable[[float], str]]] = []
    if nearest := generated.get("nearest"):
        shown = {name: read_figure(nearest, name, {"chance": nearest["chance"][name]}) for name in nearest["chance"]}
        found.append((f"true image among the nearest of {generated['samples']}", shown, percent))
    for kind in (kind for kind in RERANKERS if kind.name in generated):
        columns = {"first candidate": "first", f"best of {generated['candidates']}": "kept"}
        shown = {column: read_figure(generated[kind.name], name) for column, name in columns.items()}
        found.append((kind.title, shown, decimals(3)))
    if "fid" in generated:
        found.append(("Fréchet inception distance", {"FID": read_figure(generated, "fid")}, decimals(1)))
    if score := generated.get("clip_score"):
        before = {"another_text": score.get("another_caption")}
        found.append(("CLIP score", {"score": read_figure(score, "generated", before)}, decimals(1)))
    return found


#: Key of the figures judged by the truth of scenes -> title and columns of their table.
_SCENE_TABLES = {
    "texts": ("generated texts that are complete, or true, of their scene", ("complete", "true")),
    "negatives": ("hard negatives that the true caption is preferred to", ("preferred",)),
    "probes": ("mAP of a linear probe on the frozen [CLS] for the labels of scenes", ("mAP",)),
    "images": ("generated images that show what the caption says", ("right",)),
}
#: Kind of labels -> its name in tables.
_LABELS = {
    "object": 'objects ("cat")', "colour": 'their colours ("red cat")', "place": 'their places ("cat on the left")',
    "relation": 'relations ("animal left of food")',
}  # fmt: skip
#: Rows of images that are not generated from an input.
_SCENE_IMAGES = {"reconstruction": "dVAE of the true image", "true": "true image"}

#: A table: title, columns, and (name of the row, column -> figure).
SceneTable = tuple[str, tuple[str, ...], list[tuple[str, dict[str, Figure]]]]


def read_scenes(figures: Mapping[str, Any]) -> list[SceneTable]:
    """Return the tables of the figures judged by the truth of scenes, without those that were not measured."""
    rows: dict[str, list[tuple[str, dict[str, Figure]]]] = {name: [] for name in _SCENE_TABLES}
    for key, name in TEXT_INPUTS.items():
        if row := figures.get("texts", {}).get(key):
            shown = {column: read_figure(row, column) for column in _SCENE_TABLES["texts"][1]}
            rows["texts"].append((f"{name} ({row['samples']} samples)", shown))
        scored = figures.get("negatives", {}).get(key, {})
        for score in (score for score in SCORES if score in scored):
            for kind, count in scored[score]["pairs"].items():
                title = f"{name}, {SCORES[score]}, {kind} ({count})"
                rows["negatives"].append((title, {"preferred": read_figure(scored[score], kind)}))
    probes = figures.get("probes", {})
    for key, name in PROBE_INPUTS.items():
        rows["probes"] += [
            (f"{name}, {_LABELS[kind]}, {probes['labels'][kind]} labels", {"mAP": read_figure(probes[key], kind)})
            for kind in (probes[key][FIGURES] if key in probes else ())
        ]
    for key, name in (IMAGE_INPUTS | _SCENE_IMAGES).items():
        if row := figures.get("images", {}).get(key):
            rows["images"] += [
                (f"{name}, {verdict} ({row['samples']} samples)", {"right": read_figure(row, verdict)})
                for verdict in row[FIGURES]
            ]
    return [(*_SCENE_TABLES[name], found) for name, found in rows.items() if found]


_NO_BASELINE = "the task has no trivial baseline"


def read_loss(row: Mapping[str, Any]) -> Figure:
    """Return a validation loss beside its trivial baseline, as an advantage without an interval."""
    return _against(row["loss"], row["baseline"], lower_is_better=True)


def read_loss_accuracy(row: Mapping[str, Any]) -> Figure:
    """Return the accuracy of a validation loss's task beside that of its trivial baseline."""
    reason = _NO_BASELINE if "baseline_accuracy" in row else NO_CONTROL
    return _against(row["accuracy"], row.get("baseline_accuracy"), lower_is_better=False, reason=reason)


def _against(value: float, baseline: float | None, lower_is_better: bool, reason: str = _NO_BASELINE) -> Figure:
    if baseline is None:
        return Figure(value, None, {}, reason)
    advantage = baseline - value if lower_is_better else value - baseline
    return Figure(value, None, {"trivial_baseline": Control(baseline, None, advantage, (advantage, advantage))})
