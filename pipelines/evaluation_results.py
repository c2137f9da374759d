"""The outputs of an evaluation: results, grades, submission files, reports in HTML and Markdown, MLflow."""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from evals.answers import Answer, match_answers, read_answers, read_reviews
from evals.benchmark import Benchmark, Judge, Profile, Question
from evals.catalogue import make_benchmark
from evals.comparison import write_result
from evals.files import as_json, hash_files
from evals.published import comparison_note, published_scores
from evals.scoring import Result, summarise_unscored, summarize_result
from evals.scoring import score_answers as score_benchmark
from evals.tables import flat_metrics, format_markdown
from llava_ray.config.data import MAX_IMAGE_PIXELS
from llava_ray.errors import DataError, ImageError
from llava_ray.images.opening import open_image
from llava_ray.report.evaluation import Mistake, Scored, evaluation_report
from llava_ray.report.pieces import Picture
from llava_ray.report.rendering import write_report

PROVENANCE = "provenance.json"
_MAX_MISTAKES = 60
_THUMBNAIL = (320, 320)
_EXPERIMENT = "llava_ray evaluation"


@dataclass(frozen=True)
class ScoreRequest:
    """A scoring request: a benchmark's folder, an answers file, a profile, and a judge's replies if needed."""

    benchmark: str
    data: Path
    answers: Path
    profile: Profile
    reviews: Path | None = None


@dataclass(frozen=True)
class ScoredAnswers:
    """A benchmark with its questions, answers and result (None where only a server can score)."""

    benchmark: Benchmark
    questions: Sequence[Question]
    answers: Mapping[str, str]
    result: Result | None
    summary: dict[str, Any]


def score_answers_file(
    request: ScoreRequest, max_questions: int | None = None, *, without_judge: bool = False
) -> ScoredAnswers:
    """Read and score all questions, or the first ``max_questions``. Raises ConfigError or DataError.

    ``without_judge``: what needs a judge and has none, or lacks its authors' tools, comes back without a score, instead
    of as an error.
    """
    benchmark = make_benchmark(request.benchmark)
    if not request.data.is_dir():
        raise DataError(f"there is no folder {request.data}; evals/README.md says what {benchmark.title} needs in it.")
    questions, answers = benchmark.read(request.data)[:max_questions], read_answers(request.answers)
    judge: Judge | None = read_reviews(request.reviews) if request.reviews else None
    made = _describe_answers_origin(request, questions, answers)
    if reason := _why_unscored(benchmark, questions, request, without_judge=without_judge):
        summary = summarise_unscored(benchmark, questions, answers, request.profile, made, reason)
        return ScoredAnswers(benchmark, questions, match_answers(questions, answers).answers, None, summary)
    result = score_benchmark(benchmark, questions, answers, request.profile, judge, made)
    return ScoredAnswers(benchmark, questions, result.joined.answers, result, summarize_result(result))


def _why_unscored(
    benchmark: Benchmark, questions: Sequence[Question], request: ScoreRequest, *, without_judge: bool
) -> str | None:
    """Return the reason why answers cannot be scored here, or None."""
    if questions and not any(question.truths for question in questions):
        return "these questions come without answers: a server scores the submission file"
    if without_judge and (lacking := benchmark.lacks(request.profile)):
        return lacking
    if without_judge and request.profile in benchmark.needs_judge and request.reviews is None:
        return f"{benchmark.title} needs a judge: have the answers reviewed, then score them with its reviews"
    return None


def _describe_answers_origin(
    request: ScoreRequest, questions: Sequence[Question], answers: Sequence[Answer]
) -> dict[str, Any]:
    """Describe the scored data and profile, and the answers' generation if a file beside them has it."""
    prompts = [question.prompt for question in questions]
    provenance_file = request.answers.parent / PROVENANCE
    provenance = json.loads(provenance_file.read_text(encoding="utf-8")) if provenance_file.exists() else {}
    asked = next((answer.prompt for answer in answers if answer.prompt), prompts[0] if prompts else "")
    return {
        "profile": request.profile,
        "prompt": asked,
        "prompt_hash": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16],
        "data": str(request.data),
        "data_hash": hash_files(request.data),
        "answers": str(request.answers),
        "answers_hash": hashlib.sha256(request.answers.read_bytes()).hexdigest()[:16],
        **({"reviews": str(request.reviews)} if request.reviews else {}),
        **provenance,
    }


def write_results(folder: Path, scored: Sequence[ScoredAnswers], *, own_folders: bool = False) -> None:
    """Write the report, and each benchmark's result, grades and submission, in separate folders if several."""
    for one in scored:
        own = folder / one.benchmark.name if own_folders else folder
        own.mkdir(parents=True, exist_ok=True)
        if one.result is None:
            (own / "result.json").write_bytes(as_json(one.summary))
        else:
            write_result(own, one.result)
        for name, content in one.benchmark.submit(one.questions, one.answers).items():
            target = own / "submission" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    names = ", ".join(one.benchmark.title for one in scored)
    (folder / "report.md").write_text(
        f"# {names}\n\n{format_markdown([one.summary for one in scored])}", encoding="utf-8"
    )
    write_report(folder / "report.html", evaluation_report(f"Evaluation: {names}", [_shown(one) for one in scored]))


def _shown(one: ScoredAnswers) -> Scored:
    """Return a benchmark's part of the report."""
    rows = [row for row in one.result.rows if row.score < 1] if one.result else []
    by_id = {question.id: question for question in one.questions}
    mistakes = [
        Mistake(
            row.id,
            by_id[row.id].prompt,
            thumbnails(by_id[row.id]),
            one.answers.get(row.id, ""),
            row.truth,
            row.state,
            row.score,
            row.categories,
        )
        for row in rows[:_MAX_MISTAKES]
    ]
    kind, num = one.benchmark, len(one.questions)
    published, note = published_scores(kind.name, num), comparison_note(kind.name, num)
    return Scored(kind.title, one.summary, kind.maximum, published, mistakes, len(rows), note)


def thumbnails(question: Question) -> list[Picture]:
    """Return thumbnails of a question's images, without missing or unreadable ones."""
    pictures = []
    for number, source in enumerate(question.images, start=1):
        try:
            content = source if isinstance(source, bytes) else source.read_bytes()
            image = open_image(content, f"image {number} of question {question.id!r}", max_pixels=MAX_IMAGE_PIXELS)
        except (OSError, ImageError):  # scoring needs no images, so the report does without
            continue
        image.thumbnail(_THUMBNAIL, Image.Resampling.BILINEAR)
        file = io.BytesIO()
        image.convert("RGB").save(file, "JPEG", quality=80)
        pictures.append(Picture(file.getvalue(), f"image {number} of question {question.id}"))
    return pictures


def log_evaluation(
    tracking_uri: str,
    key: str,
    summaries: Sequence[Mapping[str, Any]],
    folder: Path | None,
    experiment: str = _EXPERIMENT,
    parent_run_id: str | None = None,
) -> str:
    """Log scores, settings and files to MLflow; the same key is the same run. Return the run's id."""
    from llava_ray.tracking import TrackedRun

    run = TrackedRun(tracking_uri, experiment, Path(key).name, key, parent_run_id)
    for summary in summaries:
        run.log_params({summary["benchmark"]: summary["provenance"]})
        run.log_steps({0: flat_metrics(summary)})
    if folder is not None:
        run.log_folder(str(folder), "evaluation")
    run.end()
    return run.run_id
