"""The limiter as an actor: the cluster's single authority on rate limits and budget.

Reviewers acquire a lease before each request and settle it afterwards. A lease that is not settled in time, because
its reviewer died, expires: its largest cost then counts as spent. A killed limiter restarts from the ledger under a new
epoch, which the ledger checks, so that leases of the old one cannot be used any more.
"""

import asyncio
import contextlib
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import ray
from ray.actor import ActorHandle

from llava_ray.config.review import LimitsConfig
from llava_ray.review.actors import call_async
from llava_ray.review.headers import Reported
from llava_ray.review.rates import FIRST_CONCURRENCY, Budget, RateLimit

_LONGEST_WAIT_S = 1.0
_MIN_SYSTEMATIC = 3
SettlementOutcome = Literal["fine", "throttled", "trouble", "unused", "stop"]


@dataclass(frozen=True)
class LeaseRequest:
    """A request for a lease: estimated tokens, and the largest cost."""

    lease: str
    """The owner's name, a slash and a number."""
    tokens: float
    dollars: float

    @property
    def owner(self) -> str:
        """Return the owner of the lease."""
        return self.lease.partition("/")[0]


@dataclass(frozen=True)
class LeaseGranted:
    """A lease, granted by the limiter of this epoch."""

    epoch: str


@dataclass(frozen=True)
class LeaseRefused:
    """No lease: "broke" (over the budget), "too large" (for the rate limit), "halted" (no more leases)."""

    why: Literal["broke", "too large", "halted"]
    reason: str


@dataclass(frozen=True)
class Settlement:
    """The result of a lease; ``age_s``: seconds since the reply."""

    lease: str
    judge: str
    outcome: SettlementOutcome
    tokens: float
    dollars: float
    age_s: float
    reported: Reported = field(default_factory=Reported)
    reason: str = ""
    systematic: bool = False
    """The settings are the likely cause of the fault."""


