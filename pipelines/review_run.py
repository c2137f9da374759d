"""The run of a review: items → calls → reviewers → ledger → metrics; the same command resumes."""

import os
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llava_ray.config.recipes import load_settings
from llava_ray.config.review import BudgetConfig, ReviewConfig
from llava_ray.errors import ConfigError
from llava_ray.log_file import terminal
from llava_ray.review.batches import Batches, batch_client
from llava_ray.review.calls import Call, CallPlan, list_judges
from llava_ray.review.ledger import close_ledger, open_ledger
from llava_ray.review.ledger_file import LedgerFile, read_account, read_final_rows
from llava_ray.review.pool import Pool, Progress
from llava_ray.review.rates import Budget
from llava_ray.runtime import connected
from pipelines.review_checks import budget_of, check_disk_room, check_key, check_output, too_dear, unheld_budget
from pipelines.review_inputs import Inputs, choose_rubric, read_inputs
from pipelines.review_report import write_review
from pipelines.review_results import replaced
from pipelines.review_stop import stopping

_SECONDS_BETWEEN_LINES = 5.0
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
    def priced(self) -> bool:
        """Return whether the judges' prices are known."""
        return all(judge.price for judge in self.plan.judges.values())

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
        if job.config.judge.delivery == "batch":
            _work_in_batches(job, waiting, progress)
        else:
            with connected(job.config.cluster):
                _work(job, waiting, progress)
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


def _work(job: ReviewJob, waiting: Sequence[int], progress: Progress) -> None:
    """Open the ledger and make the calls. Raises ConfigError if another review is writing the ledger."""
    ledger = open_ledger(job.ledger, session=uuid.uuid4().hex[:12])
    pool = Pool(job.plan, job.config.limits, BudgetConfig(dollars=job.budget), ledger)
    spoken, told = -_SECONDS_BETWEEN_LINES, False
    try:
        with stopping(progress):
            for seen in pool.run(waiting, job.config.review.num_reviewers, progress):
                if seen.signal and not told:
                    told = True
                    print(_stop_line(job, seen), file=terminal(), flush=True)
                if time.monotonic() - spoken > _SECONDS_BETWEEN_LINES:
                    spoken = time.monotonic()
                    print(_line(seen, priced=job.priced), flush=True)
    except KeyboardInterrupt:
        print(
            f"Left at once: {progress.under_way} calls were under way; they count as paid, and are asked again.",
            file=terminal(),
        )
        raise
    finally:
        pool.close()
        close_ledger(ledger)
    print(_line(progress, priced=job.priced), flush=True)


def _stop_line(job: ReviewJob, progress: Progress) -> str:
    """Format the message of the first signal."""
    return (
        f"Stopping: nothing new is sent; waiting for {progress.under_way} calls under way, "
        f"{job.config.judge.timeout_s:g} s at most (they are paid). Once more leaves at once."
    )


def _work_in_batches(job: ReviewJob, waiting: Sequence[int], progress: Progress) -> None:
    """Send calls over the Batch API and wait for them. Raises ConfigError, JudgeError."""
    ledger = LedgerFile(job.ledger, uuid.uuid4().hex[:12])
    budget = Budget(job.budget)
    try:
        for name, spec in job.plan.judges.items():
            indices = [index for index in waiting if job.plan.slots[index][1] == name]
            batches = Batches(job.plan, spec, ledger, batch_client(spec), budget, job.config.judge.batch_poll_s)
            for seen in batches.run(indices, progress):
                print(_line(seen, priced=job.priced), flush=True)
    finally:
        ledger.close()


def _line(progress: Progress, *, priced: bool) -> str:
    """Format the progress of the job."""
    left = progress.remaining_s
    parts = [
        f"{progress.cached + progress.done + progress.failed:,}/{progress.total:,} reviewed",
        f"{progress.rate:.1f}/s",
        *([f"${progress.spent:.4f} spent"] if priced else []),
        *([f"{left:.0f} s left"] if left else []),
        *(f"{getattr(progress, name):,} {name}" for name in ("unparsed", "failed", "broke") if getattr(progress, name)),
        *([f"{progress.num_deaths} reviewers replaced"] if progress.num_deaths else []),
        *([f"stopped: {progress.stopped}"] if progress.stopped else []),
    ]
    return "  ".join(parts)
