"""The limiter without Ray: turns, money, leases that end by themselves, and the stop for all."""

import asyncio
from collections.abc import Awaitable
from typing import Any

import pytest

from llava_ray.config.review import LimitsConfig
from llava_ray.review.call_batching import CallBatcher
from llava_ray.review.limiter import LeaseGranted, LeaseRefused, LeaseRequest, Limiter, Settlement


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def limiter(cap: float | None = None, **limits: Any) -> tuple[Limiter, Clock]:
    clock = Clock()
    return Limiter(LimitsConfig(**limits), cap, 100.0, None, clock), clock


def soon(awaitable: Awaitable[Any]) -> Any:
    return asyncio.run(asyncio.wait_for(awaitable, 5))


def settled(lease: str, mood: Any = "fine", dollars: float = 0.0, **more: Any) -> Settlement:
    return Settlement(lease, "j", mood, 1, dollars, 0.0, **more)


def test_as_many_go_as_may_and_the_others_wait() -> None:
    async def scene() -> None:
        gate, _ = limiter(max_concurrency=2)
        wishes = [LeaseRequest(f"r/{n}", 1, 0) for n in range(3)]
        first = await gate.acquire("j", wishes)
        assert first == [LeaseGranted(gate.epoch)] * 2
        rest = asyncio.create_task(gate.acquire("j", wishes[2:]))
        await asyncio.sleep(0.02)
        assert not rest.done()
        assert len(await gate.acquire("another judge", [LeaseRequest("r/9", 1, 0)])) == 1
        await gate.settle([settled("r/0")])
        assert await rest == [LeaseGranted(gate.epoch)]

    soon(scene())


def test_money_that_is_under_way_is_waited_for_and_then_it_is_over() -> None:
    async def scene() -> None:
        gate, _ = limiter(cap=1.0)
        assert await gate.acquire("j", [LeaseRequest("r/0", 1, 0.7)]) == [LeaseGranted(gate.epoch)]
        waiting = asyncio.create_task(gate.acquire("j", [LeaseRequest("r/1", 1, 0.5)]))
        await asyncio.sleep(0.02)
        assert not waiting.done()
        await gate.settle([settled("r/0", dollars=0.4)])
        assert await waiting == [LeaseGranted(gate.epoch)]
        await gate.settle([settled("r/1", dollars=0.4)])
        refused, granted = await gate.acquire("j", [LeaseRequest("r/2", 1, 0.3), LeaseRequest("r/3", 1, 0.2)])
        assert isinstance(refused, LeaseRefused)
        assert refused.why == "broke"
        assert isinstance(granted, LeaseGranted)
        assert await gate.status() == {"spent": pytest.approx(0.8), "leased": 0.2, "halted": ""}

    soon(scene())


def test_a_lease_of_the_dead_ends_and_counts_as_spent() -> None:
    async def scene() -> None:
        gate, clock = limiter(cap=1.0, max_concurrency=1)
        await gate.acquire("j", [LeaseRequest("r/0", 1, 0.7)])
        clock.now = 99.0
        assert gate.rate_limit("j").delay(1, clock.now) > 0
        clock.now = 101.0
        assert await gate.acquire("j", [LeaseRequest("q/0", 1, 0.3)]) == [LeaseGranted(gate.epoch)]
        assert gate.budget.spent == 0.7
        await gate.release_owner("q", {})
        assert (gate.budget.spent, gate.budget.leased) == (0.7, 0)
        await gate.acquire("j", [LeaseRequest("p/0", 1, 0.3)])
        await gate.release_owner("p", {"p/0": 0.3})
        assert gate.budget.spent == 1.0
        (late,) = await gate.acquire("j", [LeaseRequest("p/1", 1, 0)])
        assert isinstance(late, LeaseRefused)

    soon(scene())


def test_no_more_credit_stops_everyone() -> None:
    async def scene() -> None:
        gate, _ = limiter(max_concurrency=1)
        await gate.acquire("j", [LeaseRequest("r/0", 1, 0)])
        waiting = asyncio.create_task(gate.acquire("j", [LeaseRequest("r/1", 1, 0), LeaseRequest("r/2", 1, 0)]))
        await asyncio.sleep(0.02)
        await gate.settle([settled("r/0", "stop", reason="HTTP 429: no credit (insufficient_quota)")])
        answers = await waiting
        assert [answer.why for answer in answers] == ["halted", "halted"]
        assert "insufficient_quota" in answers[0].reason

    soon(scene())


def test_what_never_fits_is_refused_at_once() -> None:
    async def scene() -> None:
        gate, _ = limiter(tokens_per_minute=100)
        (answer,) = await gate.acquire("j", [LeaseRequest("r/0", 101, 0)])
        assert isinstance(answer, LeaseRefused)
        assert answer.why == "too large"

    soon(scene())


def test_many_small_calls_become_few() -> None:
    seen: list[list[int]] = []

    async def double(numbers: list[int]) -> list[int]:
        seen.append(numbers)
        await asyncio.sleep(0.01)
        return [2 * number for number in numbers[:7]]  # the others are asked again

    async def scene() -> None:
        gather: CallBatcher[int, int] = CallBatcher(double)
        assert await asyncio.gather(*(gather(number) for number in range(20))) == [2 * n for n in range(20)]
        assert len(seen) == 3

    soon(scene())


def test_whoever_asked_hears_the_error() -> None:
    async def fail(numbers: list[int]) -> list[int]:
        raise ValueError(f"{len(numbers)} numbers")

    async def scene() -> None:
        gather: CallBatcher[int, int] = CallBatcher(fail)
        found = await asyncio.gather(gather(1), gather(2), return_exceptions=True)
        assert [str(error) for error in found] == ["2 numbers", "2 numbers"]

    soon(scene())


def test_a_judge_that_has_only_faults_of_the_settings_is_given_up() -> None:
    async def scene(*answers: Settlement) -> str:
        gate, _ = limiter(max_concurrency=4)
        await gate.acquire("j", [LeaseRequest(one.lease, 1, 0) for one in answers[:4]])
        await gate.settle(answers)
        assert await gate.under_way() == 0
        return gate.halted

    faults = [settled(f"r/{n}", "trouble", reason="a web page", systematic=True) for n in range(4)]
    assert soon(scene(*faults)) == "a web page"
    assert soon(scene(*faults[:3])) == ""
    assert soon(scene(settled("r/9"), *faults)) == ""
    assert soon(scene(settled("r/9", "trouble"), *faults)) == "a web page"


def test_after_such_a_fault_nothing_new_goes_until_the_others_are_back() -> None:
    async def scene() -> None:
        gate, _ = limiter(max_concurrency=4)
        await gate.acquire("j", [LeaseRequest(f"r/{n}", 1, 0) for n in range(4)])
        await gate.settle([settled("r/0", "trouble", systematic=True)])
        waiting = asyncio.create_task(gate.acquire("j", [LeaseRequest("r/4", 1, 0)]))
        await asyncio.sleep(0.02)
        assert not waiting.done()
        await gate.settle([settled("r/1")])  # it can answer
        assert await waiting == [LeaseGranted(gate.epoch)]

    soon(scene())
