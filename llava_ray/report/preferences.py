"""The report of making preferences: what became of the answers, the biases, and examples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_ray.report.pieces import Card, Cell, Fact, Note, Picture, Piece, Report, Section, Table


@dataclass(frozen=True)
class PreferenceExample:
    """A question with its chosen and its rejected answer."""

    id: str
    question: str
    chosen: str
    rejected: str
    labels: tuple[str, str]
    """The names of both answers: model, number of the sample, and how it was perturbed."""
    why: str = ""
    pictures: Sequence[Picture] = ()


def preferences_report(title: str, summary: Mapping[str, Any], examples: Sequence[PreferenceExample]) -> Report:
    """Build the report; ``summary`` is the contents of summary.json."""
    dollars, lengths = summary["dollars"], summary["lengths"]
    facts = [
        Fact("Preferences", f"{summary['written']:,}", f"rule {summary['rule']}"),
        Fact("Questions", f"{summary['asked']:,}", f"{summary['questions_with_pairs']:,} with a pair"),
        Fact("Chosen is longer", _percent(lengths["chosen_longer_share"]), "of pairs with unequal lengths"),
        Fact("Cost", "unknown" if dollars is None else f"${dollars:,.4f}", _calls(summary)),
    ]
    state = "complete" if summary["complete"] else "partial"
    sections = [
        Section("From answers to preferences", [*_warnings(summary), _funnel(summary)]),
        Section("Length and order", _biases(summary)),
        Section("Examples", [Note(_shown(summary, examples)), *(_card(one) for one in examples)]),
        Section("Method", [_method(summary)]),
    ]
    text = f"{summary['written']:,} pairs of a chosen and a rejected answer; the job is {state}."
    return Report(title, text, sections, facts)


def _calls(summary: Mapping[str, Any]) -> str:
    return f"{summary['calls']['sent']:,} calls sent" if summary["calls"] else "no judge"


def _warnings(summary: Mapping[str, Any]) -> list[Piece]:
    notes: list[Piece] = []
    if not summary["complete"]:
        notes.append(Note(f"Partial: {summary['partial_because']}.", warning=True))
    if failures := summary["judge_failures"]:
        text = f"{failures['reviews']:,} reviews have no scores, mostly because: {failures['most_common']}"
        notes.append(Note(text, warning=True))
    if summary["rejected"]:
        listed = ", ".join(f"{num:,} {reason}" for reason, num in summary["rejected"].items())
        notes.append(Note(f"Questions that could not be asked: {listed}.", warning=True))
    return notes


def _funnel(summary: Mapping[str, Any]) -> Table:
    rows: list[list[Cell]] = [["questions", summary["questions"]], ["questions asked", summary["asked"]]]
    rows += [[name.replace("_", " "), num] for name, num in summary["counts"].items()]
    rows += [["pairs decided", summary["decided"]], ["pairs written", summary["written"]]]
    return Table(["", "number"], rows)


def _biases(summary: Mapping[str, Any]) -> list[Piece]:
    header = ["", "chosen longer", "rejected longer", "share of chosen", "mean difference"]
    rows: list[list[Cell]] = []
    for name, found in (("written", summary["lengths"]), ("before balancing", summary["lengths_before_balancing"])):
        if found:
            rows.append([name, *found.values()])
    pieces: list[Piece] = [Table(header, rows), Note("Lengths are in characters; 50 % is no bias.")]
    if order := summary["order"]:
        named = {"reviews in both orders": "num_pairs", "consistency": "consistency", "first wins": "first_wins"}
        pieces.append(Table(["order", ""], [[name, order.get(key)] for name, key in named.items()]))
        pieces.append(Note("First wins: share of decided reviews won by the answer shown first; 0.5 is fair."))
    return pieces


def _shown(summary: Mapping[str, Any], examples: Sequence[PreferenceExample]) -> str:
    return f"{len(examples):,} of {summary['written']:,} preferences."


def _card(one: PreferenceExample) -> Card:
    chosen, rejected = one.labels
    rows: list[list[Cell]] = [
        ["question", one.question],
        [f"chosen ({chosen})", one.chosen],
        [f"rejected ({rejected})", one.rejected],
    ]
    return Card(one.id, [Table(["", ""], rows)], one.pictures, one.why)


def _method(summary: Mapping[str, Any]) -> Table:
    rows: list[list[Cell]] = [[name, str(summary[name])] for name in ("rule", "recipe", "source", "temperature")]
    rows += [["samples a model", str(summary["num_samples"])]]
    rows += [[f"model {path}", mark] for path, mark in summary["models"].items()]
    return Table(["setting", "value"], rows)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"
