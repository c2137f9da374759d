"""The calls of a plan, made by reviewers or in batches; whatever ends is in the ledger, and is never paid again."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_ray.config.review import BudgetConfig, JudgeConfig, LimitsConfig
from llava_ray.config.run import ClusterConfig
from llava_ray.log_file import terminal
from llava_ray.review.batches import Batches, batch_client
from llava_ray.review.calls import CallPlan
from llava_ray.review.ledger import close_ledger, open_ledger
from llava_ray.review.ledger_file import LedgerFile
from llava_ray.review.pool import Pool, Progress
from llava_ray.review.rates import Budget
from llava_ray.runtime import connected
from pipelines.review_stop import stopping

_SECONDS_BETWEEN_LINES = 5.0


@dataclass(frozen=True)
class CallJob:
    """The calls of a plan, with the settings by which they are made."""

    plan: CallPlan
    ledger: Path
    judge: JudgeConfig
    limits: LimitsConfig
    budget: float | None
    """Budget of all calls in the ledger; None if the judge's price is unknown."""
    num_reviewers: int
    cluster: ClusterConfig

    @property
    def priced(self) -> bool:
        """Return whether the judges' prices are known."""
        return all(judge.price for judge in self.plan.judges.values())


def make_calls(job: CallJob, waiting: Sequence[int], progress: Progress) -> None:
    """Make the waiting calls. Raises ConfigError if another job is writing the ledger, JudgeError for batches."""
    if job.judge.delivery == "batch":
        _make_in_batches(job, waiting, progress)
        return
    with connected(job.cluster):
        _make_with_reviewers(job, waiting, progress)


def _make_with_reviewers(job: CallJob, waiting: Sequence[int], progress: Progress) -> None:
    ledger = open_ledger(job.ledger, session=uuid.uuid4().hex[:12])
    pool = Pool(job.plan, job.limits, BudgetConfig(dollars=job.budget), ledger)
    spoken, told = -_SECONDS_BETWEEN_LINES, False
    try:
        with stopping(progress):
            for seen in pool.run(waiting, job.num_reviewers, progress):
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


def _stop_line(job: CallJob, progress: Progress) -> str:
    """Format the message of the first signal."""
    return (
        f"Stopping: nothing new is sent; waiting for {progress.under_way} calls under way, "
        f"{job.judge.timeout_s:g} s at most (they are paid). Once more leaves at once."
    )


def _make_in_batches(job: CallJob, waiting: Sequence[int], progress: Progress) -> None:
    """Send calls over the Batch API and wait for them."""
    ledger = LedgerFile(job.ledger, uuid.uuid4().hex[:12])
    budget = Budget(job.budget)
    try:
        for name, spec in job.plan.judges.items():
            indices = [index for index in waiting if job.plan.slots[index][1] == name]
            batches = Batches(job.plan, spec, ledger, batch_client(spec), budget, job.judge.batch_poll_s)
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
