"""Self-contained HTML report of a run: curves, tables in the paper's layout, image grids, configuration, cost.

The report shows what is in the run's folder: `result.json`, and whatever the `opt-ds evaluate` commands wrote there
under the names given in the README. For experiments that are missing, it shows the command that runs them.
"""

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import jinja2
import yaml

from opt_ds.config import Config, config_from_dict, load_config
from opt_ds.config.section import current_names
from opt_ds.config.sources import preset_names
from opt_ds.errors import UserError
from opt_ds.evaluation.ablation_table import CHART_FILE, JSON_FILE, marks_text, table_rows
from opt_ds.former_names import FIGURES, METRICS, current_keys
from opt_ds.serving import report_tables
from opt_ds.serving.report_tables import FigureTable
from opt_ds.store.files import atomic_file
from opt_ds.store.foreign import is_inside, is_plain_name, read_json_object
from opt_ds.training import checkpoint
from opt_ds.training.metrics import METRICS_FILE, VALIDATION_FILE
from opt_ds.training.run_folder import CONFIG_FILE, RUN_FILE, flatten, refuse_dvae

#: Experiments that the report shows; `opt-ds evaluate <key>` writes the file of each one into the run's folder.
EXPERIMENTS = ("summary", "classification", "retrieval", "two_stages", "transcription", "captioning", "image_generation")
# Exceptions that damaged JSON and YAML can cause while the report is rendered.
_DAMAGES = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, jinja2.UndefinedError, yaml.YAMLError)
_OTHER_CURVES = {
    "learning rate": "optimizer/lr", "gradient norm": "optimizer/gradient_norm", "samples per second": "speed/samples_per_s",
}  # fmt: skip
#: Experiments that are shown if they are there, since most stores do not allow them.
_FURTHER = ("scenes", "vqa")
_FILES = {name: ("result" if name == "summary" else name) + ".json" for name in (*EXPERIMENTS, *_FURTHER)}


def write_report(run: Path, output: Path, ablation: Path | None = None) -> list[str]:
    """Write the report. Return the names of the experiments that were not found.

    `ablation` is a folder of `opt-ds ablate`. Raise UserError if `run` is not a run or if figures cannot be read.
    """
    if not (run / RUN_FILE).is_file():
        raise UserError(f"{run}: no {RUN_FILE} there: name the output directory of a run")
    refuse_dvae(run)
    if not (run / CONFIG_FILE).is_file():
        raise UserError(f"{run}: no {CONFIG_FILE} there: restore it, or name another run")
    if ablation is not None and not (ablation / JSON_FILE).is_file():
        raise UserError(f"--ablation {ablation}: no {JSON_FILE} there: name the folder that opt-ds ablate wrote")
    found = {name: current_keys(_read(run / file), FIGURES) for name, file in _FILES.items() if (run / file).is_file()}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"percent": _percent, "number": _number}
    try:
        page = environment.get_template("report.html").render(**_content(run, found, ablation))
    except UserError:
        raise
    except _DAMAGES as error:
        what = " ".join(str(error).split())
        raise UserError(
            f"{run}: {RUN_FILE}, {METRICS_FILE} or a file of figures there is damaged ({what}): restore it, or evaluate again"
        ) from None
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(output) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return [name for name in EXPERIMENTS if name not in found]


def _content(run: Path, found: dict[str, Any], ablation: Path | None) -> dict[str, Any]:
    """Return the values for the template."""
    metrics, summary = _metrics(run), found.get("summary", {})
    return {
        "name": run.resolve().name, "about": _about(run, metrics), "curves": _curves(metrics, _baselines(run)), "found": found,
        "validation": report_tables.validation_table(summary.get("validation") or _validation(run)),
        "classification": [report_tables.classification_table(found["classification"])] if "classification" in found else [],
        "retrieval": report_tables.retrieval_tables(found), "texts": _texts(found),
        "images": report_tables.image_generation_tables(found),
        "scenes": report_tables.scene_tables(found),
        "vqa": [report_tables.vqa_table(found["vqa"])] if "vqa" in found else [],
        "grids": _grids(run, found), "settings": _settings(run), "ablation": _ablation(ablation),
        "missing": [name for name in EXPERIMENTS if name not in found],
    }  # fmt: skip


