"""LLaVA-Bench's own files, small and made up, and command lines that review them."""

import json
from pathlib import Path
from typing import Any

from llava_ray.review.ledger_file import read_ledger_rows

CATEGORIES = ("conv", "detail", "complex")
WORDS = ("a red bus", "two dogs", "a table", "snow", "an old bridge", "a child with a kite", "a lamp", "blue water")


def said(number: int, who: str) -> str:
    """An answer of a few words that no other question has."""
    return f"In picture {number} {who} sees {WORDS[number % 8]} and {WORDS[(number // 8 + len(who)) % 8]}."


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_review_files(folder: Path, num: int, models: tuple[str, ...] = ("model",)) -> Path:
    """Questions, contexts, references, and each model's answers; four questions an image."""
    folder.mkdir(parents=True, exist_ok=True)
    questions = [
        {
            "question_id": number,
            "image": f"{number // 4:03}.jpg",
            "text": f"What is in picture {number}?",
            "category": CATEGORIES[number % 3],
        }
        for number in range(num)
    ]
    images = sorted({str(row["image"]) for row in questions})
    write_lines(folder / "questions.jsonl", questions)
    write_lines(folder / "context.jsonl", [{"image": name, "caption": [f"A picture, {name}."]} for name in images])
    for who in ("gpt4", *models):
        rows = [
            {"question_id": n, "text": said(n, who), "answer_id": f"{who}-{n}", "model_id": who} for n in range(num)
        ]
        write_lines(folder / f"{who}.jsonl", rows)
    return folder


def flags(folder: Path, base_url: str, output: Path, *more: str, models: tuple[str, ...] = ("model",)) -> list[str]:
    """A command line of review.py."""
    return [
        *("--questions", str(folder / "questions.jsonl")),
        *("--references", str(folder / "gpt4.jsonl")),
        *("--context", str(folder / "context.jsonl")),
        *("--answers", *(str(folder / f"{model}.jsonl") for model in models)),
        *("--judge.model", "scripted"),
        *("--judge.base_url", base_url),
        *("--output", str(output)),
        *more,
    ]


def check_money(ledger: Path, cap: float) -> None:
    """Assert that what was spent and what is under way never came to more than the cap."""
    spent, under_way = 0.0, {}
    for row in read_ledger_rows(ledger):
        if row["state"] == "sent":
            under_way[row["lease"]] = row["dollars"]
        elif row.get("lease") in under_way:
            del under_way[row["lease"]]
            spent += row["dollars"]
        assert spent + sum(under_way.values()) <= cap + 1e-12
