"""The report of a run on a mixture: its sources, their losses and their held-out scores by step."""

import math
from collections.abc import Mapping, Sequence

from llava_ray.report.pieces import Fact, LineChart, Links, Report, Section, Series, Table
from llava_ray.report.tuning import smoothed

MetricRow = Mapping[str, float | None]  # of a step, as in metrics.jsonl
_LOSS, _SHARE, _HELD_OUT = "loss/", "loss_share/", "held_out_"


def mixture_report(title: str, rows: Sequence[MetricRow], drawn: Mapping[str, int], links: Links) -> Report:
    """Build the report of a run from its metrics by step; ``drawn`` are the samples that it learnt from, by source."""
    total = max(sum(drawn.values()), 1)
    table = Table(
        ["source", "samples drawn", "share"],
        [[name, count, f"{count / total:.1%}"] for name, count in drawn.items()],
    )
    last = next((row["loss"] for row in reversed(rows) if _is_finite(row.get("loss"))), None)
    facts = [Fact("steps", f"{len(rows):,}"), Fact("samples drawn", f"{sum(drawn.values()):,}", "repeats included")]
    facts += [] if last is None else [Fact("last loss", f"{last:.4f}")]
    sections = [Section("Sources", [table]), *source_sections(rows), Section("Files", [links])]
    return Report(title, f"A run on {len(drawn)} sources, {len(rows):,} steps.", sections, facts)


def source_sections(rows: Sequence[MetricRow]) -> list[Section]:
    """Return the charts of losses and held-out scores by source; none for a run without a mixture."""
    losses = _names(rows, _LOSS)
    if not losses:
        return []
    charts = [
        LineChart("Loss by source", [_line(rows, _LOSS, name) for name in losses], "step", "mean of its terms"),
        LineChart("Share of the step's loss", [_line(rows, _SHARE, name) for name in losses], "step", "sum: the loss"),
    ]
    text = "Smoothed. The mean over a source's own terms, and what it adds to the loss of a step."
    sections = [Section("Loss by source", charts, text)]
    held_out = sorted({key.partition("/")[0] + "/" for row in rows for key in row if _is_of_source(key)})
    scores = [
        LineChart(
            prefix[:-1].replace("_", " "),
            [_points(rows, prefix, name) for name in _names(rows, prefix)],
            "step",
            "score",
        )
        for prefix in held_out
    ]
    if scores:
        sections.append(Section("Held-out samples by source", scores))
    return sections


def _is_of_source(key: str) -> bool:
    return key.startswith(_HELD_OUT) and "/" in key


def _names(rows: Sequence[MetricRow], prefix: str) -> list[str]:
    """Return the sources that have a metric, in the order in which they first do."""
    return list(dict.fromkeys(key.removeprefix(prefix) for row in rows for key in row if key.startswith(prefix)))


def _points(rows: Sequence[MetricRow], prefix: str, name: str) -> Series:
    """Return a source's values where there are any."""
    found = [(step, row.get(prefix + name)) for step, row in enumerate(rows, 1)]
    known = [(step, value) for step, value in found if value is not None and math.isfinite(value)]
    return Series(name, [step for step, _ in known], [value for _, value in known])


def _line(rows: Sequence[MetricRow], prefix: str, name: str) -> Series:
    """Return a source's values, smoothed."""
    points = _points(rows, prefix, name)
    return Series(name, points.x, smoothed(points.y))


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
