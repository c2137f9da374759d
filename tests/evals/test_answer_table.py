"""Answers and what each means, written by hand: every robust rule reads them so, or not at all where told."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evals.benchmark import Grade, Question
from evals.catalogue import make_benchmark
from evals.matching.letters import parse_letter
from evals.matching.plain_text import to_plain_text
from evals.matching.yes_no import parse_yes_no

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


CHANGES: dict[str, Callable[[str], str]] = {
    "space": lambda text: f" \n{text}\t ",
    "full stop": lambda text: f"{text}.",
    "bold": lambda text: f"**{text}**",
    "underscores": lambda text: f"__{text.strip()}__",
    "quotes": lambda text: f'"{text}"',
    "curly quotes": lambda text: f"“{text}”",
    "answer": lambda text: f"Answer: {text}",
    "bold answer": lambda text: f"**Answer:** {text}",
    "full width": lambda text: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text),
    "zero width": lambda text: "\u200b".join(text),
    "byte order mark": lambda text: f"\ufeff{text}",
    "tag": lambda text: f"<answer>{text}</answer>",
    "thought": lambda text: f"<think>Yes, no, A, 7, left.</think>\n{text}",
    "bold quotes and a full stop": lambda text: f"**“{text}.”**",
}
MARKED = re.compile(r"""[.,;:!?"'“”‘’«»「」*_`~<>{}\\$#。！…]""")


@pytest.mark.parametrize("change", CHANGES)
def test_how_an_answer_is_set_does_not_change_its_value(change: str) -> None:
    """Of the rows without marks of their own: what stands around or between their characters means nothing."""
    rows = [row for row in ROWS if to_plain_text(row["reply"]) and not MARKED.search(row["reply"])]
    changed = [(row, value(row, CHANGES[change](row["reply"]))) for row in rows]
    assert len(rows) > 400
    assert [(row, found) for row, found in changed if not same(found, row["expected"])] == []


HOSTILE = (
    "*",
    "_",
    "$a",
    "'a",
    "{",
    "\\boxed{",
    "\\frac{",
    "1",
    "1,000",
    "- 1 ",
    "no ",
    "yes, ",
    "A ",
    " not A",
    "answer is A, ",
)
HOSTILE += (
    "<think>",
    "<b>",
    "<answer>",
    "twenty ",
    "one and ",
    "hundred ",
    "½",
    "²",
    "= ",
    "so the my ",
    "1 000 ",
    "\ud800",
)


@pytest.mark.parametrize("piece", HOSTILE, ids=ascii)
def test_long_answers_of_one_piece_take_no_time_and_raise_nothing(piece: str) -> None:
    text = piece * (8_000 // len(piece))
    start = time.perf_counter()
    for row in ({"rule": "letter", "options": ["cat", "10", "A dog"]}, {"rule": "yes_no"}):
        value(row, text)
    for rule in RULES:
        value({"rule": rule, "truth": "5" if rule != "words" else "left"}, text)
    assert time.perf_counter() - start < 20  # milliseconds where nothing else runs
