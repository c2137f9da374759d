"""review.py: items → calls → reviewers → ledger → figures; the same command goes on where it stopped."""

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_ray.config.recipes import load_settings
from llava_ray.config.review import ReviewConfig
from llava_ray.errors import ConfigError
from llava_ray.review.batches import Batches, batch_client
from llava_ray.review.calls import Call, CallPlan, list_judges
from llava_ray.review.ledger import close_ledger, open_ledger
from llava_ray.review.ledger_file import LedgerFile, read_final_rows
from llava_ray.review.pool import Pool, Progress
from llava_ray.review.rates import Purse
from llava_ray.runtime import connected
from pipelines.review_inputs import Inputs, choose_rubric, read_inputs
from pipelines.review_report import write_review

SECONDS_BETWEEN_LINES = 5.0
TYPICAL_OUTPUT = 250  # tokens of a review


@dataclass(frozen=True)
class Outcome:
    """What a review came to."""

    complete: bool
    report: Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """Everything a review needs before the first call."""

    config: ReviewConfig
    inputs: Inputs
    plan: CallPlan
    output: Path
    ledger: Path

    def waiting(self) -> list[int]:
        """Return the calls that have no reply in the ledger, by number."""
        done = {row["key"] for row in read_final_rows(self.ledger) if row["state"] == "done"}
        return [index for index, call in enumerate(self.plan) if call.key not in done]

    def likely_dollars(self, call: Call) -> float:
        """Return what a call costs if its review is as long as most."""
        price, longest = self.plan.judges[call.judge].price, self.config.judge.max_tokens
        return price.cost(call.tokens - longest, min(longest, TYPICAL_OUTPUT)) if price else 0.0


def prepare(arguments: Sequence[str]) -> Job:
    """Read settings and inputs, and word every call once. Raises ConfigError, DataError."""
    config = load_settings(ReviewConfig, arguments)
    judges = list_judges(config.judge)
    unpriced = [judge.model for judge in judges if judge.price is None]
    if config.budget.dollars is not None and unpriced:
        raise ConfigError(
            f"budget.dollars needs the price of {', '.join(unpriced)}: give --judge.input_dollars and "
            "--judge.output_dollars (dollars for a million tokens; 0 for a judge of your own)"
        )
    review = config.review
    inputs = read_inputs(review)
    plan = CallPlan(inputs.items, choose_rubric(review), judges, both_orders=review.both_orders, samples=review.samples)
    output = Path(review.output)
    return Job(config, inputs, plan, output, Path(review.ledger) if review.ledger else output / "ledger.jsonl")


def describe(arguments: Sequence[str]) -> dict[str, Any]:
    """Say what a review would ask and cost; nothing is sent."""
    job = prepare(arguments)
    waiting = job.waiting()
    calls = [job.plan[index] for index in waiting]
    priced = all(judge.price for judge in job.plan.judges.values())
    tokens, requests = sum(call.tokens for call in calls), len(calls)
    limits = job.config.limits
    minutes = max(requests / (limits.requests_per_minute or 1e9), tokens / (limits.tokens_per_minute or 1e9))
    told = {
        "items": len(job.inputs.items),
        "judges": list(job.plan.judges),
        "rubric": job.plan.rubric.version,
        "calls": len(job.plan),
        "in the ledger already": len(job.plan) - requests,
        "to send": requests,
        "tokens, about": tokens,
        "dollars, about": round(sum(map(job.likely_dollars, calls)), 4) if priced else "price not known",
        "dollars, at most": round(sum(call.dollars for call in calls), 4) if priced else "price not known",
        "minutes, at least": round(minutes, 1),
    }
    for name, value in told.items():
        print(f"  {name:<22} {value:,}" if isinstance(value, int | float) else f"  {name:<22} {value}")
    return told


def review(arguments: Sequence[str]) -> Outcome:
    """Review what is not reviewed yet, write reports, and say whether everything came to an end."""
    job = prepare(arguments)
    job.output.mkdir(parents=True, exist_ok=True)
    (job.output / "resolved.json").write_text(job.config.model_dump_json(indent=1) + "\n")
    started, waiting = time.monotonic(), job.waiting()
    progress = Progress(len(job.plan), len(job.plan) - len(waiting))
    print(f"{len(job.plan):,} reviews, {progress.cached:,} of them in the ledger already", flush=True)
    if waiting and job.config.judge.delivery == "batch":
        work_in_batches(job, waiting, progress)
    elif waiting:
        with connected(job.config.cluster):
            work(job, waiting, progress)
    report = write_review(job.config, job.plan, job.inputs, job.output, job.ledger, progress)
    print(f"  report   {job.output}/report.html   ({time.monotonic() - started:.0f} s)")
    return Outcome(report["complete"], report)


def work(job: Job, waiting: Sequence[int], progress: Progress) -> None:
    """Open the ledger and have the calls made. Raises ConfigError if another review is writing the ledger."""
    ledger = open_ledger(job.ledger, session=uuid.uuid4().hex[:12])
    pool = Pool(job.plan, job.config.limits, job.config.budget, ledger)
    spoken = -SECONDS_BETWEEN_LINES
    try:
        for seen in pool.run(waiting, job.config.review.num_reviewers, progress):
            if time.monotonic() - spoken > SECONDS_BETWEEN_LINES:
                spoken = time.monotonic()
                print(line(seen), flush=True)
    finally:
        pool.close()
        close_ledger(ledger)
    print(line(progress), flush=True)


def work_in_batches(job: Job, waiting: Sequence[int], progress: Progress) -> None:
    """Send calls over the Batch API and wait for them. Raises ConfigError, JudgeError."""
    ledger = LedgerFile(job.ledger, uuid.uuid4().hex[:12])
    purse = Purse(job.config.budget.dollars)
    try:
        for name, spec in job.plan.judges.items():
            indices = [index for index in waiting if job.plan.slots[index][1] == name]
            batches = Batches(job.plan, spec, ledger, batch_client(spec), purse, job.config.judge.batch_poll_s)
            for seen in batches.run(indices, progress):
                print(line(seen), flush=True)
    finally:
        ledger.close()


def line(progress: Progress) -> str:
    """Say how far the job is."""
    left = progress.remaining_s
    parts = [
        f"{progress.cached + progress.done + progress.failed:,}/{progress.total:,} reviewed",
        f"{progress.rate:.1f}/s",
        f"${progress.spent:.4f} spent",
        *([f"{left:.0f} s left"] if left else []),
        *(f"{getattr(progress, name):,} {name}" for name in ("unparsed", "failed", "broke") if getattr(progress, name)),
        *([f"{progress.num_deaths} reviewers replaced"] if progress.num_deaths else []),
        *([f"stopped: {progress.stopped}"] if progress.stopped else []),
    ]
    return "  ".join(parts)