class Limiter:
    """A rate limit per judge and one budget; runs as a Ray actor (see ``start_limiter``)."""

    def __init__(
        self,
        limits: LimitsConfig,
        cap: float | None,
        lease_s: float,
        ledger: ActorHandle | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Initialise; leases of an earlier limiter are restored from the ledger before the first grant."""
        self.limits = limits
        self.lease_s = lease_s
        self.ledger = ledger
        self.clock = clock
        self.epoch = uuid.uuid4().hex[:12]
        self.rate_limits: dict[str, RateLimit] = {}
        self.budget = Budget(cap)
        self.turns: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.changed = asyncio.Event()
        self.opening = asyncio.Lock()
        self.open = False
        self.halted = ""
        self.gone: set[str] = set()
        self.answered: set[str] = set()
        self.systematic: Counter[str] = Counter()

    async def acquire(self, judge: str, requests: Sequence[LeaseRequest]) -> list[LeaseGranted | LeaseRefused]:
        """Grant or refuse as many requests as possible now, at least the first; callers are served in order."""
        await self._ensure_restored()
        async with self.turns[judge]:
            answers: list[LeaseGranted | LeaseRefused] = []
            for request in requests:
                while (answer := self._answer(judge, request)) is None:
                    if answers:
                        return answers
                    await self._wait(self.rate_limit(judge).delay(request.tokens, self.clock()))
                answers.append(answer)
            return answers

    async def settle(self, settlements: Sequence[Settlement]) -> list[None]:
        """Settle leases, and update the rate limits from the replies' headers."""
        await self._ensure_restored()
        now = self.clock()
        for one in settlements:
            rate_limit = self.rate_limit(one.judge)
            self.budget.settle(one.lease, one.dollars)
            rate_limit.settle(one.lease, one.tokens, now - one.age_s, unused=one.outcome == "unused")
            rate_limit.observe(one.reported, now)
            self._note_systematic(one)
            if one.outcome == "fine":
                rate_limit.succeed()
            elif one.outcome == "throttled":
                rate_limit.throttle(one.reported.retry_after_s, now)
            elif one.outcome == "trouble":
                rate_limit.trouble()
            elif one.outcome == "stop":
                self.halted = self.halted or one.reason
        self._change()
        return [None] * len(settlements)

    async def release_owner(self, owner: str, lost: Mapping[str, float]) -> None:
        """End all leases of a dead reviewer: ``lost`` holds their costs, the others were never sent."""
        await self._ensure_restored()
        self.gone.add(owner)  # its pending requests are still in the queue
        now = self.clock()
        for rate_limit in self.rate_limits.values():
            for lease in [lease for lease in rate_limit.flights if lease.startswith(f"{owner}/")]:
                rate_limit.settle(lease, rate_limit.flights[lease].tokens, now)
        for lease in list(self.budget.held_by(f"{owner}/")):
            self.budget.settle(lease, lost.get(lease, 0.0))
        self._change()

    async def stop(self, reason: str) -> None:
        """Refuse all further leases."""
        self.halted = self.halted or reason
        self._change()

    async def status(self) -> dict[str, float | str]:
        """Return the spent and leased dollars, and the reason if leases are refused."""
        await self._ensure_restored()
        return {"spent": self.budget.spent, "leased": self.budget.leased, "halted": self.halted}

    async def under_way(self) -> int:
        """Return the number of leases that are not settled."""
        await self._ensure_restored()
        return len(self.budget.leases)

    def rate_limit(self, judge: str) -> RateLimit:
        """Return a judge's rate limit."""
        if judge not in self.rate_limits:
            self.rate_limits[judge] = RateLimit(self.limits, self.clock())
        return self.rate_limits[judge]

    def _note_systematic(self, one: Settlement) -> None:
        """Stop if all of a judge's first calls failed with systematic faults."""
        if one.systematic:
            self.systematic[one.judge] += 1
            enough = max(_MIN_SYSTEMATIC, min(FIRST_CONCURRENCY, self.limits.max_concurrency))
            if one.judge not in self.answered and self.systematic[one.judge] >= enough:
                self.halted = self.halted or one.reason
        elif one.outcome == "fine":
            self.answered.add(one.judge)

    def _answer(self, judge: str, request: LeaseRequest) -> LeaseGranted | LeaseRefused | None:
        if self.halted or request.owner in self.gone:
            return LeaseRefused("halted", self.halted or "its reviewer is gone")
        rate_limit, now = self.rate_limit(judge), self.clock()
        self._expire(now)
        if reason := rate_limit.refusal(request.tokens):
            return LeaseRefused("too large", reason)
        if not self.budget.can_afford_eventually(request.dollars):
            return LeaseRefused("broke", f"it can cost ${request.dollars:.4f}, and ${self.budget.spent:.4f} are spent")
        if not self.budget.affords(request.dollars) or rate_limit.delay(request.tokens, now) > 0:
            return None
        if rate_limit.flights and self.systematic[judge] and judge not in self.answered:
            return None  # wait for the results of the first calls, which show whether any can succeed
        rate_limit.grant(request.lease, request.tokens, now)
        self.budget.lease(request.lease, request.dollars)
        return LeaseGranted(self.epoch)

    async def _wait(self, delay: float) -> None:
        # A delay of 0 means that the budget is leased: wait for another call's settlement.
        seconds = min(delay, _LONGEST_WAIT_S) if delay > 0 else _LONGEST_WAIT_S
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.changed.wait(), seconds)

    def _change(self) -> None:
        """Wake all waiting callers."""
        self.changed.set()
        self.changed = asyncio.Event()

    def _expire(self, now: float) -> None:
        for rate_limit in self.rate_limits.values():
            # In order of granting: stop at the first that has not expired.
            while rate_limit.flights:
                lease, flight = next(iter(rate_limit.flights.items()))
                if now - flight.granted < self.lease_s:
                    break
                rate_limit.settle(lease, flight.tokens, now)
                self.budget.settle(lease, self.budget.leases.get(lease, 0.0))

    async def _ensure_restored(self) -> None:
        """Restore the state from the ledger, once."""
        async with self.opening:
            if self.open or self.ledger is None:
                return
            state = await call_async(
                self.ledger, "register_limiter", self.epoch, self.limits.window_s + self.limits.arrival_s
            )
            now, wall = self.clock(), time.time()
            under_way = {sent.lease for sent in state.under_way}
            self.budget.spent = state.spent
            for sent in state.under_way:
                self.budget.lease(sent.lease, sent.dollars)
            for sent in {one.lease: one for one in [*state.recent, *state.under_way]}.values():
                self.rate_limit(sent.judge).restore(
                    sent.lease, sent.tokens, max(0.0, wall - sent.time), now, returned=sent.lease not in under_way
                )
            self.open = True


def start_limiter(limits: LimitsConfig, cap: float | None, lease_s: float, ledger: ActorHandle) -> ActorHandle:
    """Start the limiter of a job; Ray restarts it if it is killed."""
    kind = ray.remote(Limiter).options(num_cpus=0, max_restarts=-1, max_task_retries=0)
    return kind.remote(limits, cap, lease_s, ledger)
