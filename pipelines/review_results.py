"""The results of a review: rows per question, metrics, and LLaVA's own review files."""

import json
import re
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from evals.files import as_json
from evals.ratings import Match, compute_ratings
from evals.reviews import (
    MetricFunction,
    Review,
    ReviewState,
    compute_length_metrics,
    compute_order_metrics,
    compute_review_headline,
    compute_sample_metrics,
    compute_win_rates,
    mean_grade,
    mean_num_objects,
    mean_rating,
    mean_score,
    pair_orders,
    review_relative_score,
)
from evals.scoring import rounded
from llava_ray.config.review import ReviewConfig
from llava_ray.replies import parse_first_word, parse_pair_strictly, parse_score
from llava_ray.review.calls import Call, CallPlan, Item
from llava_ray.review.ledger_file import read_final_rows, translate_write_errors
from llava_ray.review.rubric import ReviewKind
from llava_ray.review.verdict import NO_SCORES, ReviewVerdict, describe_missing_scores, format_verdict, read_verdict
from pipelines.review_inputs import REFERENCE, Inputs

_UNFIT = re.compile(r"[^A-Za-z0-9_\-. :]+")  # characters that MLflow's metric names exclude
_FIGURES: dict[ReviewKind, tuple[str, MetricFunction]] = {
    "pair": ("relative_score", review_relative_score),
    "single": ("mean_score", mean_score),
    "grade": ("score", mean_grade),
    "rating": ("mean_rating", mean_rating),
    "objects": ("objects_per_answer", mean_num_objects),
}


@dataclass(frozen=True)
class Judged:
    """A call with its final row in the ledger (None: not ended)."""

    call: Call
    item: Item
    row: Mapping[str, Any] | None

    @property
    def review(self) -> Review:
        """Convert to a review with scores in the order of the item's answers."""
        row, item = self.row, self.item
        scores = None if row is None or row["state"] == "failed" or row["scores"] is None else tuple(row["scores"])
        if scores is not None and self.call.order == "swapped":
            scores = scores[::-1]
        state: ReviewState = "done" if scores is not None else "unparsed"
        if row is None or row["state"] == "failed":
            state = "open" if row is None else "failed"
        return Review(
            item.id,
            item.names,
            self.call.order,
            self.call.sample,
            state,
            scores,
            tuple(len(answer) for answer in item.answers),
            item.categories or (item.category,),
            item.cluster,
        )


def collect(plan: CallPlan, ledger: Path) -> list[Judged]:
    """Return every call of a plan with its final row in the ledger."""
    rows = {row["key"]: row for row in read_final_rows(ledger)}
    return [Judged(call, plan.items[slot[0]], rows.get(call.key)) for slot, call in zip(plan.slots, plan, strict=True)]


def summarize_reviews(
    config: ReviewConfig, plan: CallPlan, inputs: Inputs, judged: Sequence[Judged]
) -> list[dict[str, Any]]:
    """Compute the metrics of each judge and each match (a model, or two)."""
    groups: dict[tuple[str, str], list[Judged]] = defaultdict(list)
    for one in judged:
        groups[one.call.judge, one.call.pair].append(one)
    return [_compute_metrics(config, plan, inputs, judge, some) for (judge, _), some in groups.items()]


def _compute_metrics(
    config: ReviewConfig, plan: CallPlan, inputs: Inputs, judge: str, judged: Sequence[Judged]
) -> dict[str, Any]:
    kind = plan.rubric.kind
    name, figure = _FIGURES[kind]
    reviews = [one.review for one in judged]
    model = judged[0].item.names[-1]
    # A question without the answer of either model has no review.
    missing = tuple(dict.fromkeys(item for name in judged[0].item.names for item in inputs.missing.get(name, ())))
    gaps = [Review(item, judged[0].item.names, "given", 0, "open") for item in missing]
    given = [review for review in reviews if review.order == "given"]
    # The published score is of the given order; a missing answer counts as an open review.
    found = compute_review_headline([*given, *gaps], figure, config.review.max_failed)
    row: dict[str, Any] = {
        "judge": judge,
        "match": judged[0].call.pair,
        "model": model,
        "metric": _metric_name(config, judge, name, judged),
        **found,
        "missing_answers": len(missing),
        "samples": compute_sample_metrics(given, figure),
    }
    if kind == "pair":
        swapped = [review for review in reviews if review.order == "swapped"]
        means = mean_score(given, 0), mean_score(given, 1)
        row |= {
            "first_x10": None if means[0] is None else rounded(10 * means[0]),
            "second_x10": None if means[1] is None else rounded(10 * means[1]),
            "orders": {
                "given": rounded(review_relative_score(given)),
                "swapped": rounded(review_relative_score(swapped)),
                "both": rounded(review_relative_score([review for pair in pair_orders(reviews) for review in pair])),
            },
            **compute_order_metrics(reviews),
            **compute_length_metrics(given),
        }
    return row


def _metric_name(config: ReviewConfig, judge: str, figure: str, judged: Sequence[Judged]) -> str:
    """Return a metric's name with the judge's own id and the day of its last review."""
    done = [one.row for one in judged if one.row is not None and one.row["state"] == "done"]
    said = sorted({str(row["model"]) for row in done if row["model"]})
    day = datetime.fromtimestamp(max((row["time"] for row in done), default=0.0), UTC).date().isoformat()
    what = config.review.benchmark or Path(str(config.review.questions)).stem
    names = [name for name in judged[0].item.names if name != REFERENCE]
    parts = (what, " vs ".join(names), figure, "+".join(said) or judge, day if done else "never")
    return "/".join(_UNFIT.sub("_", part) for part in parts)


