"""Figures beside their controls. A figure says little alone: 1.22 bits per image code are good only if the code's
neighbours do not tell as much, and only if the wrong caption gives more.

A `Figure` cannot be made without a control, or without the reason why there is none; the figure is then not printed.
Everything that is printed goes through `figure_lines` (terminal) or `figure_rows` (report), so a figure is never seen
without its control.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from opt_ds.evaluation.intervals import Interval, Measurement, difference_interval, interval

#: Formats a value, with its unit.
Form = Callable[[float], str]

#: Key of the figures of a row of JSON, which stand beside the plain values.
FIGURES = "figures"
#: Control -> how it is called where it is printed. Others are called by their key.
_LABELS = {
    "bag_of_words": "bag of words",
    "chance": "chance",
    "code_contexts": "counts of codes by position, left and above",
    "code_frequencies": "frequencies of codes",
    "code_positions": "counts of codes by position",
    "concepts_probe": "true concepts without binding, probe",
    "constant_answer": "one answer for all",
    "constant_answer_of_kind": "one answer for each kind of question",
    "constant_caption": "one caption for all",
    "no_input": "no input",
    "trained_projection": "projection of [CLS]",
    "training_images": "training images",
    "untrained_finetuned": "untrained model, fine-tuned the same way",
    "unmatched_image": "image generated for another sample",
    "untrained_model": "untrained model",
    "untrained_probe": "untrained encoder, probe",
    "untrained_projection": "untrained encoder, projection",
}
#: Prefix of the controls whose input is another sample's; the rest of the name is the input.
_ANOTHER = "another_"


@dataclass(frozen=True)
class Control:
    """What stands beside a figure.

    Attributes:
        value: The same quantity without what is to be shown: with another sample's input, without training, by counting.
        interval: Its 95 % interval.
        advantage: By how much the figure is better (positive) on the samples of the control.
        advantage_interval: The 95 % interval of the advantage. None: unknown.
        samples: Number of samples of the control, or None if it is a constant.
    """

    value: float
    interval: Interval | None = None
    advantage: float | None = None
    advantage_interval: Interval | None = None
    samples: int | None = None

    def text(self, form: Form) -> str:
        """Return value and interval as text."""
        return _with_interval(self.value, self.interval, form)

    @property
    def is_as_good(self) -> bool:
        """Whether the samples do not show that the figure is better: the interval of the advantage is not above 0."""
        return self.advantage_interval is not None and self.advantage_interval[0] <= 0


@dataclass(frozen=True)
class Figure:
    """A measured value, its 95 % interval and its controls.

    Attributes:
        value: The value.
        interval: Its 95 % interval. None: unknown.
        controls: Name of the control -> the control.
        uncontrolled: Why there is no control. Required if there is none.
    """

    value: float
    interval: Interval | None
    controls: Mapping[str, Control]
    uncontrolled: str = ""

    def __post_init__(self) -> None:
        if not self.controls and not self.uncontrolled:
            raise ValueError("a figure needs a control, or the reason why it has none")

    def text(self, form: Form) -> str:
        """Return value and interval as text, or why the figure is not shown."""
        if not self.controls:
            return f"not shown ({self.uncontrolled})"
        return _with_interval(self.value, self.interval, form)

    @property
    def verdicts(self) -> list[str]:
        """What the controls reveal: that the figure is no better than some of them."""
        as_good = [name for name, control in self.controls.items() if control.is_as_good]
        unused = [name.removeprefix(_ANOTHER) for name in as_good if name.startswith(_ANOTHER)]
        equal = [label(name) for name in as_good if not name.startswith(_ANOTHER)]
        found = [f"does not use its input ({', '.join(unused).replace('_', ' ')})"] if unused else []
        return [*found, *(f"no better than {name}" for name in equal)]

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        found: dict[str, Any] = {"value": self.value, "interval": _plain(self.interval), "controls": {}}
        for name, control in self.controls.items():
            found["controls"][name] = {
                "value": control.value, "interval": _plain(control.interval), "advantage": control.advantage,
                "advantage_interval": _plain(control.advantage_interval), "samples": control.samples,
            }  # fmt: skip
        return found | {"verdicts": self.verdicts} | ({"uncontrolled": self.uncontrolled} if self.uncontrolled else {})


def label(control: str) -> str:
    """Return how a control is called where it is printed."""
    if control.startswith(_ANOTHER):
        return f"another sample's {control.removeprefix(_ANOTHER).replace('_', ' ')}"
    return _LABELS.get(control, control.replace("_", " "))


class Measured(NamedTuple):
    """A control that was measured on some of the figure's samples.

    `places` are their indices among the figure's samples, int64 [n]; None: all of them, in the same order.
    """

    measurement: Measurement
    places: Any = None


def measure(
    own: Measurement, controls: Mapping[str, Measured | float], *, lower_is_better: bool = False, uncontrolled: str = ""
) -> Figure:
    """Return the figure of a measurement beside those of its controls.

    Args:
        own: The measurement.
        controls: Name -> the control. A number is a constant, which has no interval. Without samples, a control is
            omitted.
        lower_is_better: Whether a lower value is better.
        uncontrolled: Why no control is left, if none is.
    """
    sign = -1.0 if lower_is_better else 1.0
    bounds = interval(own)
    found = {}
    for name, control in controls.items():
        if not isinstance(control, Measured):
            found[name] = Control(float(control), None, sign * (own.value - control), _shifted(bounds, control, sign))
        elif len(control.measurement):
            paired = own if control.places is None else own.at(control.places)
            better, worse = (control.measurement, paired) if lower_is_better else (paired, control.measurement)
            found[name] = Control(
                control.measurement.value, interval(control.measurement), better.value - worse.value,
                difference_interval(better, worse), len(control.measurement),
            )  # fmt: skip
    return Figure(own.value, bounds, found, "" if found else uncontrolled)


def beside(figures: Mapping[str, Figure]) -> dict[str, Any]:
    """Return the row of JSON of some figures: plain values by name and, under `figures`, the figures with controls."""
    values = {name: figure.value for name, figure in figures.items()}
    return {**values, FIGURES: {name: figure.as_json() for name, figure in figures.items()}}


#: Why a figure of an earlier version may have no control.
NO_CONTROL = "measured without a control: evaluate again"


def read_figure(row: Mapping[str, Any], name: str, controls: Mapping[str, float | None] | None = None) -> Figure:
    """Return a figure of a row of JSON.

    Args:
        row: The row, of this version or of an earlier one, which had plain values only.
        name: Key of the figure.
        controls: Name -> the value of what an earlier version wrote as a baseline; None: it wrote none.
    """
    found = row.get(FIGURES, {}).get(name)
    if found is None:
        known = {key: Control(float(value)) for key, value in (controls or {}).items() if value is not None}
        return Figure(float(row[name]), None, known, "" if known else NO_CONTROL)
    own = {key: _control(control) for key, control in found["controls"].items()}
    return Figure(found["value"], _pair(found["interval"]), own, found.get("uncontrolled", "" if own else NO_CONTROL))


def _control(found: Mapping[str, Any]) -> Control:
    bounds, advantage = _pair(found["interval"]), _pair(found["advantage_interval"])
    return Control(found["value"], bounds, found["advantage"], advantage, found["samples"])


# ---- printing


class FigureRow(NamedTuple):
    """A line of a table: a name and one cell per figure."""

    name: str
    cells: list[str]


class FigureRows(NamedTuple):
    """Some figures of one thing: their line, one line per control, and what the controls reveal of the first figure."""

    figures: FigureRow
    controls: list[FigureRow]
    verdicts: list[str]


def figure_rows(name: str, figures: Mapping[str, Figure], form: Form | Mapping[str, Form]) -> FigureRows:
    """Return figures and their controls as lines of text.

    Args:
        name: Name of the line.
        figures: Name of the column -> figure.
        form: How to format the values: one form for all columns, or one per column.
    """
    forms = {column: form if callable(form) else form[column] for column in figures}
    controls = dict.fromkeys(control for figure in figures.values() for control in figure.controls)
    lines = []
    for control in controls:
        cells = []
        for column, figure in figures.items():
            found = figure.controls.get(control)
            cells.append("–" if found is None else found.text(forms[column]))
        lines.append(FigureRow(label(control), cells))
    own = FigureRow(name, [figure.text(forms[column]) for column, figure in figures.items()])
    first = next(iter(figures.values()))
    return FigureRows(own, lines, first.verdicts)


def figure_lines(name: str, figures: Mapping[str, Figure], form: Form | Mapping[str, Form], width: int = 44) -> list[str]:
    """Return `figure_rows` for a terminal: the figures with their names, then one line per control, with a mark.

    `width` is that of the first column.
    """
    rows = figure_rows(name, figures, form)
    named = [f"{column} {cell}" for column, cell in zip(figures, rows.figures.cells, strict=True)]
    lines = [f"    {name:<{width}}" + _columns(named)]
    for row in rows.controls:
        cells = [" " * (len(column) + 1) + cell for column, cell in zip(figures, row.cells, strict=True)]
        lines.append(f"      {row.name:<{width - 2}}" + _columns(cells))
    return [*lines, *(f"      → {verdict}" for verdict in rows.verdicts)]


def _columns(cells: list[str]) -> str:
    return "".join(f"{cell:<28}" for cell in cells).rstrip()


def percent(value: float) -> str:
    """Return a share as "30.0%"."""
    return f"{value:.1%}"


def decimals(digits: int) -> Form:
    """Return a form with this many digits after the point."""
    return lambda value: f"{value:.{digits}f}"


def _with_interval(value: float, bounds: Interval | None, form: Form) -> str:
    """Return "30.0% [27.1–33.0]", or the value alone if there is no interval that could be read off."""
    if bounds is None or form(bounds[0]) == form(bounds[1]):
        return form(value)
    return f"{form(value)} [{form(bounds[0]).rstrip('%')}–{form(bounds[1]).rstrip('%')}]"


def _shifted(bounds: Interval | None, constant: float, sign: float) -> Interval | None:
    """Return the interval of the advantage over a constant."""
    if bounds is None:
        return None
    low, high = sorted(sign * (bound - constant) for bound in bounds)
    return low, high


def _plain(bounds: Interval | None) -> list[float] | None:
    return None if bounds is None else list(bounds)


def _pair(bounds: Any) -> Interval | None:
    return None if bounds is None else (float(bounds[0]), float(bounds[1]))
