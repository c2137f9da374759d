"""The outputs of a review: report.json, reviews.jsonl, LLaVA's review files, report.html, MLflow."""

import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.benchmark import Question
from evals.scoring import find_versions
from llava_ray.config.review import ReviewConfig
from llava_ray.errors import ConfigError
from llava_ray.reading import describe_error
from llava_ray.report.rendering import write_report
from llava_ray.report.review import Disagreement, review_report
from llava_ray.review.calls import CallPlan
from llava_ray.review.ledger_file import Account, read_account
from llava_ray.review.pool import Progress
from llava_ray.review.prices import ALIASES, AS_OF
from pipelines.evaluation_results import thumbnails
from pipelines.review_inputs import Inputs
from pipelines.review_results import (
    Judged,
    collect,
    comparisons,
    question_rows,
    reason_of,
    summarize_reviews,
    top_reason,
    write_llava_reviews,
    write_review_json,
    write_rows,
)

_MAX_DISAGREEMENTS, _MAX_LISTED, _MAX_WHY = 40, 200, 400
_EXPERIMENT = "llava_ray review"


def write_review(
    config: ReviewConfig, plan: CallPlan, inputs: Inputs, output: Path, ledger: Path, progress: Progress
) -> dict[str, Any]:
    """Write all outputs of a review, and return report.json's contents."""
    judged = collect(plan, ledger)
    results = summarize_reviews(config, plan, inputs, judged)
    report = {
        **_completeness(judged, progress),
        "results": results,
        "comparisons": comparisons(judged, inputs.models),
        **_accounts(config, plan, judged, read_account(ledger)),
        "missing_answers": {name: list(ids[:_MAX_LISTED]) for name, ids in inputs.missing.items()},
        "without_scores": _listed(judged, config.judge.max_tokens),
        "warnings": warnings(config, plan),
        "provenance": _describe_judges(config, plan),
    }
    write_rows(output / "reviews.jsonl", judged)
    write_llava_reviews(output, judged)
    write_review_json(output / "report.json", report)
    shown, num = _disagreements(judged, inputs.questions)
    title = f"Review: {config.review.benchmark or Path(str(config.review.questions)).stem}"
    write_report(output / "report.html", review_report(title, report, shown, num))
    _keep(config, output, report)
    for one in results:
        score = "no result" if one["score"] is None else f"{one['score']:.2f}"
        print(f"{one['metric']}: {score}  ({one['match']})")
        if "withheld" in one:
            print(f"  {one['withheld']}")
    _tell_reasons(judged, config.judge.max_tokens)
    if not report["complete"]:
        print(f"  partial: {report['partial_because']}")
    if not any(one["done"] for one in results):
        print("  nothing was scored")
    return report


def _tell_reasons(judged: Sequence[Judged], max_tokens: int) -> None:
    """Print the number of reviews without scores, and the main reason."""
    num, most, why = top_reason(judged, max_tokens)
    if num:
        print(f"  {num:,} of {len(judged):,} reviews have no scores, {most:,} of them because: {why}")


def _completeness(judged: Sequence[Judged], progress: Progress) -> dict[str, Any]:
    """Return whether every review has ended (done, or failed and listed), or the reason why not."""
    num_open = sum(one.row is None for one in judged)
    if not num_open:
        stopped = "" if progress.signal else progress.stopped  # the calls in flight were the last ones
        return {"complete": not stopped, "partial_because": stopped}
    spent = f"${progress.spent:.4f} of the budget are spent and the next call might not fit" if progress.broke else ""
    why = progress.stopped or spent or "it was interrupted"
    return {"complete": False, "partial_because": f"{num_open} of {len(judged)} reviews are open: {why}"}


def _accounts(config: ReviewConfig, plan: CallPlan, judged: Sequence[Judged], account: Account) -> dict[str, Any]:
    """Return calls and cost of everything in the ledger."""
    priced = all(judge.price for judge in plan.judges.values())
    done = sum(one.row is not None and one.row["state"] == "done" for one in judged)
    dollars = round(account.spent, 6) if priced else None
    return {
        "calls": {
            "reviews": len(judged),
            "sent": account.sent,
            "refused": account.refused,
            "uncertain": account.uncertain,
            "paid_without_scores": account.wasted,
        },
        "cost": {
            "dollars": dollars,
            "dollars_per_100_reviews": round(100 * account.spent / done, 6) if priced and done else None,
            "budget": config.budget.dollars if priced else None,
            "prompt_tokens": account.prompt_tokens,
            "cached_prompt_tokens": account.cached_tokens,
            "output_tokens": account.output_tokens,
            "prices_as_of": "given" if config.judge.input_dollars is not None else AS_OF if priced else None,
        },
    }


