"""The pool: keeps reviewers busy, replaces dead ones, and stops when no call can succeed."""

import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from llava_ray.config.review import BudgetConfig, LimitsConfig
from llava_ray.review.actors import call_sync, get_result
from llava_ray.review.calls import CallPlan
from llava_ray.review.limiter import start_limiter
from llava_ray.review.reviewer import Summary, start_reviewer

_BATCHES_AHEAD = 3  # per reviewer, so that a slow call in one batch does not leave it idle
_MAX_BATCH = 32
_MAX_DEATHS_WITHOUT_WORK = 5
_UPDATE_S = 1.0
_LEASE_MARGIN_S = 60.0  # beyond a request's timeout: time for the ledger's and the limiter's records


@dataclass
class Progress:
    """The progress of a job."""

    total: int
    cached: int
    done: int = 0
    unparsed: int = 0
    failed: int = 0
    broke: int = 0
    halted: int = 0
    num_deaths: int = 0
    spent: float = 0.0
    leased: float = 0.0
    stopped: str = ""
    """The reason for stopping; set from outside to stop the job."""
    signal: int = 0
    """The signal that stopped the job."""
    under_way: int = 0
    """Calls in flight while the job stops."""
    reasons: Counter[str] = field(default_factory=Counter)
    started: float = field(default_factory=time.monotonic)

    @property
    def rate(self) -> float:
        """Return the finished calls per second."""
        return (self.done + self.failed) / max(time.monotonic() - self.started, 1e-9)

    @property
    def remaining_s(self) -> float | None:
        """Return the seconds left at this rate; None before the first call is done."""
        left = self.total - self.cached - self.done - self.failed
        return left / self.rate if self.rate else None


@dataclass
class Batch:
    """The calls of a reviewer's batch, by number in the plan."""

    reviewer: str
    indices: list[int]
    keys: list[str]


class Pool:
    """The reviewers of a job, with their limiter."""

    def __init__(self, plan: CallPlan, limits: LimitsConfig, budget: BudgetConfig, ledger: ActorHandle) -> None:
        """Start the limiter; reviewers are started by ``run``."""
        self.plan, self.limits, self.ledger = plan, limits, ledger
        longest = max(judge.config.timeout_s for judge in plan.judges.values())
        self.limiter = start_limiter(limits, budget.dollars, longest + _LEASE_MARGIN_S, ledger)
        self.reviewers: dict[str, ActorHandle] = {}
        self.batches: dict[ray.ObjectRef, Batch] = {}
        self.again: list[int] = []
        self.deaths_without_work = 0
        self.failed_in_row = 0

    def run(self, indices: Sequence[int], num_reviewers: int, progress: Progress) -> Iterator[Progress]:
        """Make calls until all have ended or the job stops; yield the progress regularly.

        Raises RayActorError if reviewers die as soon as they start, or limiter or ledger are not restarted.
        """
        size = max(1, min(_MAX_BATCH, self.limits.max_concurrency // (num_reviewers * (_BATCHES_AHEAD - 1))))
        pending = iter(indices)
        for _ in range(min(num_reviewers, -(-len(indices) // size))):
            self._start()
        last_update, num_idle = time.monotonic(), 0
        while self._feed(pending, size, progress):
            ready, _ = ray.wait(list(self.batches), num_returns=1, timeout=_UPDATE_S)
            for ref in ready:
                self._collect(ref, progress)
            self._stop_if_hopeless(progress)
            if time.monotonic() - last_update > _UPDATE_S:
                last_update = time.monotonic()
                self._update_status(progress)
                yield progress
                # Do not wait for calls that only wait for a retry: all results are in the ledger.
                num_idle = num_idle + 1 if progress.stopped and not progress.under_way else 0
                if num_idle > 1:
                    break
        self._update_status(progress)
        yield progress

    def close(self) -> None:
        """Kill reviewers and limiter."""
        for actor in (*self.reviewers.values(), self.limiter):
            ray.kill(actor)
        self.reviewers.clear()

    def _start(self) -> None:
        name = f"reviewer-{uuid.uuid4().hex[:8]}"
        self.reviewers[name] = start_reviewer(name, self.plan.judges, self.limits, self.limiter, self.ledger)

    def _feed(self, fresh: Iterator[int], size: int, progress: Progress) -> bool:
        """Fill every reviewer's queue of batches; return whether any has one."""
        held = Counter(batch.reviewer for batch in self.batches.values())
        for _ in range(0 if progress.stopped else _BATCHES_AHEAD):
            for name, reviewer in self.reviewers.items():
                if held[name] < _BATCHES_AHEAD and (indices := self._next(fresh, size)):
                    calls = [self.plan[index].with_image_content() for index in indices]
                    held[name] += 1
                    keys = [call.key for call in calls]
                    self.batches[reviewer.review.remote(calls)] = Batch(name, indices, keys)
        return bool(self.batches)

    def _next(self, fresh: Iterator[int], size: int) -> list[int]:
        """Return the next calls, first those of dead reviewers."""
        indices, self.again = self.again[:size], self.again[size:]
        for index in fresh if len(indices) < size else ():
            indices.append(index)
            if len(indices) == size:
                break
        return indices

    def _collect(self, ref: ray.ObjectRef, progress: Progress) -> None:
        batch = self.batches.pop(ref)
        try:
            summary: Summary = get_result(ref)
        except RayActorError as error:
            self._replace(batch, error, progress)
            return
        self.deaths_without_work = 0
        for name in ("done", "unparsed", "failed", "broke", "halted"):
            setattr(progress, name, getattr(progress, name) + getattr(summary, name))
        progress.reasons += summary.reasons
        if summary.halted:
            self._update_status(progress)
        self.failed_in_row = summary.failed_in_row + (0 if summary.done else self.failed_in_row)

    def _replace(self, batch: Batch, error: RayActorError, progress: Progress) -> None:
        """Reclaim a dead reviewer's calls, record what may have been billed, and start another."""
        others = [ref for ref, other in self.batches.items() if other.reviewer == batch.reviewer]
        lost = [batch, *(self.batches.pop(ref) for ref in others)]
        ray.kill(self.reviewers.pop(batch.reviewer))  # it may only have lost the ledger or the limiter
        progress.num_deaths += 1
        self.deaths_without_work += 1
        uncertain = call_sync(self.ledger, "abandon", batch.reviewer, "its reviewer died")
        call_sync(self.limiter, "release_owner", batch.reviewer, uncertain)
        for one in lost:
            states = call_sync(self.ledger, "states", one.keys)
            for index, state in zip(one.indices, states, strict=True):
                if state == "done":
                    progress.done += 1
                elif state == "failed":
                    progress.failed += 1
                else:
                    self.again.append(index)
        if self.deaths_without_work >= _MAX_DEATHS_WITHOUT_WORK:
            raise error
        self._start()

    def _stop_if_hopeless(self, progress: Progress) -> None:
        if not progress.stopped and self.failed_in_row >= self.limits.give_up_after:
            reason, _ = progress.reasons.most_common(1)[0]
            progress.stopped = f"{self.failed_in_row} items failed in a row, the most with: {reason}"

    def _update_status(self, progress: Progress) -> None:
        if progress.stopped:
            call_sync(self.limiter, "stop", progress.stopped)  # each time: a restarted limiter has lost it
        status = call_sync(self.limiter, "status")
        progress.spent, progress.leased = status["spent"], status["leased"]
        progress.stopped = progress.stopped or status["halted"]
        progress.under_way = call_sync(self.limiter, "under_way") if progress.stopped else 0