def _read(path: Path) -> dict[str, Any]:
    return read_json_object(path, "evaluate again, or remove it")


def _metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines that the run logged. The last line may be truncated if the run is still running."""
    path = run / METRICS_FILE
    lines = []
    logged = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for number, line in enumerate(logged, 1):
        try:
            found = json.loads(line)
        except ValueError:
            if number == len(logged):
                continue
            found = None
        if not isinstance(found, dict):
            raise UserError(f"{path}: line {number} is damaged: remove that line")
        lines.append(current_keys(found, METRICS))
    return lines


def _about(run: Path, metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a description of the run and its cost."""
    record = _read(run / RUN_FILE)
    launches = record["launches"]
    last = launches[-1]
    config = config_from_dict(_yaml(run / CONFIG_FILE), where=str(run / CONFIG_FILE))
    newest = checkpoint.pointed(run, "latest")
    state = checkpoint.train_state(checkpoint.read_state(newest)) if newest else checkpoint.TrainState()
    train = [line for line in metrics if line.get("kind") == "train"]

    def mean(key: str) -> float | None:
        values = [line[key] for line in train if isinstance(line.get(key), float)]
        return sum(values) / len(values) if values else None

    ranks = int(str(last["ranks"]).split()[0])
    return {
        "preset": config.preset, "stores": record["stores"], "steps": state.step, "max_steps": config.max_steps,
        "stopped_early": state.stopped_early, "best_step": state.best_step, "samples": state.step * last["samples_per_step"],
        "seconds": state.train_seconds, "rank_hours": state.train_seconds * ranks / 3600, "last": last, "launches": launches,
        "samples_per_s": mean("speed/samples_per_s"), "tokens_per_s": mean("speed/tokens_per_s"),
        "utilisation": mean("speed/flops_utilisation"), "waiting": mean("speed/data_wait_fraction"),
        "memory_gib": max((line.get("memory/peak_gib", 0.0) for line in train), default=None), "seed": config.seed,
    }  # fmt: skip


def _baselines(run: Path) -> dict[str, float]:
    path = run / VALIDATION_FILE
    return _read(path)["baselines"] if path.is_file() else {}


def _validation(run: Path) -> dict[str, Any]:
    """Return the last validation of the run itself, in the layout of result.json."""
    path = run / VALIDATION_FILE
    if not path.is_file():
        return {}
    table = _read(path)
    return {
        loss: {"loss": value, "baseline": table["baselines"].get(loss), "accuracy": table["accuracies"].get(loss)}
        for loss, value in table["losses"].items()
    }


# ---- curves


def _curves(metrics: list[dict[str, Any]], baselines: dict[str, float]) -> list[dict[str, Any]]:
    """Return SVG plots: one panel per loss, and some for the optimiser and the throughput."""
    panels = [{"title": "loss, weighted sum", "svg": _panel(metrics, "train/loss", "valid/loss", None)}]
    panels += [
        {"title": loss, "svg": _panel(metrics, f"train/{loss}/loss", f"valid/{loss}/loss", baselines.get(loss))}
        for loss in _logged_losses(metrics)
    ]
    panels += [{"title": title, "svg": _panel(metrics, key, None, None)} for title, key in _OTHER_CURVES.items()]
    return [panel for panel in panels if panel["svg"]]


def _logged_losses(metrics: list[dict[str, Any]]) -> list[str]:
    """Return the losses that were trained or validated, in the order in which they were logged."""
    keys = dict.fromkeys(key for line in metrics for key in line)
    parts = [key.split("/") for key in keys]
    losses = [part[1] for part in parts if len(part) == 3 and part[0] in ("train", "valid") and part[2] == "loss"]
    return list(dict.fromkeys(losses))


