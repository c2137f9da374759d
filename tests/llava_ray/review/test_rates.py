"""The limiter's arithmetic, on a clock of our own: no window over its limit, whenever requests really arrive."""

import random

import pytest

from llava_ray.config.review import LimitsConfig
from llava_ray.review.headers import Quota, Reported
from llava_ray.review.rates import Budget, RateLimit


def run_gate(
    limits: LimitsConfig, seconds: float, latency: float, tokens: float = 100, real: float = 60, seed: int = 0
):
    """Drive a gate with endless demand; return (arrival, tokens) of each request, arriving anywhere in its flight."""
    draw, now, gate = random.Random(seed), 0.0, RateLimit(limits, 0.0)
    flying: list[tuple[float, str]] = []
    arrivals = []
    number = 0
    while now < seconds:
        for landed in [one for one in flying if one[0] <= now]:
            flying.remove(landed)
            gate.settle(landed[1], real, landed[0])
            gate.succeed()
        while gate.delay(tokens, now) == 0:
            gate.grant(str(number), tokens, now)
            took = latency * draw.uniform(0.5, 1.5)
            flying.append((now + took, str(number)))
            arrivals.append((now + draw.uniform(0, min(took, limits.arrival_s)), real))
            number += 1
        now += 0.01
    return sorted(arrivals)


def fullest(arrivals: list[tuple[float, float]], window: float, amount=lambda one: 1.0) -> float:
    """The most that any window held."""
    most = held = start = 0
    for one in arrivals:
        held += amount(one)
        while arrivals[start][0] <= one[0] - window:
            held -= amount(arrivals[start])
            start += 1
        most = max(most, held)
    return most


@pytest.mark.parametrize("latency", [0.05, 1.0, 8.0])
@pytest.mark.parametrize("requests", [60, 600])
def test_requests_per_minute_are_used_and_never_exceeded(requests: int, latency: float) -> None:
    limits = LimitsConfig(requests_per_minute=requests, max_concurrency=500)
    arrivals = run_gate(limits, 200, latency)
    assert fullest(arrivals, 60.0) <= requests
    second = sum(60 < time <= 120 for time, _ in arrivals)
    assert second >= 0.95 * requests
    assert fullest(arrivals, 1.0) <= 4 * max(1, requests / 60)  # no burst


@pytest.mark.parametrize("latency", [0.05, 1.0])
def test_tokens_per_minute_are_used_and_never_exceeded(latency: float) -> None:
    limits = LimitsConfig(tokens_per_minute=60_000, max_concurrency=500)
    arrivals = run_gate(limits, 200, latency, tokens=1500, real=600)
    assert fullest(arrivals, 60.0, lambda one: one[1]) <= 60_000
    second = sum(real for time, real in arrivals if 60 < time <= 120)
    assert second >= 0.95 * 60_000


def test_short_windows_are_smoother() -> None:
    arrivals = run_gate(
        LimitsConfig(requests_per_minute=120, window_s=1.0, max_concurrency=500, arrival_s=0.1), 60, 0.02
    )
    assert fullest(arrivals, 1.0) <= 2
    assert fullest(arrivals, 60.0) <= 120


def test_what_is_not_used_comes_back() -> None:
    gate = RateLimit(LimitsConfig(tokens_per_minute=6000, burst_s=60), 0.0)
    gate.grant("a", 6000, 0.0)
    assert gate.delay(1, 1.0) > 0
    gate.settle("a", 10, 1.0)
    assert gate.delay(5000, 1.0) == 0
    gate.grant("b", 5000, 1.0)
    gate.settle("b", 0, 1.1, unused=True)
    assert gate.delay(5990, 1.1) == 0
    assert gate.refusal(6001) is not None


def test_concurrency_grows_where_it_is_used_and_is_cut_once_a_storm() -> None:
    gate = RateLimit(LimitsConfig(max_concurrency=64), 0.0)
    for step in range(200):
        now = step * 0.01
        while gate.delay(1, now) == 0:
            gate.grant(f"{step}-{len(gate.flights)}", 1, now)
        lease = next(iter(gate.flights))
        gate.settle(lease, 1, now)
        gate.succeed()
    assert gate.concurrency == 64
    for _ in range(10):
        gate.throttle(None, 3.0)
    assert gate.concurrency == pytest.approx(64 * 0.7)
    gate.throttle(None, 6.0)
    assert gate.concurrency == pytest.approx(64 * 0.49)
    for lease in list(gate.flights)[8:]:
        gate.settle(lease, 1, 6.0)
    before = gate.concurrency
    gate.succeed()  # little is in flight: the limit is not what holds it
    assert gate.concurrency == before


def test_a_refusal_closes_the_gate_for_as_long_as_was_asked_and_longer_each_time() -> None:
    gate = RateLimit(LimitsConfig(), 0.0)
    gate.throttle(7.0, 0.0)
    assert gate.delay(1, 0.0) == 7.0
    pauses = []
    for number in range(1, 9):
        now = 1000.0 * number
        gate.throttle(None, now)
        pauses.append(gate.delay(1, now))
    assert pauses == sorted(pauses)
    assert pauses[-1] == 60.0
    gate.succeed()
    gate.throttle(None, 20_000.0)
    assert gate.delay(1, 20_000.0) == 0.5


def test_headers_lower_the_limit_and_tell_of_others() -> None:
    gate = RateLimit(LimitsConfig(requests_per_minute=600, burst_s=60, max_concurrency=1000), 0.0)
    gate.concurrency = 1000
    gate.observe(Reported(Quota(limit=60, remaining=50, reset_s=10)), 0.0)
    for number in range(50):
        assert gate.delay(1, 0.0) == 0
        gate.grant(str(number), 1, 0.0)
    assert gate.delay(1, 0.0) > 0
    gate.observe(Reported(Quota(limit=600, remaining=550)), 0.0)  # the endpoint is generous again: up to our own limit
    assert gate.requests.limit == 600
    gate.observe(Reported(Quota(limit=6000, remaining=5950)), 0.0)
    assert gate.requests.limit == 600
    gate.observe(Reported(Quota(limit=600, remaining=0, reset_s=3.0)), 100.0)
    assert gate.delay(1, 100.0) >= 3.0


def test_a_limit_nobody_set_is_learnt() -> None:
    gate = RateLimit(LimitsConfig(), 0.0)
    gate.observe(Reported(tokens=Quota(limit=1000, remaining=100)), 0.0)
    assert gate.delay(200, 0.0) > 0
    assert gate.refusal(2000) is not None


def test_counts_are_forgotten_where_there_is_no_limit() -> None:
    gate = RateLimit(LimitsConfig(max_concurrency=10), 0.0)
    for number in range(20_000):
        now = number * 0.1
        assert gate.delay(10, now) == 0
        gate.grant("a", 10, now)
        gate.settle("a", 10, now)
    assert len(gate.requests.ends) < 2500
    assert len(gate.requests.amounts) < 2500


def test_a_purse_sets_the_worst_case_aside() -> None:
    purse = Budget(1.0)
    purse.lease("a", 0.6)
    assert not purse.affords(0.5)
    assert purse.can_afford_eventually(0.5)
    purse.settle("a", 0.2)
    assert purse.affords(0.8)
    purse.settle("a", 0.2)  # said twice
    assert purse.spent == pytest.approx(0.2)
    assert not purse.can_afford_eventually(0.81)
    assert Budget(None).affords(1e9)
