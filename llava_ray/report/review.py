"""The report of a review: scores by judge, effects of order and length, and disagreements."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_ray.report.pieces import Bar, Card, Cell, Fact, Note, Picture, Piece, Report, Section, Table

_MAX_FACTS = 4
_COUNTS = ("done", "unparsed", "failed", "open")


@dataclass(frozen=True)
class Disagreement:
    """A question on which orders, samples or judges have different winners."""

    title: str
    question: str
    answers: Mapping[str, str]
    verdicts: Sequence[tuple[str, str, str]]
    """Judge and order, scores, explanation."""
    pictures: Sequence[Picture] = ()


def review_report(
    title: str, report: Mapping[str, Any], disagreements: Sequence[Disagreement], num_disagreements: int
) -> Report:
    """Build the report; ``report`` is the contents of report.json."""
    results = report["results"]
    facts = [Fact(one["model"], _score(one), f"{one['metric']}") for one in results[:_MAX_FACTS]]
    facts.append(Fact("Cost", _dollars(report["cost"]["dollars"]), f"{report['calls']['sent']:,} calls sent"))
    done = sum(one["done"] for one in results)
    sections = [
        Section("Scores", [*_warnings(report), _scores(results), *_categories(results)]),
        Section("Order and length", _bias(results)),
        *_models(report["comparisons"]),
        Section(
            "Disagreements",
            [_browsed(disagreements, num_disagreements), *(_card(one) for one in disagreements)],
        ),
        Section("Calls and cost", [_calls(report)]),
        Section("Method", [Table(["setting", "value"], _settings(report["provenance"]))]),
    ]
    state = "complete" if report["complete"] else "partial"
    return Report(title, f"{done:,} reviews of the published order have scores; the job is {state}.", sections, facts)


def _warnings(report: Mapping[str, Any]) -> list[Piece]:
    notes: list[Piece] = []
    if not report["complete"]:
        notes.append(Note(f"Partial: {report['partial_because']}.", warning=True))
    for one in report["results"]:
        if "withheld" in one:
            notes.append(Note(f"{one['judge']}, {one['match']}: no headline: {one['withheld']}.", warning=True))
    notes += [Note(text, warning=True) for text in report["warnings"]]
    return notes


def _scores(results: Sequence[Mapping[str, Any]]) -> Table:
    rows: list[list[Cell]] = []
    for one in results:
        means: list[Cell] = [one.get("first_x10"), one.get("second_x10")]
        rows.append([one["match"], one["judge"], _score(one), _interval(one), *means, *(one[name] for name in _COUNTS)])
    header = ["match", "judge", "score", "95 % interval", "first x 10", "second x 10", *_COUNTS]
    return Table(header, rows)


def _categories(results: Sequence[Mapping[str, Any]]) -> list[Piece]:
    tables: list[Piece] = []
    for one in results:
        if "withheld" in one or len(one["categories"]) < 2:
            continue
        rows: list[list[Cell]] = []
        most = max([100.0, *(found["score"] or 0.0 for found in one["categories"].values())])
        for name, found in one["categories"].items():
            bar = None if found["score"] is None else Bar(found["score"], f"{found['score']:.2f}", most)
            rows.append([name, bar, _interval(found), found["done"], found["unparsed"] + found["failed"]])
        header = ["category", "score", "95 % interval", "reviews", "without scores"]
        tables.append(Table(header, rows, f"{one['match']}, by {one['judge']}"))
    return tables


def _bias(results: Sequence[Mapping[str, Any]]) -> list[Piece]:
    compared = [one for one in results if "orders" in one]
    if not compared:
        return [Note("Single answers: there is no order.")]
    orders: list[list[Cell]] = []
    lengths: list[list[Cell]] = []
    for one in compared:
        who = f"{one['match']}, {one['judge']}"
        scores = [one["orders"][name] for name in ("given", "swapped", "both")]
        orders.append([who, *scores, *(one[name] for name in ("consistency", "first_wins", "first_advantage"))])
        lengths.append([who, *(one[name] for name in ("length_ratio", "length_correlation", "longer_wins"))])
    of_orders = ["match, judge", "as given", "swapped", "both", "consistency", "first wins", "first's points"]
    of_lengths = ["match, judge", "length ratio", "correlation", "longer wins"]
    return [
        Table(of_orders, orders),
        Note(
            "Consistency: share of questions with the same winner in both orders. First wins: share of decided reviews "
            "won by the answer shown first; 0.5 is fair. First's points: the advantage of the first place."
        ),
        Table(of_lengths, lengths),
        Note(
            "Length ratio: second answers to first ones, in characters. Correlation: of an answer's share of the "
            "length with its lead. Longer wins: share of decided reviews won by the longer answer."
        ),
    ]


def _models(comparisons: Mapping[str, Any]) -> list[Section]:
    pieces: list[Piece] = []
    for judge, found in comparisons.items():
        if found["ratings"]:
            rows: list[list[Cell]] = [
                [name, one["rating"], f"{one['low']:.0f} to {one['high']:.0f}", one["num_matches"]]
                for name, one in found["ratings"].items()
            ]
            pieces.append(Table(["model", "rating", "95 % interval", "matches"], rows, f"Bradley-Terry, by {judge}"))
        rates: list[list[Cell]] = [
            [
                f"{one['first']} over {one['second']}",
                Bar(one["win_rate"], f"{one['win_rate']:.1%}", 1.0, 0.5),
                *(one[name] for name in ("won", "tied", "lost")),
            ]
            for one in found["win_rates"]
        ]
        pieces.append(Table(["match", "win rate", "won", "tied", "lost"], rates, f"Win rates, by {judge}"))
    return [Section("Models against each other", pieces)] if pieces else []


def _browsed(disagreements: Sequence[Disagreement], num: int) -> Note:
    if not num:
        return Note("Orders, samples and judges agree on every winner.")
    return Note(f"{len(disagreements):,} of {num:,} questions on which orders, samples or judges disagree.")


def _card(one: Disagreement) -> Card:
    answers: list[list[Cell]] = [["question", one.question]]
    answers += [[name, text] for name, text in one.answers.items()]
    verdicts: list[list[Cell]] = [list(row) for row in one.verdicts]
    tables = [Table(["", ""], answers), Table(["judge and order", "scores", "why"], verdicts)]
    return Card(one.title, tables, one.pictures)


def _calls(report: Mapping[str, Any]) -> Table:
    rows: list[list[Cell]] = [["dollars", _dollars(report["cost"]["dollars"])]]
    rows += [[name.replace("_", " "), value] for name, value in {**report["calls"], **report["cost"]}.items()]
    return Table(["", ""], [row for row in rows if row[1] is not None and row[0] != "as of"])


def _settings(provenance: Mapping[str, Any]) -> list[list[Cell]]:
    return [[key, str(value)] for key, value in provenance.items()]


def _score(one: Mapping[str, Any]) -> str:
    return "withheld" if one["score"] is None else f"{one['score']:.2f}"


def _interval(one: Mapping[str, Any]) -> str | None:
    ends = one["confidence_interval"]
    return None if ends is None or one["score"] is None else f"{ends[0]:.2f} to {ends[1]:.2f}"


def _dollars(value: float | None) -> str:
    return "unknown" if value is None else f"${value:,.4f}" if value < 1 else f"${value:,.2f}"
