"""Benchmarks' folders with a damaged file, through reading, scoring, report and submission: our errors, or a result."""

import contextlib
import json
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from benchmark_files import write_benchmark
from fuzzing import NUM_INPUTS, fuzz, fuzz_at_length

from evals.answers import Answer, RecordedJudge
from evals.catalogue import make_benchmark
from evals.scoring import score_answers, summarize_result
from evals.tables import format_markdown

NAMES = ("mmbench_v11", "mmstar", "mmmu_pro", "mmmu_pro_4", "mmmu_pro_vision", "mathvista", "ocrbench", "blink")
ODD: tuple[Any, ...] = (None, "", " ", "nan", 0, -1, 1e400, True, [], {}, ["a"], {"a": 1}, "[1, 2", "\x00", "A" * 5_000)
SAID = ("A", "(B)", "c", "Answer: D", "1.2", "[2007, 2008]", "", " ", "(A) or (B)", "9" * 400, "1e999", "\ud800")
TEXTS = (*SAID, "７", "x " * 500)


def change_value(generator: random.Random, value: Any) -> Any:
    """Return a JSON value with one of its parts replaced, left out or doubled."""
    if isinstance(value, dict) and value and generator.random() < 0.9:
        key = generator.choice(list(value))
        if generator.random() < 0.2:
            return {name: part for name, part in value.items() if name != key}
        return value | {key: change_value(generator, value[key])}
    if isinstance(value, list) and value and generator.random() < 0.9:
        number = generator.randrange(len(value))
        new = generator.choice(([], [value[number]] * 2, [change_value(generator, value[number])]))
        return [*value[:number], *new, *value[number + 1 :]]
    return generator.choice(ODD)


def change_table(generator: random.Random, text: str) -> str:
    """Return a tab-separated table with a cell, a line or a column changed."""
    rows = [line.split("\t") for line in text.splitlines()]
    row, column = generator.randrange(len(rows)), generator.randrange(len(rows[0]))
    kind = generator.randrange(5)
    if kind == 0:
        rows = [[*cells[:column], *cells[column + 1 :]] for cells in rows]
    elif kind == 1:
        del rows[row]
    elif kind == 2:
        rows.insert(row, rows[generator.randrange(len(rows))])
    else:
        rows[row][column] = generator.choice([str(odd) for odd in ODD] + ["7", "A", "B", '"'])
    return "".join("\t".join(cells) + "\n" for cells in rows)


def change_parquet(generator: random.Random, path: Path) -> None:
    """Write a Parquet file again with one column left out, doubled, or of another value in one row or all."""
    rows = pq.read_table(path).to_pylist()
    key, odd = generator.choice(list(rows[0])), generator.choice(ODD)
    if generator.random() < 0.2:
        rows = [{name: cell for name, cell in row.items() if name != key} for row in rows]
    elif generator.random() < 0.2:
        rows += rows[:1]
    else:
        for row in rows if generator.random() < 0.5 else rows[:1]:
            row[key] = odd
    with contextlib.suppress(pa.ArrowException, OverflowError):  # a column of two types
        pq.write_table(pa.Table.from_pylist(rows), path)


def damage_file(generator: random.Random, path: Path) -> None:
    """Damage a file within its form, or its bytes."""
    content = path.read_bytes()
    if generator.random() < 0.15:
        place = generator.randrange(len(content))
        path.write_bytes(
            content[:place] + bytes([generator.randrange(256)]) * generator.choice((0, 1)) + content[place + 1 :]
        )
    elif path.suffix == ".json":
        changed = json.dumps(change_value(generator, json.loads(content)))
        path.write_text(changed)
    elif path.suffix == ".tsv":
        path.write_text(change_table(generator, content.decode()), encoding="utf-8", errors="replace")
    else:
        change_parquet(generator, path)


def make_target() -> Callable[[int], str]:
    """Return a function from a seed to what came of a benchmark's damaged folder."""
    root = Path(tempfile.mkdtemp())
    for name in NAMES:
        write_benchmark(name, root / name)

    def run(seed: int) -> str:
        generator = random.Random(seed)
        name, copy = generator.choice(NAMES), root / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(root / name, copy)
        files = sorted(path for path in copy.rglob("*") if path.suffix in (".json", ".tsv", ".parquet"))
        damage_file(generator, generator.choice(files))
        benchmark = make_benchmark(name)
        questions = benchmark.read(copy)
        answers = [Answer(question.id, generator.choice(TEXTS)) for question in questions]
        judge = RecordedJudge({question.id: generator.choice(TEXTS) for question in questions})
        benchmark.submit(questions, {answer.id: answer.text for answer in answers})
        for profile in ("robust", "official"):
            found = summarize_result(score_answers(benchmark, questions, answers, profile, judge))
            format_markdown([found])
            assert found["score"] is None or 0 <= found["score"] <= benchmark.maximum
        return "scored"

    return run


@pytest.mark.slow
def test_damaged_folders() -> None:
    report = fuzz("benchmark_folders", make_target, NUM_INPUTS)
    assert not report.faults
    assert report.outcomes["scored"] > NUM_INPUTS / 5


@pytest.mark.verify
@pytest.mark.timeout(7200)
def test_damaged_folders_at_length() -> None:
    report = fuzz_at_length("benchmark_folders", make_target)
    assert not report.faults
