"""Rate limiting: requests and tokens in sliding windows, paced, with adaptive concurrency.

Pure: the time is an argument of every call. A lease counts from its grant until one window after the latest moment at
which its request can have arrived: the reply's, or ``arrival_s`` after the grant, whichever is first. Any window of the
endpoint's own clock then holds at most the limit, whenever in between the request really arrived: when the last of
them was granted, all the others still counted.
"""

import heapq
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from llava_ray.config.review import LimitsConfig
from llava_ray.review.headers import Quota, Reported

_PACE = 1.25
"""Pace relative to the limit: faster, to make up for idle time; the windows still bound the total."""
FIRST_CONCURRENCY = 8.0
_CUT, _CUT_COOLDOWN_S = 0.7, 2.0
_SATURATED = 0.8
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 60.0
_LONGEST_RESET_S = 60.0


class Window:
    """One limit: the amounts that count now, the pace, and the use by other clients."""

    def __init__(self, per_minute: float | None, limits: LimitsConfig, now: float) -> None:
        """Initialise with a full burst and nothing used."""
        self.configured = per_minute
        self.length = limits.window_s
        self.burst_s = limits.burst_s
        self.limit = self._in_window(per_minute)
        self.used = 0.0
        self.level = self.capacity
        self.refilled = now
        self.ends: list[tuple[float, int]] = []
        self.amounts: dict[int, float] = {}
        self.numbers = itertools.count()
        self.foreign, self.foreign_since = 0.0, now

    @property
    def rate(self) -> float:
        """Return the amount per second."""
        return _PACE * self.limit / self.length

    @property
    def capacity(self) -> float:
        """Return the largest burst."""
        return max(1.0, self.rate * self.burst_s)

    def take(self, amount: float, until: float) -> int:
        """Count an amount until a time; return its number."""
        number = next(self.numbers)
        self.amounts[number] = amount
        self.used += amount
        if math.isfinite(self.limit):
            self.level -= amount
        heapq.heappush(self.ends, (until, number))
        return number

    def correct(self, number: int, amount: float, until: float) -> None:
        """Replace a counted amount and its end time."""
        before = self.amounts.pop(number, None)
        if before is None:  # it has expired already: count it nevertheless
            before = amount
            self.used += amount
        self.used += amount - before
        # May exceed the capacity: tokens that were reserved for longer answers than came can still be used.
        self.level += before - amount
        fresh = next(self.numbers)
        self.amounts[fresh] = amount
        heapq.heappush(self.ends, (until, fresh))

    def delay(self, amount: float, now: float) -> float:
        """Compute the seconds until an amount is allowed, as far as known now; 0 for at once."""
        self._advance(now)
        if not math.isfinite(self.limit):
            return 0.0
        wanted = min(amount, self.capacity)
        pace = (wanted - self.level) / self.rate if self.level < wanted else 0.0
        over = self.used + self._foreign(now) + amount - self.limit
        if over <= 0:
            return pace
        return max(pace, self.ends[0][0] - now if self.ends else self.length / 10)

    def fits(self, amount: float) -> bool:
        """Return whether an amount is within the limit at all."""
        return amount <= self.limit

    def observe(self, quota: Quota, now: float) -> None:
        """Update from the endpoint's headers: a lower limit than ours, and the use by other clients."""
        if quota.limit is not None:
            self.limit = min(self._in_window(self.configured), self._in_window(quota.limit))
            self.level = min(self.level, self.capacity)
        if quota.remaining is None or not math.isfinite(self.limit):
            return
        self._advance(now)
        share = self.length / 60.0
        self.foreign = max(0.0, self.limit - self.used - quota.remaining * min(1.0, share))
        self.foreign_since = now

    def _in_window(self, per_minute: float | None) -> float:
        return math.inf if per_minute is None else per_minute * self.length / 60.0

    def _foreign(self, now: float) -> float:
        return self.foreign * max(0.0, 1 - (now - self.foreign_since) / self.length)

    def _advance(self, now: float) -> None:
        while self.ends and self.ends[0][0] <= now:
            self.used -= self.amounts.pop(heapq.heappop(self.ends)[1], 0.0)
        if math.isfinite(self.limit):
            self.level = max(self.level, min(self.capacity, self.level + (now - self.refilled) * self.rate))
        self.refilled = now


@dataclass
class Flight:
    """A request in flight."""

    granted: float
    numbers: tuple[int, int]
    tokens: float


