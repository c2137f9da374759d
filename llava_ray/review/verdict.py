"""Parsing of the judge's reply to scores, or to None: a failure is never a number."""

import json
import re
from dataclasses import dataclass
from typing import Any

from evals.hallucination_replies import parse_object_list_loosely, parse_rating_loosely
from llava_ray.replies import _MAX_SCORE, parse_grade, parse_pair, parse_pair_strictly, parse_score, remove_reasoning
from llava_ray.review.rubric import ReviewKind

# Fields of the strict schema, in the order of the answers as the judge sees them.
_SCORES: dict[ReviewKind, tuple[str, ...]] = {
    "pair": ("score_1", "score_2"),
    "single": ("score",),
    "grade": ("correctness",),
}
_LOWEST: dict[ReviewKind, float] = {"pair": 1.0, "single": 1.0, "grade": 0.0}
_HIGHEST: dict[ReviewKind, float] = {"pair": _MAX_SCORE, "single": _MAX_SCORE, "grade": 1.0}
_OWN_FORM: tuple[ReviewKind, ...] = ("rating", "objects")
"""Kinds whose replies have a benchmark's own form, never a schema's."""
_FENCED = re.compile(r"```(?:json)?\s*(\{.*\})\s*```", re.DOTALL | re.IGNORECASE)
NO_SCORES = "no scores in"
_MAX_JSON = 100_000  # characters


@dataclass(frozen=True)
class ReviewVerdict:
    """The scores of the answers, in the judge's order, with the explanation."""

    scores: tuple[float, ...]
    explanation: str = ""


def build_response_format(kind: ReviewKind, longest: int | None = None, *, with_bounds: bool = True) -> dict[str, Any]:
    """Build ``response_format`` with a strict schema; the explanation precedes the scores that follow from it.

    ``longest`` bounds the characters of the explanation. Without bounds scores and explanation are any.
    """
    bounds = {"minimum": _LOWEST[kind], "maximum": _HIGHEST[kind]} if with_bounds else {}
    explanation: dict[str, Any] = {"type": "string"} | ({"maxLength": longest} if longest and with_bounds else {})
    fields = {"explanation": explanation} | {name: {"type": "number", **bounds} for name in _SCORES[kind]}
    body = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    return {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": body}}


def read_verdict(reply: str, kind: ReviewKind, *, as_json: bool, strictly: bool = False) -> ReviewVerdict | None:
    """Return a reply's verdict, or None if it holds none. ``strictly``: a pair by LLaVA's rule alone."""
    if kind in _OWN_FORM:
        return _read_own_form(reply, kind)
    text = (remove_reasoning(reply) or "") if not strictly else reply
    if as_json or (not strictly and text.startswith("{") and _read_json_verdict(text, kind)):
        return _read_json_verdict(text, kind)
    explanation = text.partition("\n")[2].strip()
    if kind == "pair":
        pair = (parse_pair_strictly if strictly else parse_pair)(text)
        return ReviewVerdict(pair, explanation) if pair else None
    number = parse_score(text) if kind == "single" else parse_grade(text)
    return None if number is None else ReviewVerdict((number,), explanation)


def _read_own_form(reply: str, kind: ReviewKind) -> ReviewVerdict | None:
    """Return the rating of a reply, or the number of the objects that it lists."""
    if kind == "rating":
        rating = parse_rating_loosely(reply)
        return None if rating is None else ReviewVerdict((float(rating),), (remove_reasoning(reply) or "").strip())
    listed = parse_object_list_loosely(reply)
    return None if listed is None else ReviewVerdict((float(len(listed)),))


def _read_json_verdict(reply: str, kind: ReviewKind) -> ReviewVerdict | None:
    """Parse a reply that is exactly one object of the schema, with every number within its range."""
    if len(reply) > _MAX_JSON:
        return None
    fenced = _FENCED.fullmatch(reply.strip())
    try:
        content = json.loads(fenced[1] if fenced else reply, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or content.keys() != {"explanation", *_SCORES[kind]}:
        return None
    numbers = [content[name] for name in _SCORES[kind]]
    if not all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers):
        return None
    if not all(_LOWEST[kind] <= number <= _HIGHEST[kind] for number in numbers):
        return None
    return ReviewVerdict(tuple(float(number) for number in numbers), str(content["explanation"]))


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object from its members. Raises ValueError for a repeated one, which would be ambiguous."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a member is there twice")
    return found


def describe_missing_scores(content: str, finish_reason: str, max_tokens: int) -> str:
    """Describe why a reply holds no scores."""
    cut = f", cut off after judge.max_tokens = {max_tokens}: raise it" if finish_reason == "length" else ""
    if not remove_reasoning(content):
        found = "nothing but thoughts" if content.strip() else "an empty reply"
        return f"{found}{cut or f' (finish_reason {finish_reason!r})'}"
    return f"{NO_SCORES} {content[:80]!r}{cut}"


def format_verdict(verdict: ReviewVerdict) -> str:
    """Format a verdict for LLaVA's scripts: the scores on the first line, then the explanation."""
    scores = " ".join(f"{score:g}" for score in verdict.scores)
    return f"{scores}\n{verdict.explanation}" if verdict.explanation else scores
