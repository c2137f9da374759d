"""The report of an evaluation: scores with published ones, categories, and wrong answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_ray.report.pieces import (
    Bar,
    Card,
    Cell,
    Fact,
    Gallery,
    Note,
    Picture,
    Piece,
    Report,
    Section,
    Table,
    bar_chart,
)

_MAX_FACTS = 4


@dataclass(frozen=True)
class Mistake:
    """A wrong answer, with its images, prompt and truth."""

    id: str
    prompt: str
    pictures: Sequence[Picture]
    answer: str
    truth: str
    state: str
    """"scored" (wrong or half right), "unparsed", "missing" or "failed"."""
    score: float
    categories: Sequence[str] = ()


@dataclass(frozen=True)
class Scored:
    """A benchmark's summary (of ``evals.scoring.summarize_result``) with published scores and mistakes."""

    title: str
    summary: Mapping[str, Any]
    maximum: float
    published: Mapping[str, float]
    mistakes: Sequence[Mistake]
    num_mistakes: int
    """The number of all mistakes; only some are shown."""
    note: str | None = None
    """The reason for missing published scores."""


def evaluation_report(title: str, scored: Sequence[Scored]) -> Report:
    """Build the report."""
    facts = [
        Fact(one.title, _headline(one.summary), f"{one.summary['metric']}, {one.summary['profile']}")
        for one in scored[:_MAX_FACTS]
    ]
    counts = sum(one.summary["num_scored"] for one in scored)
    withheld = [one for one in scored if one.summary["score"] is None]
    return Report(
        title,
        f"{counts:,} answers scored on {len(scored)} benchmark{'s' if len(scored) > 1 else ''}. Intervals are 95 %, "
        "clustered where questions share an image.",
        [
            Section("Scores", [*_warnings(withheld), _score_table(scored), *_bars(scored)]),
            *(Section(one.title, _details(one)) for one in scored),
            Section("Method", [_provenance(one) for one in scored]),
        ],
        facts,
    )


def _warnings(withheld: Sequence[Scored]) -> list[Piece]:
    return [Note(f"{one.title}: {one.summary.get('withheld', 'no score')}.", warning=True) for one in withheld]


def _score_table(scored: Sequence[Scored]) -> Table:
    rows: list[list[Cell]] = []
    for one in scored:
        found = one.summary
        counts = f"{found['num_scored']:,} of {found.get('whole_set') or found['num_questions']:,}"
        gaps: list[Cell] = [found[key] for key in ("missing", "duplicate", "extra", "unparsed", "failed")]
        rows.append([one.title, _headline(found), _interval(found), counts, *gaps])
    header = ["benchmark", "score", "95 % interval", "scored", "missing", "duplicate", "extra", "unparsed", "failed"]
    return Table(header, rows)


def _bars(scored: Sequence[Scored]) -> list[Piece]:
    """Return bars of all scores as shares of their maximum; the mark is a published model."""
    rows = []
    model = next((next(iter(one.published)) for one in scored if one.published), "")
    for one in scored:
        if one.summary["score"] is not None:
            published = one.published.get(model)
            rows.append((one.title, one.summary["score"] / one.maximum, published and published / one.maximum))
    if not rows:
        return []
    return [bar_chart("Share of the best possible score", ("benchmark", "this model"), rows, legend=model)]


def _details(one: Scored) -> list[Piece]:
    found, pieces = one.summary, list[Piece]()
    if found.get("withheld"):
        pieces.append(Note(f"{found['withheld']}.", warning=True))
    elif found["categories"]:
        header = ["category", "score", "95 % interval", "questions"]
        rows: list[list[Cell]] = []
        for name, category in found["categories"].items():
            value = category["score"]
            bar = None if value is None else Bar(value, f"{value:.2f}", max(100.0, value))
            rows.append([name, bar, _interval(category), category["num"]])
        pieces.append(Table(header, rows, "By category"))
    if found["figures"] and not found.get("withheld"):
        pieces.append(Table(["metric", "value"], [[name, value] for name, value in found["figures"].items()]))
    if one.note:
        pieces.append(Note(f"{one.note}."))
    if one.published:
        models: list[list[Cell]] = [["this model", found["score"]]]
        models += [[name, value] for name, value in one.published.items()]
        pieces.append(Table(["model", found["metric"]], models, "Published"))
    return [*pieces, *_browser(one)]


def _browser(one: Scored) -> list[Piece]:
    if not one.mistakes:
        return [Note("Every answer is correct.")] if one.summary["num_scored"] else []
    caption = f"{len(one.mistakes):,} of {one.num_mistakes:,} answers that are not fully correct"
    single = [mistake for mistake in one.mistakes if len(mistake.pictures) == 1]
    others = [mistake for mistake in one.mistakes if len(mistake.pictures) != 1]
    gallery = [Gallery([_picture(mistake) for mistake in single])] if single else []
    return [Note(caption), *gallery, *(_card(mistake) for mistake in others)]


def _picture(mistake: Mistake) -> Picture:
    return Picture(
        mistake.pictures[0].content,
        f"image of question {mistake.id}",
        _label(mistake),
        mistake.prompt,
        mistake.answer or "(no answer)",
        mistake.truth,
        "wrong",
    )


def _card(mistake: Mistake) -> Card:
    rows: list[list[Cell]] = [["prompt", mistake.prompt], ["answer", mistake.answer], ["truth", mistake.truth]]
    return Card(mistake.id, [Table(["", ""], rows)], mistake.pictures, _label(mistake))


def _label(mistake: Mistake) -> str:
    what = f"{mistake.score:.2g} of 1" if mistake.state == "scored" and mistake.score else mistake.state
    return ", ".join([mistake.id, *mistake.categories, *([] if what == "scored" else [what])])


def _provenance(one: Scored) -> Table:
    return Table(
        ["setting", "value"], [[key, str(value)] for key, value in one.summary["provenance"].items()], one.title
    )


def _headline(summary: Mapping[str, Any]) -> str:
    return "withheld" if summary["score"] is None else f"{summary['score']:.2f}"


def _interval(summary: Mapping[str, Any]) -> str | None:
    ends = summary["confidence_interval"]
    return None if ends is None or summary.get("withheld") else f"{ends[0]:.2f} to {ends[1]:.2f}"
