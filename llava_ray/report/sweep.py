"""The report of a sweep: trials, learning curves, importance of settings, cost and next steps."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from llava_ray.report.pieces import (
    Axis,
    Cell,
    Fact,
    LineChart,
    Links,
    Note,
    ParallelChart,
    Path,
    Report,
    Section,
    Series,
    Table,
    bar_chart,
)

_Value = str | float
TrialKind = Literal["the best", "to the end", "stopped early", "diverged or failed"]
BEST_KIND: TrialKind = "the best"
WHOLE: TrialKind = "to the end"
EARLY: TrialKind = "stopped early"
BAD: TrialKind = "diverged or failed"
_NUM_TICKS = 5


@dataclass(frozen=True)
class TrialRow:
    """A trial in the report; ``steps`` are those of its evaluations."""

    number: int
    settings: Mapping[str, _Value]
    seed: int
    kind: TrialKind
    state: str
    """Its final state, with the reason."""
    steps: Sequence[int]
    losses: Sequence[float]
    accuracies: Sequence[float]
    """As many as steps, or none."""
    seconds: float


@dataclass(frozen=True)
class SweepSummary:
    """The results of a sweep, in words and numbers."""

    title: str
    summary: str
    best: str
    """Its settings in one line; empty without a best."""
    beats_default: bool | None
    default: str
    saved: float
    num_steps: int
    seconds: float
    importance: Mapping[str, float]
    advice: Sequence[str]
    pareto_front: Sequence[Sequence[Cell]]
    """Number, loss, accuracy and seconds of the trials on the Pareto front of quality and cost."""


def sweep_report(summary: SweepSummary, rows: Sequence[TrialRow], links: Links) -> Report:
    """Build a sweep's report."""
    best = next((row for row in rows if row.kind == BEST_KIND), None)
    facts = [
        Fact("trials", str(len(rows)), ", ".join(_count_kinds(rows))),
        Fact("steps saved", f"{summary.saved:.0%}", "of whole runs, by stopping early"),
        Fact("time", f"{summary.seconds:.0f} s", "all trials and features"),
    ]
    if best is not None and best.accuracies:
        facts.insert(0, Fact("held-out accuracy", f"{best.accuracies[-1]:.1%}", f"the best, trial {best.number}"))
    elif best is not None:
        facts.insert(0, Fact("held-out loss", f"{best.losses[-1]:.4f}", f"the best, trial {best.number}"))
    verdict = [Note(summary.default, warning=summary.beats_default is not True)] if summary.default else []
    evaluated = [row for row in rows if row.steps]
    sections = [
        Section("Trials", [*verdict, _trial_table(rows, summary.num_steps)], summary.best),
        Section("Settings and results", [parallel_chart(evaluated)] if len(evaluated) > 1 else []),
        Section("Learning curves", _curves(evaluated), "A cross marks a trial that was stopped early."),
        Section("Importance of settings", _importance_of(summary.importance)),
        Section("Cost", [_cost_chart(rows), *_pareto_table(summary.pareto_front)]),
        Section("Next steps", [Note(sentence) for sentence in summary.advice]),
        Section("Files", [links]),
    ]
    return Report(summary.title, summary.summary, [section for section in sections if section.pieces], facts)


def _count_kinds(rows: Sequence[TrialRow]) -> list[str]:
    """Return the number of trials by final state."""
    kinds = [WHOLE if row.kind == BEST_KIND else row.kind for row in rows]
    return [f"{kinds.count(kind)} {kind}" for kind in (WHOLE, EARLY, BAD) if kind in kinds]


def _trial_table(rows: Sequence[TrialRow], num_steps: int) -> Table:
    """Return all trials with their last held-out metrics, the best first, sorted by them within each kind."""
    keys = list(dict.fromkeys(key for row in rows for key in row.settings))
    order = [BEST_KIND, WHOLE, EARLY, BAD]

    def place(row: TrialRow) -> tuple[int, float, float]:
        accuracy = -row.accuracies[-1] if row.accuracies else 0.0
        return order.index(row.kind), accuracy, row.losses[-1] if row.losses else math.inf

    cells: list[list[Cell]] = [
        [
            f"{row.number}" + (" ★" if row.kind == BEST_KIND else ""),
            *(_format_setting(row.settings[key]) if key in row.settings else None for key in keys),
            str(row.seed),
            f"{row.steps[-1] if row.steps else 0}/{num_steps}",
            row.losses[-1] if row.losses else None,
            f"{row.accuracies[-1]:.1%}" if row.accuracies else None,
            round(row.seconds),
            row.state,
        ]
        for row in sorted(rows, key=place)
    ]
    header = ["trial", *keys, "seed", "steps", "loss", "accuracy", "seconds", "state"]
    return Table(header, cells)


