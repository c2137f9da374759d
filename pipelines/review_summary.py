"""Summaries of review files, ours or LLaVA's, by LLaVA's rule, with failures excluded and counted."""

import json as json_format
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from evals.benchmarks.llava_bench import relative_score
from evals.files import need
from evals.scoring import rounded
from llava_ray.config.booleans import strip_boolean_values
from llava_ray.errors import DataError
from llava_ray.invocation import command
from pipelines.review_files import read_question_rows

_Files = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
_MAX_FAILED = 0.02
_MOST = 1e6  # a larger or not finite number is no score


def summarize(arguments: Sequence[str]) -> list[dict[str, Any]]:
    """Print relative scores by category of each file; return them."""
    return tyro.cli(
        _summarize,
        args=strip_boolean_values(arguments, {"json"}),
        prog=command("review", "summarize"),
        use_underscores=True,
    )


def _summarize(files: _Files, ignore: tuple[str, ...] = (), *, json: bool = False) -> list[dict[str, Any]]:
    """Summarize review files: 100 x mean(second) / mean(first), of all and by category.

    Args:
        files: JSON lines with question_id, tuple and, mostly, category, as LLaVA's review scripts and `review` write.
        ignore: Ids of questions to leave out.
        json: Print one JSON object a file and nothing else.
    """
    if not files:
        raise DataError("name at least one review file")
    found = [_summarize_file(path, set(ignore)) for path in files]
    for one in found:
        print(json_format.dumps(one, ensure_ascii=False) if json else _text(one))
    return found


def _summarize_file(path: Path, ignore: set[str]) -> dict[str, Any]:
    """Compute a file's relative scores without failures, (-1, -1) in LLaVA's files. Raises DataError."""
    pairs: dict[str, list[tuple[float, float]]] = defaultdict(list)
    failed = num = 0
    for row in read_question_rows(path, "reviews (question_id, tuple)"):
        if str(need(row, "question_id", path)) in ignore:
            continue
        num += 1
        scores = row["tuple"] if "tuple" in row else need(row, "score", path)
        if not isinstance(scores, list) or len(scores) != 2 or not all(map(_is_number, scores)):
            raise DataError(f"{path}: the scores of question {row['question_id']} are {scores!r}; expected two numbers")
        if min(scores) < 0:
            failed += 1
            continue
        for name in dict.fromkeys(("all", str(row.get("category", "all")))):
            pairs[name].append((float(scores[0]), float(scores[1])))
    result: dict[str, Any] = {"file": str(path), "num_reviews": num, "failed": failed}
    if failed > _MAX_FAILED * num or not pairs:
        result["withheld"] = f"{failed} of {num} reviews failed; at most 2 % may"
    figures = {name: _compute_scores(some) for name, some in sorted(pairs.items())}
    return result | {"categories": figures}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1 <= value <= _MOST


def _compute_scores(pairs: Sequence[tuple[float, float]]) -> dict[str, float | int | None]:
    first, second = (sum(pair[side] for pair in pairs) / len(pairs) for side in (0, 1))
    return {
        "relative": rounded(relative_score(pairs)),
        "first_x10": rounded(10 * first),
        "second_x10": rounded(10 * second),
        "num": len(pairs),
    }


def _text(one: dict[str, Any]) -> str:
    lines = [str(one["file"])]
    if "withheld" in one:
        lines.append(f"  no result: {one['withheld']}")
    else:
        for name, found in one["categories"].items():
            figures = f"{found['relative']:.1f} {found['first_x10']:.1f} {found['second_x10']:.1f}"
            lines.append(f"  {name} {figures}  ({found['num']} reviews)")
    return "\n".join([*lines, f"  failed {one['failed']} of {one['num_reviews']}"])