def comparisons(judged: Sequence[Judged], models: Sequence[str]) -> dict[str, Any]:
    """Compute win rates and ratings of all models, by judge, from pairs."""
    found: dict[str, Any] = {}
    by_judge: dict[str, list[Review]] = defaultdict(list)
    for one in judged:
        if len(one.item.names) == 2:
            by_judge[one.call.judge].append(one.review)
    for judge, reviews in by_judge.items():
        scored = [review for review in reviews if review.scores is not None]
        if not scored:
            continue
        ratings = compute_ratings([_match(review) for review in scored]) if len(models) > 1 else {}
        rates = [{"first": a, "second": b, **rates} for (a, b), rates in compute_win_rates(scored).items()]
        rated = {name: {key: rounded(value) for key, value in asdict(one).items()} for name, one in ratings.items()}
        found[judge] = {"win_rates": rates, "ratings": rated}
    return found


def _match(review: Review) -> Match:
    assert review.scores is not None
    lead = review.scores[0] - review.scores[1]
    first, second = review.names
    return Match(first, second, 0.5 + 0.5 * ((lead > 0) - (lead < 0)), review.cluster or review.item)


def write_rows(path: Path, judged: Sequence[Judged]) -> None:
    """Write a row for each question, match and judge, with both orders inside."""
    with replaced(path) as fresh, fresh.open("w", encoding="utf-8") as file:
        for row in question_rows(judged):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def question_rows(judged: Sequence[Judged]) -> Iterator[dict[str, Any]]:
    """Yield a row for each question, with the reviews of all judges, matches, samples and orders inside."""
    for name, group in groupby(judged, key=lambda one: one.item.id):
        some = list(group)
        first = some[0].item
        yield {
            "question_id": name,
            "category": first.category,
            "question": first.question,
            "answers": {n: text for one in some for n, text in zip(one.item.names, one.item.answers, strict=True)},
            "reviews": [_review_row(one) for one in some],
        }


def _review_row(one: Judged) -> dict[str, Any]:
    review, row = one.review, one.row or {}
    return {
        "judge": one.call.judge,
        "names": list(one.item.names),
        "order": one.call.order,
        "sample": one.call.sample,
        "state": review.state,
        "scores": None if review.scores is None else list(review.scores),
        "content": row.get("content"),
        "reason": row.get("reason"),
        "model": row.get("model"),
        "fingerprint": row.get("fingerprint"),
        "key": one.call.key,
    }


def write_llava_reviews(folder: Path, judged: Sequence[Judged]) -> list[Path]:
    """Write review files for LLaVA's scripts and ``evaluate.py score --reviews``, one per judge and match.

    Of the given order and the first sample, done ones only: a failure is no row, and no (-1, -1).
    """
    rows: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for one in judged:
        row = one.row
        if one.call.order == "given" and one.call.sample == 0 and row and row["state"] == "done" and row["scores"]:
            rows[one.call.judge, one.call.pair].append(_llava_row(one, row))
    paths = []
    for (judge, pair), some in rows.items():
        path = folder / f"review_{_file_name(judge)}_{_file_name(pair.split(' | ')[-1])}.jsonl"
        numbered = [{"id": number, **row} for number, row in enumerate(some, start=1)]
        with replaced(path) as fresh:
            fresh.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in numbered), encoding="utf-8")
        paths.append(path)
    return paths


def _llava_row(one: Judged, row: Mapping[str, Any]) -> dict[str, Any]:
    item = one.item
    ids = item.answer_ids or (item.id,) * len(item.names)
    content = _llavas_content(row, one.call.kind)
    fields = {f"answer{number}_id": name for number, name in enumerate(ids, start=1)}
    return {
        "question_id": item.id,
        **fields,
        "category": item.category,
        "content": content,
        "tuple": list(row["scores"]),
    }


def _file_name(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-." else "-" for letter in text)


def _llavas_content(row: Mapping[str, Any], kind: ReviewKind) -> str:
    """Return a reply unchanged if LLaVA's rule finds its scores, else with them on a line before it."""
    scores, said = tuple(row["scores"]), str(row["content"])
    if kind in ("rating", "objects") or _read_by_llava(said, kind) == scores:
        return said
    written = format_verdict(ReviewVerdict(scores, row["explanation"]))
    again = read_verdict(written, kind, as_json=False)
    return written if again and again.scores == scores else format_verdict(ReviewVerdict(scores))


def _read_by_llava(said: str, kind: ReviewKind) -> tuple[float, ...] | None:
    if kind == "pair":
        return parse_pair_strictly(said)
    number = parse_first_word(said) if kind == "grade" else parse_score(said)
    return None if number is None else (number,)


def top_reason(judged: Sequence[Judged], max_tokens: int) -> tuple[int, int, str]:
    """Return the number of reviews without scores, that of the most common reason, and the reason.

    What judges said instead of scores is one reason, with the first of it as an example.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for one in judged:
        if one.review.state in ("failed", "unparsed"):
            why = reason_of(one, max_tokens)
            found["" if why.startswith(NO_SCORES) else why].append(why)
    most = max(found.values(), key=len, default=[""])
    return sum(map(len, found.values())), len(most), most[0]


def reason_of(one: Judged, max_tokens: int) -> str:
    """Return the reason why a review has no scores."""
    row = one.row or {}
    if row.get("reason"):
        return str(row["reason"])
    return describe_missing_scores(str(row.get("content")), str(row.get("finish_reason") or ""), max_tokens)


def write_review_json(path: Path, report: Mapping[str, Any]) -> None:
    """Write report.json."""
    with replaced(path) as fresh:
        fresh.write_bytes(as_json(dict(report)))


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces a file atomically. Raises ConfigError."""
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with translate_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield fresh
            fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
