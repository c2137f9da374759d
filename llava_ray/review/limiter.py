"""The limiter as an actor: one truth for the cluster about how fast and for how much.

Reviewers ask for leases before they send and settle them afterwards. A lease that is not settled in time, because its
reviewer is gone, ends by itself: its largest cost then counts as spent. Killed, the limiter starts again from the
ledger.
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
Mood = Literal["fine", "throttled", "trouble", "unused", "stop"]


@dataclass(frozen=True)
class LeaseRequest:
    """A request that wants to go: an estimate of its tokens, and the most it can cost."""

    lease: str
    """Its owner's name, a slash, a number."""
    tokens: float
    dollars: float

    @property
    def owner(self) -> str:
        """Who asks."""
        return self.lease.partition("/")[0]


@dataclass(frozen=True)
class LeaseGranted:
    """It may go, by order of this limiter."""

    epoch: str


@dataclass(frozen=True)
class LeaseRefused:
    """It may not go: "broke" (it does not fit into the budget), "too large" (for the rate), "halted" (none may)."""

    why: Literal["broke", "too large", "halted"]
    reason: str


@dataclass(frozen=True)
class Settlement:
    """What became of a lease; ``age_s``: how long ago the reply came."""

    lease: str
    judge: str
    mood: Mood
    tokens: float
    dollars: float
    age_s: float
    reported: Reported = field(default_factory=Reported)
    reason: str = ""
    systematic: bool = False
    """The fault lies with the settings, most likely."""


