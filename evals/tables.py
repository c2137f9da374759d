"""Results as Markdown tables, and as flat metrics for MLflow."""

from collections.abc import Mapping, Sequence
from typing import Any

from evals.published import comparison_note, format_count, published_scores

_COUNTS = ("missing", "duplicate", "extra", "unparsed", "failed")
_HEADER = ("benchmark", "metric", "profile", "score", "95 % interval", "scored", *_COUNTS)


def format_markdown(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Format results (of ``summarize_result``) as Markdown: headlines, categories and provenance."""
    lines = [
        _make_table_row(_HEADER),
        _make_table_row(["---"] * len(_HEADER)),
    ]
    for one in summaries:
        counts = [one[key] for key in _COUNTS]
        cells = [one["benchmark"], one["metric"], one["profile"], format_headline(one), format_interval(one)]
        cells += [format_count(one["benchmark"], one["num_scored"], one["num_questions"]), *counts]
        lines.append(_make_table_row(cells))
    for one in summaries:
        lines += ["", f"## {one['benchmark']}", "", *_details(one)]
    return "\n".join(lines) + "\n"


def format_headline(summary: Mapping[str, Any]) -> str:
    """Format the score, or "withheld"."""
    return "withheld" if summary["score"] is None else f"{summary['score']:.2f}"


def format_interval(summary: Mapping[str, Any]) -> str:
    """Format the interval; a dash without one, or if the score is withheld."""
    ends = summary["confidence_interval"]
    return "–" if ends is None or summary.get("withheld") else f"{ends[0]:.2f} to {ends[1]:.2f}"


def flat_metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return metrics by MLflow names with the profile, without withheld scores."""
    prefix = f"{summary['benchmark']}/{summary['profile']}"
    metrics = {f"{prefix}/{key}": summary[key] for key in ("score", "num_scored", "missing", "unparsed", "failed")}
    if not summary.get("withheld"):
        metrics |= {f"{prefix}/{_to_metric_name(name)}": value for name, value in summary["figures"].items()}
        metrics |= {
            f"{prefix}/category/{_to_metric_name(name)}": one["score"] for name, one in summary["categories"].items()
        }
    return {name: float(value) for name, value in metrics.items() if value is not None}


def _to_metric_name(name: str) -> str:
    """Replace characters that MLflow does not allow in a name."""
    return "".join(char if char.isalnum() or char in "_-. /" else "_" for char in name)


def _make_table_row(cells: Sequence[object]) -> str:
    """Format a Markdown row, with bars and newlines in cells escaped."""
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _details(one: Mapping[str, Any]) -> list[str]:
    lines = [f"**{one['withheld']}.**", ""] if one.get("withheld") else _numbers(one)
    if note := comparison_note(one["benchmark"], one["num_questions"]):
        lines += [f"{note}.", ""]
    if published := published_scores(one["benchmark"], one["num_questions"]):
        lines += ["| published | score |", "| --- | --- |"]
        lines += [_make_table_row([name, value]) for name, value in published.items()] + [""]
    return [
        *lines,
        "| how | |",
        "| --- | --- |",
        *(_make_table_row([key, value]) for key, value in one["provenance"].items()),
    ]


def _numbers(one: Mapping[str, Any]) -> list[str]:
    lines = []
    if one["categories"]:
        lines += ["| category | score | questions |", "| --- | --- | --- |"]
        lines += [_make_table_row([name, _number(c["score"]), c["num"]]) for name, c in one["categories"].items()] + [
            ""
        ]
    if one["figures"]:
        lines += ["| figure | value |", "| --- | --- |"]
        lines += [_make_table_row([name, _number(value)]) for name, value in one["figures"].items()] + [""]
    return lines


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
