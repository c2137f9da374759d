"""The report of an improvement: scores and gains by round, preferences, cost, lineage, answers before and after."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_ray.report.pieces import (
    Bar,
    Card,
    Cell,
    Fact,
    LineChart,
    Note,
    Picture,
    Piece,
    Report,
    Section,
    Series,
    Table,
    bar_chart,
)

_STAGES = ("preferences", "tune", "evaluate")


@dataclass(frozen=True)
class AnswerChange:
    """A held-out question with the answers of the first and of the last model."""

    id: str
    question: str
    before: str
    after: str
    truth: str
    is_better: bool
    pictures: Sequence[Picture] = ()


def improvement_report(title: str, summary: Mapping[str, Any], changes: Sequence[AnswerChange]) -> Report:
    """Build the report; ``summary`` is the contents of summary.json."""
    rounds, start = summary["rounds"], summary["start"]
    sections = [Section("Rounds", [*_warnings(summary), *_verdicts(summary)])]
    if start:
        sections[0] = Section("Rounds", [*sections[0].pieces, _round_table(summary), *_score_chart(summary)])
    if rounds:
        sections += [
            Section("Categories", _categories(summary)),
            Section("Preferences", [_preference_table(rounds)]),
            Section("Cost and time", [_cost_table(summary), _time_chart(summary)]),
            Section("Before and after", [Note(_count(changes)), *(_change_card(one) for one in changes)]),
            Section("Lineage", [_lineage(rounds)]),
        ]
    return Report(title, _sentence(summary), [one for one in sections if one.pieces], _facts(summary))


def _sentence(summary: Mapping[str, Any]) -> str:
    start, best = summary["start"], summary["best"]
    if not start:
        return "The model to start from has not been evaluated yet."
    if not best["round"]:
        done = f"after {len(summary['rounds'])} round(s) " if summary["rounds"] else ""
        return f"No significant gain {done}on {start['num_questions']:,} held-out questions: the first model stays."
    text = f"{start['score']:.2f} → {best['score']:.2f} on {start['num_questions']:,} held-out questions, by "
    return text + f"{best['round']} round(s) of preferences; {_interval_of(summary['gain'])}."


def _facts(summary: Mapping[str, Any]) -> list[Fact]:
    start, best, dollars = summary["start"], summary["best"], summary["dollars"]
    facts = []
    if start:
        facts.append(Fact("Held out, before", f"{start['score']:.2f}", start["metric"]))
        facts.append(Fact("Held out, best", f"{best['score']:.2f}", f"round {best['round']}"))
        gain = summary["gain"]
        value = f"{gain['difference']:+.2f}" if gain else "none"
        facts.append(Fact("Gain", value, _interval_of(gain) if gain else "nothing significant"))
    facts.append(Fact("Cost", "unknown" if dollars is None else f"${dollars:,.4f}", _budget(summary)))
    return facts


def _budget(summary: Mapping[str, Any]) -> str:
    return "no budget" if summary["budget"] is None else f"budget ${summary['budget']:,.2f} for all rounds"


def _warnings(summary: Mapping[str, Any]) -> list[Piece]:
    notes: list[Piece] = []
    if summary["failed"]:
        notes.append(Note(f"Failed: {summary['failed']}.", warning=True))
    if summary["partial_because"]:
        notes.append(Note(f"Partial: {summary['partial_because']}; the same command goes on.", warning=True))
    shared = summary["held_out_questions_about_images_asked_about"]
    if shared:
        text = f"{shared:,} held-out questions are about images that other questions are asked about."
        notes.append(Note(text, warning=True))
    return notes


def _verdicts(summary: Mapping[str, Any]) -> list[Piece]:
    """Say of each round whether its gain is significant."""
    notes: list[Piece] = []
    for one in summary["rounds"]:
        gain, number = one["gain"], one["round"]
        if one["accepted"]:
            notes.append(Note(f"Round {number}: a significant gain of {gain['difference']:.2f} points."))
        elif gain["significant"]:
            text = f"Round {number}: significantly worse by {-gain['difference']:.2f} points; its model is not kept."
            notes.append(Note(text, warning=True))
        else:
            text = (
                f"Round {number}: the gain of {gain['difference']:+.2f} points is not significant "
                f"({_interval_of(gain)}); the round's model is not kept."
            )
            notes.append(Note(text, warning=True))
    if summary["stopped_because"]:
        notes.append(Note(f"Stopped: {summary['stopped_because']}."))
    return notes


def _interval_of(gain: Mapping[str, Any]) -> str:
    ends = gain["confidence_interval"]
    if ends is None:
        return "no interval"
    p_value = gain["p_value"]
    return f"{100 * (1 - gain['level']):g} % interval {ends[0]:+.2f} to {ends[1]:+.2f}, p = {p_value:.3g}"


def _round_table(summary: Mapping[str, Any]) -> Table:
    start = summary["start"]
    most = max(100.0, *(one["evaluate"]["score"] for one in summary["rounds"]), start["score"])

    def score(one: Mapping[str, Any]) -> list[Cell]:
        ends = one["confidence_interval"]
        bar = Bar(one["score"], f"{one['score']:.2f}", most, start["score"])
        return [bar, f"{ends[0]:.2f} to {ends[1]:.2f}" if ends else None]

    rows: list[list[Cell]] = [["start", *score(start), None, None, None, None]]
    for one in summary["rounds"]:
        gain = one["gain"]
        changed = f"{gain['better']:,} better, {gain['worse']:,} worse"
        cells: list[Cell] = [f"{gain['difference']:+.2f}", _interval_of(gain), changed]
        rows.append([f"round {one['round']}", *score(one["evaluate"]), *cells, "yes" if one["accepted"] else "no"])
    header = ["", start["metric"], "95 % interval", "gain", "of the gain, paired", "answers", "kept"]
    return Table(header, rows, legend="start")


def _score_chart(summary: Mapping[str, Any]) -> list[Piece]:
    """Draw the scores over the rounds, with the ends of their intervals."""
    results = [(0, summary["start"]), *((one["round"], one["evaluate"]) for one in summary["rounds"])]
    if len(results) < 2:
        return []
    numbers = [number for number, _ in results]
    lines = [Series("held-out score", numbers, [one["score"] for _, one in results])]
    if all(one["confidence_interval"] for _, one in results):
        for end in (0, 1):
            lines.append(
                Series("95 % interval", numbers, [one["confidence_interval"][end] for _, one in results], True)
            )
    return [LineChart("Held-out score by round", lines, "round", summary["start"]["metric"])]


def _categories(summary: Mapping[str, Any]) -> list[Piece]:
    results = [("start", summary["start"]), *((f"round {one['round']}", one["evaluate"]) for one in summary["rounds"])]
    names = list(summary["start"]["categories"])
    if not names:
        return []
    rows: list[list[Cell]] = [[name, *(one["categories"].get(name) for _, one in results)] for name in names]
    return [Table(["category", *(name for name, _ in results)], rows)]


def _preference_table(rounds: Sequence[Mapping[str, Any]]) -> Table:
    """Return what became of the answers of each round."""
    made = [one["preferences"] for one in rounds]
    keys = list(dict.fromkeys(key for one in made for key in one["counts"]))
    rows: list[list[Cell]] = [["questions asked", *(one["asked"] for one in made)]]
    rows += [[key.replace("_", " "), *(one["counts"].get(key, 0) for one in made)] for key in keys]
    rows += [["questions with pairs", *(one["questions_with_pairs"] for one in made)]]
    rows += [["preferences", *(one["written"] for one in made)]]
    return Table(["", *(f"round {one['round']}" for one in rounds)], rows)


def _cost_table(summary: Mapping[str, Any]) -> Table:
    rows: list[list[Cell]] = [["start", None, None, summary["start"]["seconds"], None]]
    for one in summary["rounds"]:
        dollars = one["preferences"]["dollars"]
        cost = "unknown" if dollars is None else f"{dollars:,.4f}"
        rows.append([f"round {one['round']}", *(one[stage]["seconds"] for stage in _STAGES), cost])
    return Table(["", *(f"{stage}, seconds" for stage in _STAGES), "judge, dollars"], rows)


def _time_chart(summary: Mapping[str, Any]) -> Table:
    """Draw the time of each stage."""
    bars: list[tuple[str, float, float | None]] = [("start, evaluate", summary["start"]["seconds"], None)]
    for one in summary["rounds"]:
        bars += [(f"round {one['round']}, {stage}", one[stage]["seconds"], None) for stage in _STAGES]
    most = max(value for _, value, _ in bars) or 1.0
    return bar_chart("Seconds of each stage", ("stage", "seconds"), bars, maximum=most, percent=False)


def _count(changes: Sequence[AnswerChange]) -> str:
    better = sum(one.is_better for one in changes)
    return f"{better} held-out answers that became better, {len(changes) - better} that became worse, drawn at random."


def _change_card(one: AnswerChange) -> Card:
    rows: list[list[Cell]] = [["question", one.question], ["before", one.before], ["after", one.after]]
    rows.append(["right answer", one.truth])
    return Card(one.id, [Table(["", ""], rows)], one.pictures, "better" if one.is_better else "worse")


def _lineage(rounds: Sequence[Mapping[str, Any]]) -> Table:
    """Return the way from each round's model to the next, with the runs and the hashes of the files between."""
    rows: list[list[Cell]] = [
        [
            f"round {one['round']}",
            f"{one['start_model']} ({one['start_hash']})",
            f"{one['preferences']['file']} ({one['preferences']['hash']})",
            one["tune"]["data_hash"],
            one["tune"]["mlflow_run_id"],
            f"{one['tune']['bundle']} ({one['tune']['bundle_hash']})",
        ]
        for one in rounds
    ]
    return Table(["", "model", "preferences", "prepared data", "run of the tuning", "tuned model"], rows)