class Limiter:
    """Gates (one a judge) and a purse; run as a Ray actor (see ``start_limiter``)."""

    def __init__(
        self,
        limits: LimitsConfig,
        cap: float | None,
        lease_s: float,
        ledger: ActorHandle | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start; what an earlier limiter let go is asked of the ledger before the first lease."""
        self.limits = limits
        self.lease_s = lease_s
        self.ledger = ledger
        self.clock = clock
        self.epoch = uuid.uuid4().hex[:12]
        self.gates: dict[str, RateLimit] = {}
        self.purse = Budget(cap)
        self.turns: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.changed = asyncio.Event()
        self.opening = asyncio.Lock()
        self.open = False
        self.halted = ""
        self.gone: set[str] = set()
        self.answered: set[str] = set()
        self.systematic: Counter[str] = Counter()

    async def acquire(self, judge: str, wishes: Sequence[LeaseRequest]) -> list[LeaseGranted | LeaseRefused]:
        """Answer as many wishes as can be answered now, at least the first; in the order in which callers came."""
        await self._open()
        async with self.turns[judge]:
            answers: list[LeaseGranted | LeaseRefused] = []
            for wish in wishes:
                while (answer := self._answer(judge, wish)) is None:
                    if answers:
                        return answers
                    await self._wait(self.rate_limit(judge).delay(wish.tokens, self.clock()))
                answers.append(answer)
            return answers

    async def settle(self, settlements: Sequence[Settlement]) -> list[None]:
        """Take leases back, with what the replies say of limits."""
        await self._open()
        now = self.clock()
        for one in settlements:
            gate = self.rate_limit(one.judge)
            self.purse.settle(one.lease, one.dollars)
            gate.settle(one.lease, one.tokens, now - one.age_s, unused=one.mood == "unused")
            gate.observe(one.reported, now)
            self._note_systematic(one)
            if one.mood == "fine":
                gate.succeed()
            elif one.mood == "throttled":
                gate.throttle(one.reported.retry_after_s, now)
            elif one.mood == "trouble":
                gate.trouble()
            elif one.mood == "stop":
                self.halted = self.halted or one.reason
        self._change()
        return [None] * len(settlements)

    async def release_owner(self, owner: str, lost: Mapping[str, float]) -> None:
        """End all leases of a reviewer that is gone: ``lost`` says what they cost, the others were never sent."""
        await self._open()
        self.gone.add(owner)  # what it asked for before it died is still in the queue
        now = self.clock()
        for gate in self.gates.values():
            for lease in [lease for lease in gate.flights if lease.startswith(f"{owner}/")]:
                gate.settle(lease, gate.flights[lease].tokens, now)
        for lease in list(self.purse.held_by(f"{owner}/")):
            self.purse.settle(lease, lost.get(lease, 0.0))
        self._change()

    async def stop(self, reason: str) -> None:
        """Let nothing go any more."""
        self.halted = self.halted or reason
        self._change()

    async def status(self) -> dict[str, float | str]:
        """Return what is spent and leased, and why nothing goes, if nothing goes."""
        await self._open()
        return {"spent": self.purse.spent, "leased": self.purse.leased, "halted": self.halted}

    async def under_way(self) -> int:
        """Return how many calls were let go and are not settled."""
        await self._open()
        return len(self.purse.leases)

    def rate_limit(self, judge: str) -> RateLimit:
        """Return a judge's gate."""
        if judge not in self.gates:
            self.gates[judge] = RateLimit(self.limits, self.clock())
        return self.gates[judge]

    def _note_systematic(self, one: Settlement) -> None:
        """Stop where a judge has met the calls that go at first with nothing but such faults."""
        if one.systematic:
            self.systematic[one.judge] += 1
            enough = max(_MIN_SYSTEMATIC, min(FIRST_CONCURRENCY, self.limits.max_concurrency))
            if one.judge not in self.answered and self.systematic[one.judge] >= enough:
                self.halted = self.halted or one.reason
        elif one.mood == "fine":
            self.answered.add(one.judge)

    def _answer(self, judge: str, wish: LeaseRequest) -> LeaseGranted | LeaseRefused | None:
        if self.halted or wish.owner in self.gone:
            return LeaseRefused("halted", self.halted or "its reviewer is gone")
        gate, now = self.rate_limit(judge), self.clock()
        self._expire(now)
        if reason := gate.refusal(wish.tokens):
            return LeaseRefused("too large", reason)
        if not self.purse.can_ever_afford(wish.dollars):
            return LeaseRefused("broke", f"it can cost ${wish.dollars:.4f}, and ${self.purse.spent:.4f} are spent")
        if not self.purse.affords(wish.dollars) or gate.delay(wish.tokens, now) > 0:
            return None
        if gate.flights and self.systematic[judge] and judge not in self.answered:
            return None  # what the others bring will tell whether any can succeed
        gate.grant(wish.lease, wish.tokens, now)
        self.purse.lease(wish.lease, wish.dollars)
        return LeaseGranted(self.epoch)

    async def _wait(self, delay: float) -> None:
        # With a delay of 0 it is money that is missing: another call has to come back.
        seconds = min(delay, _LONGEST_WAIT_S) if delay > 0 else _LONGEST_WAIT_S
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.changed.wait(), seconds)

    def _change(self) -> None:
        """Wake all that wait."""
        self.changed.set()
        self.changed = asyncio.Event()

    def _expire(self, now: float) -> None:
        for gate in self.gates.values():
            # In the order in which they were granted: the first that is young ends the search.
            while gate.flights:
                lease, flight = next(iter(gate.flights.items()))
                if now - flight.granted < self.lease_s:
                    break
                gate.settle(lease, flight.tokens, now)
                self.purse.settle(lease, self.purse.leases.get(lease, 0.0))

    async def _open(self) -> None:
        """Take over from the ledger, once."""
        async with self.opening:
            if self.open or self.ledger is None:
                return
            standing = await call_async(self.ledger, "adopt", self.epoch, self.limits.window_s + self.limits.arrival_s)
            now, wall = self.clock(), time.time()
            under_way = {sent.lease for sent in standing.under_way}
            self.purse.spent = standing.spent
            for sent in standing.under_way:
                self.purse.lease(sent.lease, sent.dollars)
            for sent in {one.lease: one for one in [*standing.recent, *standing.under_way]}.values():
                self.rate_limit(sent.judge).restore(
                    sent.lease, sent.tokens, max(0.0, wall - sent.time), now, returned=sent.lease not in under_way
                )
            self.open = True


def start_limiter(limits: LimitsConfig, cap: float | None, lease_s: float, ledger: ActorHandle) -> ActorHandle:
    """Start the limiter of a job; killed, it starts again."""
    kind = ray.remote(Limiter).options(num_cpus=0, max_restarts=-1, max_task_retries=0)
    return kind.remote(limits, cap, lease_s, ledger)
