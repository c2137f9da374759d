"""Answers and what each means, written by hand: every robust rule reads them so, or not at all where told."""

import json
from pathlib import Path
from typing import Any

import pytest

from evals.benchmark import Grade, Question
from evals.catalogue import make_benchmark
from evals.letters import parse_letter
from evals.yes_no import parse_yes_no

ROWS = [json.loads(line) for line in (Path(__file__).parent / "answer_table.jsonl").read_text("utf-8").splitlines()]
RULES = {
    "number": "chartqa",
    "open": "mmmu",
    "words": "gqa",
    "exact": "custom",
    "vqa": "vqav2",
    "anls": "docvqa",
    "mixed": "realworldqa",
}


def truths(text: str) -> tuple[str, ...]:
    parts = [part.partition("*") for part in text.split(", ")]
    return tuple(word for word, _, times in parts for _ in range(int(times or 1)))


def value(row: dict[str, Any], reply: str) -> Any:
    """Return what a rule makes of a reply: a letter, yes or no, a score, or "unparsed"."""
    if row["rule"] == "letter":
        return parse_letter(reply, row["options"]) or "unparsed"
    if row["rule"] == "yes_no":
        return parse_yes_no(reply) or "unparsed"
    grade = graded(row["rule"], row["truth"], reply)
    return "unparsed" if grade.state == "unparsed" else grade.score


def graded(rule: str, truth: str, reply: str) -> Grade:
    found = truths(truth) if rule == "vqa" else (truth,)
    facts = {"rule": "exact", "answer_ids": list(range(len(found)))}
    return make_benchmark(RULES[rule]).grade(Question("1", "?", truths=found, facts=facts), reply, "robust")


def test_the_table_is_large_and_says_nothing_twice() -> None:
    assert len(ROWS) >= 400
    assert {row["rule"] for row in ROWS} == {"letter", "yes_no", *RULES}
    assert len({json.dumps({key: row[key] for key in row if key != "expected"}) for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("rule", ["letter", "yes_no", *RULES])
def test_answers_mean_what_a_person_says_they_mean(rule: str) -> None:
    differing = [
        (row, found)
        for row in ROWS
        if row["rule"] == rule and not same(found := value(row, row["reply"]), row["expected"])
    ]
    assert differing == []


def same(found: Any, expected: Any) -> bool:
    numbers = isinstance(found, float) and isinstance(expected, int | float)
    return abs(found - expected) < 1e-4 if numbers else bool(found == expected)