def _listed(judged: Sequence[Judged], max_tokens: int) -> list[dict[str, Any]]:
    """Return the reviews that have no scores, each with its reason."""
    found = []
    for one in judged:
        review = one.review
        if review.state in ("failed", "unparsed"):
            call_fields = {
                "judge": one.call.judge,
                "match": one.call.pair,
                "order": one.call.order,
                "sample": one.call.sample,
            }
            found.append(
                {"question_id": one.item.id, **call_fields, "state": review.state, "reason": reason_of(one, max_tokens)}
            )
    return found[:_MAX_LISTED]


def warnings(config: ReviewConfig, plan: CallPlan) -> list[str]:
    """Return warnings about the judges."""
    aliases = [judge.model for judge in plan.judges.values() if judge.model in ALIASES]
    return [
        f"{name} is an alias that will mean another model one day; {ALIASES[name]} would not" for name in aliases
    ] + (
        ["judge.sees_images is set and no question has an image: the judge saw descriptions only"]
        if config.judge.sees_images and not any(item.image for item in plan.items)
        else []
    )


def _describe_judges(config: ReviewConfig, plan: CallPlan) -> dict[str, Any]:
    """Describe judges, inputs and rubric."""
    judge = config.judge
    return {
        "judges": ", ".join(plan.judges),
        "rubric": plan.rubric.version,
        "mode": config.review.mode,
        "both_orders": config.review.both_orders,
        "samples": config.review.samples,
        "temperature": judge.temperature,
        "max_tokens": judge.max_tokens,
        "seed": judge.seed,
        "response_format": judge.response_format,
        "sees_images": judge.sees_images,
        "questions": config.review.questions or f"{config.review.benchmark} in {config.review.data}",
        "answers": ", ".join(config.review.answers),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        **find_versions(),
        "machine": platform.machine(),
    }


def _disagreements(judged: Sequence[Judged], questions: Sequence[Question]) -> tuple[list[Disagreement], int]:
    """Return questions with different winners, the largest disagreements first, and their number."""
    by_id = {question.id: question for question in questions}
    found: list[tuple[float, Mapping[str, Any]]] = []
    for row in question_rows(judged):
        leads: dict[tuple[str, ...], list[float]] = {}
        for review in row["reviews"]:
            if review["scores"] and len(review["scores"]) == 2:
                leads.setdefault(tuple(review["names"]), []).append(review["scores"][0] - review["scores"][1])
        spread = max((max(some) - min(some) for some in leads.values() if len({_sign(x) for x in some}) > 1), default=0)
        if spread:
            found.append((spread, row))
    found.sort(key=lambda pair: -pair[0])
    return [_shown(row, by_id[row["question_id"]]) for _, row in found[:_MAX_DISAGREEMENTS]], len(found)


def _shown(row: Mapping[str, Any], question: Question) -> Disagreement:
    verdicts = [
        (
            f"{review['judge']}, {' | '.join(review['names'])}, {review['order']}",
            " ".join(f"{score:g}" for score in review["scores"] or ()) or review["state"],
            str(review["content"] or review["reason"] or "")[:_MAX_WHY],
        )
        for review in row["reviews"]
    ]
    title = f"{row['question_id']}, {row['category']}"
    return Disagreement(title, row["question"], row["answers"], verdicts, thumbnails(question))


def _sign(lead: float) -> int:
    return (lead > 0) - (lead < 0)


def _keep(config: ReviewConfig, output: Path, report: Mapping[str, Any]) -> None:
    """Log a review to MLflow; a failure is printed, since its files are written already."""
    try:
        log_review(config, output, report)
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001 - of its store, its files, its server
        print(f"  mlflow   not kept there: {describe_error(error)}")


def log_review(config: ReviewConfig, output: Path, report: Mapping[str, Any]) -> None:
    """Log metrics, settings and files to MLflow; the same folder is the same run."""
    from llava_ray.tracking import TrackedRun, default_tracking_uri

    uri = config.tracking.tracking_uri or default_tracking_uri(str(output.parent))
    run = TrackedRun(uri, config.tracking.experiment_name, output.name, str(output.resolve()))
    run.log_params({"review": report["provenance"]})
    figures = {one["metric"]: one["score"] for one in report["results"] if one["score"] is not None}
    cost = report["cost"]["dollars"]
    run.log_steps({0: {**figures, **({} if cost is None else {"review/dollars": cost})}})
    for name in ("report.json", "report.html", "reviews.jsonl", "resolved.json"):
        run.log_file(str(output / name))
    run.log_tags({"llava_ray.complete": str(report["complete"])})
    run.end()
    print(f"  mlflow   mlflow ui --backend-store-uri {uri}  (run {run.run_id})")
