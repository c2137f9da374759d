"""The run of a review: items → calls → reviewers → ledger → metrics; the same command resumes."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llava_ray.config.recipes import load_settings
from llava_ray.config.review import ReviewConfig
from llava_ray.errors import ConfigError
from llava_ray.review.calls import Call, CallPlan, list_judges
from llava_ray.review.ledger_file import read_account, read_final_rows
from llava_ray.review.pool import Progress
from pipelines.review_calls import CallJob, make_calls
from pipelines.review_checks import budget_of, check_disk_room, check_key, check_output, too_dear, unheld_budget
from pipelines.review_inputs import Inputs, choose_rubric, read_inputs
from pipelines.review_report import write_review
from pipelines.review_results import replaced

_TYPICAL_OUTPUT = 250  # tokens of a review


@dataclass(frozen=True)
class Outcome:
    """The outcome of a review."""

    complete: bool
    report: Mapping[str, Any]
    signal: int = 0
    """The signal that stopped it."""

    @property
    def scored(self) -> bool:
        """Return whether any review has scores."""
        return any(one["done"] for one in self.report["results"])


@dataclass(frozen=True)
class ReviewJob:
    """The state of a review before the first call."""

    config: ReviewConfig
    inputs: Inputs
    plan: CallPlan
    output: Path
    ledger: Path
    budget: float | None
    """Budget of all calls in the ledger; None if the judge's price is unknown."""

    @cached_property
    def keys(self) -> list[str]:
        """Return the calls' keys, by number."""
        return [call.key for call in self.plan]

    @property
    def calls(self) -> CallJob:
        """Return the calls, with the settings by which they are made."""
        config = self.config
        num = config.review.num_reviewers
        return CallJob(self.plan, self.ledger, config.judge, config.limits, self.budget, num, config.cluster)

    @property
    def priced(self) -> bool:
        """Return whether the judges' prices are known."""
        return self.calls.priced

    def waiting(self) -> list[int]:
        """Return the calls that have no reply in the ledger, by number."""
        done = {row["key"] for row in read_final_rows(self.ledger) if row["state"] == "done"}
        return [index for index, key in enumerate(self.keys) if key not in done]

    def likely_dollars(self, call: Call) -> float:
        """Estimate the cost of a call with a review of typical length."""
        price, longest = self.plan.judges[call.judge].price, self.config.judge.max_tokens
        return price.cost(call.tokens - longest, min(longest, _TYPICAL_OUTPUT)) if price else 0.0


def prepare(arguments: Sequence[str]) -> ReviewJob:
    """Read settings and inputs, and build every call once. Raises ConfigError or DataError."""
    config = load_settings(ReviewConfig, arguments)
    judges = list_judges(config.judge)
    review = config.review
    inputs = read_inputs(review)
    plan = CallPlan(inputs.items, choose_rubric(review), judges, both_orders=review.both_orders, samples=review.samples)
    output = Path(review.output)
    ledger = Path(review.ledger) if review.ledger else output / "ledger.jsonl"
    return ReviewJob(config, inputs, plan, output, ledger, budget_of(config, plan, arguments))


def describe_review(arguments: Sequence[str]) -> dict[str, Any]:
    """Print the calls and cost of a review, without sending anything."""
    job = prepare(arguments)
    waiting = job.waiting()
    calls = [job.plan[index] for index in waiting]
    tokens, requests = sum(call.tokens for call in calls), len(calls)
    limits = job.config.limits
    minutes = max(requests / (limits.requests_per_minute or 1e9), tokens / (limits.tokens_per_minute or 1e9))
    summary = {
        "items": len(job.inputs.items),
        "judges": list(job.plan.judges),
        "rubric": job.plan.rubric.version,
        "calls": len(job.plan),
        "in the ledger already": len(job.plan) - requests,
        "to send": requests,
        "tokens, about": tokens,
        **(_told_dollars(job, calls) if job.priced else _told_tokens(job, calls)),
        "minutes, at least": round(minutes, 1),
    }
    for name, value in summary.items():
        print(f"  {name:<22} {value:,}" if isinstance(value, int | float) else f"  {name:<22} {value}")
    if not os.environ.get(job.config.judge.api_key_env):
        print(f"  the environment variable {job.config.judge.api_key_env} (judge.api_key_env) is not set")
    for note in (too_dear(job.budget, read_account(job.ledger).spent, calls), unheld_budget(job.config, job.budget)):
        if note:
            print(f"  {note}")
    return summary


def _told_dollars(job: ReviewJob, calls: Sequence[Call]) -> dict[str, Any]:
    """Return the estimated and the largest cost of calls."""
    return {
        "dollars, about": round(sum(map(job.likely_dollars, calls)), 4),
        "dollars, at most": round(sum(call.dollars for call in calls), 4),
        "one call, at most": f"${max((call.dollars for call in calls), default=0.0):.4f}",
    }


def _told_tokens(job: ReviewJob, calls: Sequence[Call]) -> dict[str, Any]:
    """Return the tokens of calls with an unknown price."""
    longest = job.config.judge.max_tokens
    return {
        "prompt tokens, about": sum(call.tokens - longest for call in calls),
        "output tokens, at most": longest * len(calls),
        "price": "not known; --judge.input_dollars and --judge.output_dollars give it",
    }


def review(arguments: Sequence[str]) -> Outcome:
    """Make all open reviews, write reports, and return the outcome."""
    job = prepare(arguments)
    started, waiting = time.monotonic(), job.waiting()
    progress = Progress(len(job.plan), len(job.plan) - len(waiting))
    check_output(job.output, job.plan, set(job.keys))
    if waiting:
        check_key(job.config.judge, job.plan)
        _note_budget(job, waiting, progress)
        check_disk_room(job.output, job.ledger, len(waiting), min(job.config.judge.max_tokens, _TYPICAL_OUTPUT))
    with replaced(job.output / "resolved.json") as path:
        path.write_text(job.config.model_dump_json(indent=1) + "\n", encoding="utf-8")
    print(f"{len(job.plan):,} reviews, {progress.cached:,} of them in the ledger already", flush=True)
    if note := unheld_budget(job.config, job.budget):
        print(f"  {note}")
    if waiting and not progress.broke:
        make_calls(job.calls, waiting, progress)
    report = write_review(job.config, job.plan, job.inputs, job.output, job.ledger, progress)
    print(f"  report   {job.output}/report.html   ({time.monotonic() - started:.0f} s)")
    return Outcome(report["complete"], report, progress.signal)


def _note_budget(job: ReviewJob, waiting: Sequence[int], progress: Progress) -> None:
    """Check that the budget allows any call. Raises ConfigError if it never did."""
    spent = read_account(job.ledger).spent
    why = too_dear(job.budget, spent, [job.plan[index] for index in waiting] if job.budget is not None else ())
    if why and not progress.cached:
        raise ConfigError(why)
    if why:
        progress.broke, progress.spent, progress.stopped = len(waiting), spent, why