def _format_setting(value: _Value) -> str:
    """Format a setting's value."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _curves(rows: Sequence[TrialRow]) -> list[LineChart]:
    """Return charts of held-out loss and accuracy over the steps, with a colour for each kind of trial."""
    order = {BEST_KIND: 0, WHOLE: 1, EARLY: 2, BAD: 3}
    rows = sorted(rows, key=lambda row: order[row.kind])

    def lines(values: Mapping[int, Sequence[float]]) -> list[Series]:
        return [
            Series(row.kind, row.steps, values[row.number], ends_early=row.kind in (EARLY, BAD))
            for row in rows
            if values[row.number]
        ]

    losses = LineChart(
        "Held-out loss", lines({row.number: row.losses for row in rows}), "step", "held-out loss", log_y=True
    )
    accuracies = LineChart(
        "Held-out accuracy", lines({row.number: row.accuracies for row in rows}), "step", "share of answers right"
    )
    return [chart for chart in (losses, accuracies) if chart.series]


def parallel_chart(rows: Sequence[TrialRow]) -> ParallelChart:
    """Build parallel coordinates of the settings with the last loss and accuracy."""
    keys = list(dict.fromkeys(key for row in rows for key in row.settings))
    columns: dict[str, list[_Value | None]] = {key: [row.settings.get(key) for row in rows] for key in keys}
    columns["held-out loss"] = [row.losses[-1] for row in rows]
    if all(row.accuracies for row in rows):
        columns["accuracy"] = [row.accuracies[-1] for row in rows]
    axes, heights = [], []
    for name, values in columns.items():
        axis, places = scaled(name, values)
        axes.append(axis)
        heights.append(places)
    order = [BEST_KIND, WHOLE, EARLY, BAD]
    numbered = sorted(range(len(rows)), key=lambda index: order.index(rows[index].kind))
    paths = [
        Path(rows[index].kind, [column[index] for column in heights], faint=rows[index].kind in (EARLY, BAD))
        for index in numbered
    ]
    best = next((row for row in rows if row.kind == BEST_KIND), None)
    prefix = f"The best is trial {best.number}: " if best else "There is no best: "
    described = (
        ", ".join(f"{key} {_format_setting(value)}" for key, value in best.settings.items()) if best else "none ended"
    )
    return ParallelChart("Settings and results", axes, paths, prefix + described + ".")


def scaled(name: str, values: Sequence[_Value | None]) -> tuple[Axis, list[float | None]]:
    """Return an axis and each value's height on it; a wide range of numbers is scaled by its logarithm."""
    known = [value for value in values if value is not None]
    if not all(isinstance(value, int | float) for value in known):
        names = sorted({str(value) for value in known})
        heights = {text: (index + 0.5) / len(names) for index, text in enumerate(names)}
        return Axis(name, [(height, text) for text, height in heights.items()]), [
            None if value is None else heights[str(value)] for value in values
        ]
    numbers = [float(value) for value in known if math.isfinite(float(value))]
    low, high = (min(numbers), max(numbers)) if numbers else (0.0, 1.0)
    log = low > 0 and high >= 10 * low

    def height(value: float) -> float:
        if high == low:
            return 0.5
        return math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)

    distinct = sorted(set(numbers))
    ticks = distinct if len(distinct) <= _NUM_TICKS and name not in ("held-out loss", "accuracy") else [low, high]
    return Axis(name, [(height(value), f"{value:.3g}") for value in dict.fromkeys(ticks)]), [
        None if value is None or not math.isfinite(float(value)) else height(float(value)) for value in values
    ]


def _importance_of(shares: Mapping[str, float]) -> list[Table]:
    """Return bars of the settings' importance, the most important first."""
    if not shares:
        return []
    rows = [(key, share, None) for key, share in sorted(shares.items(), key=lambda item: -item[1])]
    return [bar_chart("Share of the differences in held-out loss that a setting explains alone", ("setting", ""), rows)]


def _cost_chart(rows: Sequence[TrialRow]) -> Table:
    """Return bars of each trial's seconds."""
    most = max(row.seconds for row in rows)
    bars = [(f"trial {row.number} ({row.kind})", row.seconds, None) for row in sorted(rows, key=lambda r: r.number)]
    return bar_chart("Seconds of each trial", ("trial", "seconds"), bars, maximum=most or 1.0, percent=False)


def _pareto_table(rows: Sequence[Sequence[Cell]]) -> list[Table]:
    """Return the Pareto front of quality and cost, if it has several settings."""
    if len(rows) < 2:
        return []
    return [Table(["trial", "held-out loss", "accuracy", "seconds"], rows, "Pareto front of quality and cost")]
