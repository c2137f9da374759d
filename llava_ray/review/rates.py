"""How fast requests may go: requests and tokens in sliding windows, paced, as many in flight as the endpoint bears.

Pure: the time comes in with every call. A lease counts from the moment it is granted until a window after the moment
by which its request must have arrived: the reply's, or ``arrival_s`` after the grant, whichever is first. Any window of
the endpoint's own clock then holds at most the limit, wherever in between the request really arrived: when the last
one of them was granted, all the others still counted.
"""

import heapq
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from llava_ray.config.review import LimitsConfig
from llava_ray.review.headers import Quota, Reported

_PACE = 1.25
"""How much faster than the limit requests may go, to make up for time in which nobody asked; the windows still hold."""
FIRST_CONCURRENCY = 8.0
_CUT, _CUT_COOLDOWN_S = 0.7, 2.0
_SATURATED = 0.8
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 60.0
_LONGEST_RESET_S = 60.0


class Window:
    """One limit: what counts now, the pace, and what others have used of it."""

    def __init__(self, per_minute: float | None, limits: LimitsConfig, now: float) -> None:
        """Start with what may be sent at once, and nothing used."""
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
        """What may go in a second."""
        return _PACE * self.limit / self.length

    @property
    def capacity(self) -> float:
        """What may be sent at once after a rest."""
        return max(1.0, self.rate * self.burst_s)

    def take(self, amount: float, until: float) -> int:
        """Count an amount until a moment; return its number."""
        number = next(self.numbers)
        self.amounts[number] = amount
        self.used += amount
        if math.isfinite(self.limit):
            self.level -= amount
        heapq.heappush(self.ends, (until, number))
        return number

    def correct(self, number: int, amount: float, until: float) -> None:
        """Count another amount instead, until another moment."""
        before = self.amounts.pop(number, None)
        if before is None:  # its time is over; what is counted too late is counted nevertheless
            before = amount
            self.used += amount
        self.used += amount - before
        # Beyond the capacity, too: what was set aside for longer answers than came is still to be used.
        self.level += before - amount
        fresh = next(self.numbers)
        self.amounts[fresh] = amount
        heapq.heappush(self.ends, (until, fresh))

    def delay(self, amount: float, now: float) -> float:
        """Return the seconds until the amount may go, as far as is known now; 0 for at once."""
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
        """Tell whether an amount can ever go."""
        return amount <= self.limit

    def observe(self, quota: Quota, now: float) -> None:
        """Take over what the endpoint says: a lower limit than ours, and what others have used."""
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
    """A request that is under way, as the rate sees it."""

    granted: float
    numbers: tuple[int, int]
    tokens: float


@dataclass
class RateLimit:
    """The rate of one judge: both windows, the concurrency, and pauses that the endpoint asked for."""

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
        """Open."""
        self.requests = Window(self.limits.requests_per_minute, self.limits, self.now)
        self.tokens = Window(self.limits.tokens_per_minute, self.limits, self.now)
        self.concurrency = min(FIRST_CONCURRENCY, self.limits.max_concurrency)

    def delay(self, tokens: float, now: float) -> float:
        """Return the seconds until a request may go, as far as is known; inf: when another one has come back."""
        if len(self.flights) >= int(self.concurrency):
            return math.inf
        return max(self.closed_until - now, self.requests.delay(1, now), self.tokens.delay(tokens, now), 0.0)

    def refusal(self, tokens: float) -> str | None:
        """Say why a request can never go, if it cannot."""
        if self.tokens.fits(tokens):
            return None
        return f"it may take {tokens:g} tokens, and the limit lets {self.tokens.limit:g} go at a time"

    def grant(self, lease: str, tokens: float, now: float) -> None:
        """Let a request go."""
        until = now + self.limits.arrival_s + self.limits.window_s
        self.flights[lease] = Flight(now, (self.requests.take(1, until), self.tokens.take(tokens, until)), tokens)

    def restore(self, lease: str, tokens: float, age: float, now: float, *, returned: bool) -> None:
        """Count a request that an earlier limiter let go, ``age`` seconds ago."""
        until = now - age + self.limits.arrival_s + self.limits.window_s
        numbers = (self.requests.take(1, until), self.tokens.take(tokens, until))
        if not returned:
            self.flights[lease] = Flight(now - age, numbers, tokens)

    def settle(self, lease: str, tokens: float, now: float, *, unused: bool = False) -> None:
        """Take a request back: what it really used; ``unused``: it was never sent."""
        flight = self.flights.pop(lease, None)
        if flight is None:
            return
        until = now if unused else min(now, flight.granted + self.limits.arrival_s) + self.limits.window_s
        self.requests.correct(flight.numbers[0], 0 if unused else 1, until)
        self.tokens.correct(flight.numbers[1], 0 if unused else tokens, until)

    def succeed(self) -> None:
        """Let more in flight where the limit is made use of: doubling until the first refusal, then one by one."""
        self.num_refused_in_row = 0
        if len(self.flights) + 1 >= _SATURATED * self.concurrency:
            step = 1.0 if self.growing_fast else 1.0 / self.concurrency
            self.concurrency = min(float(self.limits.max_concurrency), self.concurrency + step)

    def throttle(self, retry_after: float | None, now: float) -> None:
        """Take a 429: fewer in flight, and nothing goes for as long as was asked, or ever longer."""
        if now - self.last_cut > _CUT_COOLDOWN_S:
            self.last_cut, self.growing_fast = now, False
            self.concurrency = max(1.0, self.concurrency * _CUT)
            self.num_refused_in_row += 1
        backoff = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(self.num_refused_in_row - 1, 10))
        self.close(now + (backoff if retry_after is None else retry_after))

    def trouble(self) -> None:
        """Take a fault of the endpoint's: grow no faster."""
        self.growing_fast = False

    def observe(self, reported: Reported, now: float) -> None:
        """Take over what a reply's headers say."""
        for window, quota in ((self.requests, reported.requests), (self.tokens, reported.tokens)):
            window.observe(quota, now)
            if quota.remaining == 0 and quota.reset_s:
                self.close(now + min(quota.reset_s, _LONGEST_RESET_S))

    def close(self, until: float) -> None:
        """Let nothing go before a moment."""
        self.closed_until = max(self.closed_until, until)


@dataclass
class Budget:
    """What may be spent, what is spent, and what those under way can cost at most."""

    cap: float | None
    spent: float = 0.0
    leases: dict[str, float] = field(default_factory=dict)

    @property
    def leased(self) -> float:
        """The most that all those under way can still cost."""
        return math.fsum(self.leases.values())

    def affords(self, dollars: float) -> bool:
        """Tell whether a call that costs at most so much may go now."""
        return self.cap is None or self.spent + self.leased + dollars <= self.cap

    def can_ever_afford(self, dollars: float) -> bool:
        """Tell whether it may go once all those under way have come back for nothing."""
        return self.cap is None or self.spent + dollars <= self.cap

    def lease(self, lease: str, dollars: float) -> None:
        """Set a call's largest cost aside."""
        self.leases[lease] = dollars

    def settle(self, lease: str, dollars: float) -> None:
        """Take a call back with its real cost; one that is not known here was accounted for already."""
        if self.leases.pop(lease, None) is not None:
            self.spent += dollars

    def held_by(self, prefix: str) -> Iterator[str]:
        """Go through the leases whose names start so."""
        return (lease for lease in self.leases if lease.startswith(prefix))