def _panel(metrics: list[dict[str, Any]], train: str, valid: str | None, baseline: float | None) -> str:
    """Return one plot as SVG, or '' if nothing was logged.

    Panels with validation also show the running mean, because losses are noisy.
    """
    import matplotlib
    from matplotlib.figure import Figure

    x, y = _series(metrics, train)
    vx, vy = _series(metrics, valid) if valid else ([], [])
    if not x and not vx:
        return ""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": train, "font.size": 8}):
        figure = Figure(figsize=(3.3, 1.9), layout="constrained")
        axes = figure.subplots()
        smooth = len(x) >= 20 and valid is not None
        axes.plot(x, y, color="#1f6feb", linewidth=0.7 if smooth else 1.2, alpha=0.3 if smooth else 1)
        if smooth:
            axes.plot(x, _running_mean(y, max(3, len(y) // 25)), color="#1f6feb", linewidth=1.3)
        axes.plot(vx, vy, color="#d1242f", marker="o", markersize=3, linewidth=1)
        if baseline is not None:
            axes.axhline(baseline, color="#6e7781", linestyle="--", linewidth=0.9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.locator_params(axis="both", nbins=5)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _series(metrics: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    points = [(line["step"], line[key]) for line in metrics if isinstance(line.get(key), float) and math.isfinite(line[key])]
    return [step for step, _ in points], [value for _, value in points]


def _running_mean(values: list[float], width: int) -> list[float]:
    """Return the mean over the last `width` values up to each value."""
    means = []
    for place in range(len(values)):
        window = values[max(0, place - width + 1) : place + 1]
        means.append(sum(window) / len(window))
    return means


# ---- results


def _transcription(found: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return (split, figures) from result.json; for the split of transcription.json, its figures replace them."""
    tables = {split: figures["transcription"] for split, figures in found.get("summary", {}).get("splits", {}).items()}
    if "transcription" in found:
        tables[found["transcription"]["split"]] = found["transcription"]
    return list(tables.items())


def _texts(found: dict[str, Any]) -> list[FigureTable]:
    """Return the tables of generated texts."""
    rates = _transcription(found)
    tables = [report_tables.transcription_table(rates)] if rates else []
    return tables + ([report_tables.captioning_table(found["captioning"])] if "captioning" in found else [])


def _grids(run: Path, found: dict[str, Any]) -> list[dict[str, str]]:
    """Return the evaluation's image grids as data URLs."""
    splits = found.get("summary", {}).get("splits", {})
    named = {f"Held-out split {split}": figures.get("image_grid") for split, figures in splits.items()}
    named["opt-ds evaluate image-generation"] = found.get("image_generation", {}).get("image_grid")
    return [
        {"title": title, "url": _data_url(run / file)}
        for title, file in named.items()
        if is_plain_name(file) and is_inside(run, run / file) and (run / file).is_file()
    ]


def _ablation(folder: Path | None) -> dict[str, Any] | None:
    if folder is None:
        return None
    figures = _read(folder / JSON_FILE)
    rows = table_rows(figures)
    chart = _data_url(folder / CHART_FILE) if (folder / CHART_FILE).is_file() else ""
    return {"rows": rows, "marks": marks_text(rows), "chart": chart}


def _settings(run: Path) -> dict[str, Any]:
    """Return the configuration as YAML, and its differences from the preset: key, value, the preset's value."""
    tree = current_names(Config, _yaml(run / CONFIG_FILE))
    text = yaml.safe_dump(tree, sort_keys=False)
    preset = str(tree.get("preset"))
    if preset not in preset_names():
        return {"yaml": text, "changed": []}
    usual = flatten(load_config(preset).model_dump(mode="json"))
    changed = [(key, value, usual.get(key)) for key, value in flatten(tree).items() if value != usual.get(key)]
    return {"yaml": text, "changed": [row for row in changed if row[0] != "data.stores"]}


def _yaml(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _data_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}"


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"
