"""The outputs of the loop: summary.json with the lineage, the best model, report.html, MLflow's parent run."""

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.benchmark import Question
from llava_ray.config.improve import ImproveConfig
from llava_ray.report.improvement import AnswerChange, improvement_report
from llava_ray.report.rendering import write_report
from llava_ray.tracking import TrackedRun
from pipelines.evaluation_results import thumbnails
from pipelines.improve_loop import FinishedRound, ImprovedRounds, measure_gain, place_of_best
from pipelines.improve_overlap import AskedQuestions
from pipelines.improve_stages import HeldOutResult
from pipelines.preference_pairs import draw
from pipelines.review_results import write_review_json

_NUM_EXAMPLES = 12  # of each kind
_OF_PREFERENCES = ("rule", "recipe", "asked", "questions_with_pairs", "written", "counts", "dollars", "lengths")


def summarize_rounds(
    config: ImproveConfig, asked: AskedQuestions, found: ImprovedRounds, failed: str
) -> dict[str, Any]:
    """Return the contents of summary.json: every round from its preferences to its model, and what it gained."""
    rounds = [_summarize_round(one) for one in found.rounds]
    dollars: list[float | None] = [one["preferences"]["dollars"] for one in rounds]
    dollars += [found.unfinished["dollars"]] if found.unfinished else []
    best, start = found.best, found.start
    total = None
    if best is not None and start is not None and found.best_round:
        total = measure_gain(best.read(), start.read(), config.improve.significance)
    return {
        "complete": not (found.partial or failed),
        "stopped_because": found.stopped,
        "partial_because": found.partial,
        "failed": failed,
        "benchmark": config.improve.benchmark,
        "level": config.improve.significance,
        "objective": config.train.objective,
        "questions_to_ask": asked.total,
        "held_out_questions_about_images_asked_about": asked.shared_images,
        "start": _summarize_result(start) if start else None,
        "rounds": rounds,
        "best": {"round": found.best_round, **_summarize_result(best)} if best else None,
        "gain": total,
        "dollars": None if None in dollars else round(sum(one or 0.0 for one in dollars), 6),
        "budget": config.budget.dollars,
        "unfinished_preferences": _pick(found.unfinished, _OF_PREFERENCES) if found.unfinished else None,
    }


def _pick(summary: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: summary[key] for key in keys}


def _summarize_result(result: HeldOutResult) -> dict[str, Any]:
    summary = result.read().summary
    kept = {key: summary[key] for key in ("score", "confidence_interval", "metric", "num_questions", "num_scored")}
    places = {"model": result.model, "model_hash": result.model_hash, "answers": str(result.folder)}
    run = {"mlflow_run_id": result.note["mlflow_run_id"], "seconds": result.note["seconds"]}
    return kept | {"categories": {name: one["score"] for name, one in summary["categories"].items()}} | places | run


def _summarize_round(one: FinishedRound) -> dict[str, Any]:
    made = one.preferences
    preferences = _pick(made.summary, _OF_PREFERENCES) | {"file": str(made.path), "hash": made.note["hash"]}
    preferences |= {key: made.note[key] for key in ("mlflow_run_id", "seconds")}
    return {
        "round": one.number,
        "start_model": one.start.model,
        "start_hash": one.start.model_hash,
        "preferences": preferences,
        "tune": dict(one.tuned),
        "evaluate": _summarize_result(one.result),
        "gain": dict(one.gain),
        "accepted": one.accepted,
    }


def write_improvement(
    config: ImproveConfig, summary: Mapping[str, Any], found: ImprovedRounds, held_out: Sequence[Question]
) -> None:
    """Write summary.json, the link to the best model, and the report."""
    folder = Path(config.improve.output)
    write_review_json(folder / "summary.json", summary)
    if found.best is not None:
        _link_best(place_of_best(folder), found.best.model)
    changes = _draw_changes(found, held_out)
    write_report(folder / "report.html", improvement_report(f"Improvement: {folder.name}", summary, changes))


def _link_best(link: Path, model: str) -> None:
    """Let a link name the best model, at no moment none."""
    target = Path(model)
    if not target.exists() or (link.exists() and not link.is_symlink()):
        return  # a hub id has no folder; what is not ours stays
    fresh = link.with_name(f".model.{uuid.uuid4().hex[:8]}")
    fresh.symlink_to(os.path.relpath(target.resolve(), link.parent.resolve()))
    fresh.replace(link)


def _draw_changes(found: ImprovedRounds, held_out: Sequence[Question]) -> list[AnswerChange]:
    """Draw held-out questions that the last round, or the best one, answers otherwise than the model at the start."""
    if not found.rounds or found.start is None:
        return []
    after = found.best if found.best_round else found.rounds[-1].result
    assert after is not None
    before_rows, after_rows = ({row.id: row for row in one.read().rows} for one in (found.start, after))
    texts = [_read_answers(one.folder / "answers.jsonl") for one in (found.start, after)]
    changed = [q for q in held_out if q.id in after_rows and q.id in before_rows]
    changes: list[AnswerChange] = []
    for sign in (1, -1):
        some = [q for q in changed if sign * (after_rows[q.id].score - before_rows[q.id].score) > 0]
        for question in sorted(some, key=lambda one: draw("change", one.id))[:_NUM_EXAMPLES]:
            before, now = (text.get(question.id, "") for text in texts)
            truth = before_rows[question.id].truth
            pictures = thumbnails(question)
            changes.append(AnswerChange(question.id, question.prompt, before, now, truth, sign > 0, pictures))
    return changes


def _read_answers(path: Path) -> dict[str, str]:
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {str(row["question_id"]): str(row["text"]) for row in rows}


def log_improvement(run: TrackedRun, config: ImproveConfig, summary: Mapping[str, Any], *, status: str) -> None:
    """Log settings, scores by round, the lineage and the files to the parent's run, and close it."""
    run.log_params(config.model_dump(mode="json", exclude_defaults=True))
    steps: dict[int, dict[str, float]] = {}
    if summary["start"]:
        steps[0] = {"improve/score": summary["start"]["score"]}
    for one in summary["rounds"]:
        figures = {"score": one["evaluate"]["score"], "gain": one["gain"]["difference"]}
        figures |= {"preferences": one["preferences"]["written"], "dollars": one["preferences"]["dollars"]}
        steps[one["round"]] = {f"improve/{key}": float(value) for key, value in figures.items() if value is not None}
    run.log_steps(steps)
    tags = {"kind": "improve", "complete": str(summary["complete"])}
    for one in summary["rounds"]:
        lineage = [one["start_hash"], one["preferences"]["hash"], one["tune"]["data_hash"]]
        lineage += [one["tune"]["mlflow_run_id"], one["tune"]["bundle_hash"]]
        tags[f"round_{one['round']}"] = " > ".join(map(str, lineage))
    run.log_tags({f"llava_ray.{name}": value for name, value in tags.items()})
    for name in ("summary.json", "report.html", "resolved.json"):
        path = Path(config.improve.output) / name
        if path.exists():
            run.log_file(str(path))
    run.end(status)