@dataclass
class RateLimit:
    """The rate limit of one judge: both windows, the concurrency, and pauses requested by the endpoint."""

    limits: LimitsConfig
    now: float
    requests: Window = field(init=False)
    tokens: Window = field(init=False)
    flights: dict[str, Flight] = field(default_factory=dict)
    concurrency: float = field(init=False)
    growing_fast: bool = True
    last_cut: float = -math.inf
    closed_until: float = -math.inf
    num_refused_in_row: int = 0

    def __post_init__(self) -> None:
        """Create the windows."""
        self.requests = Window(self.limits.requests_per_minute, self.limits, self.now)
        self.tokens = Window(self.limits.tokens_per_minute, self.limits, self.now)
        self.concurrency = min(FIRST_CONCURRENCY, self.limits.max_concurrency)

    def delay(self, tokens: float, now: float) -> float:
        """Compute the seconds until a request is allowed, as far as known; inf: after another one returns."""
        if len(self.flights) >= int(self.concurrency):
            return math.inf
        return max(self.closed_until - now, self.requests.delay(1, now), self.tokens.delay(tokens, now), 0.0)

    def refusal(self, tokens: float) -> str | None:
        """Return the reason why a request can never be allowed, or None."""
        if self.tokens.fits(tokens):
            return None
        return f"it may take {tokens:g} tokens, and the limit is {self.tokens.limit:g} per window"

    def grant(self, lease: str, tokens: float, now: float) -> None:
        """Grant a request and count it."""
        until = now + self.limits.arrival_s + self.limits.window_s
        self.flights[lease] = Flight(now, (self.requests.take(1, until), self.tokens.take(tokens, until)), tokens)

    def restore(self, lease: str, tokens: float, age: float, now: float, *, returned: bool) -> None:
        """Count a request that an earlier limiter granted ``age`` seconds ago."""
        until = now - age + self.limits.arrival_s + self.limits.window_s
        numbers = (self.requests.take(1, until), self.tokens.take(tokens, until))
        if not returned:
            self.flights[lease] = Flight(now - age, numbers, tokens)

    def settle(self, lease: str, tokens: float, now: float, *, unused: bool = False) -> None:
        """Settle a request with its real use; ``unused``: it was never sent."""
        flight = self.flights.pop(lease, None)
        if flight is None:
            return
        until = now if unused else min(now, flight.granted + self.limits.arrival_s) + self.limits.window_s
        self.requests.correct(flight.numbers[0], 0 if unused else 1, until)
        self.tokens.correct(flight.numbers[1], 0 if unused else tokens, until)

    def succeed(self) -> None:
        """Raise the concurrency if it is used: doubling until the first refusal, then additively (slow start, AIMD)."""
        self.num_refused_in_row = 0
        if len(self.flights) + 1 >= _SATURATED * self.concurrency:
            step = 1.0 if self.growing_fast else 1.0 / self.concurrency
            self.concurrency = min(float(self.limits.max_concurrency), self.concurrency + step)

    def throttle(self, retry_after: float | None, now: float) -> None:
        """Handle a 429: reduce the concurrency, and pause as requested or with exponential backoff."""
        if now - self.last_cut > _CUT_COOLDOWN_S:
            self.last_cut, self.growing_fast = now, False
            self.concurrency = max(1.0, self.concurrency * _CUT)
            self.num_refused_in_row += 1
        backoff = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(self.num_refused_in_row - 1, 10))
        self.close(now + (backoff if retry_after is None else retry_after))

    def trouble(self) -> None:
        """Handle a server error: end the slow start."""
        self.growing_fast = False

    def observe(self, reported: Reported, now: float) -> None:
        """Update from a reply's headers."""
        for window, quota in ((self.requests, reported.requests), (self.tokens, reported.tokens)):
            window.observe(quota, now)
            if quota.remaining == 0 and quota.reset_s:
                self.close(now + min(quota.reset_s, _LONGEST_RESET_S))

    def close(self, until: float) -> None:
        """Pause until a time."""
        self.closed_until = max(self.closed_until, until)


@dataclass
class Budget:
    """The budget: its cap, the spent dollars, and the largest costs of calls in flight."""

    cap: float | None
    spent: float = 0.0
    leases: dict[str, float] = field(default_factory=dict)

    @property
    def leased(self) -> float:
        """Return the largest cost of all calls in flight."""
        return math.fsum(self.leases.values())

    def affords(self, dollars: float) -> bool:
        """Return whether a call of at most so many dollars is allowed now."""
        return self.cap is None or self.spent + self.leased + dollars <= self.cap

    def can_afford_eventually(self, dollars: float) -> bool:
        """Return whether it would be allowed if all calls in flight cost nothing."""
        return self.cap is None or self.spent + dollars <= self.cap

    def lease(self, lease: str, dollars: float) -> None:
        """Reserve a call's largest cost."""
        self.leases[lease] = dollars

    def settle(self, lease: str, dollars: float) -> None:
        """Settle a call with its real cost; ignore a lease that was settled already."""
        if self.leases.pop(lease, None) is not None:
            self.spent += dollars

    def held_by(self, prefix: str) -> Iterator[str]:
        """Yield the leases with a prefix."""
        return (lease for lease in self.leases if lease.startswith(prefix))
