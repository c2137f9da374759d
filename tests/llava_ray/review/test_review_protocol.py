"""Reviewers, limiter and ledger together over real HTTP, without processes: limits, faults, and hundreds of kills."""

import asyncio
import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from local_actors import LocalActor
from review_files import check_money
from scripted_judge import Remote, scripted_judge

from llava_ray.config.review import JudgeConfig, LimitsConfig
from llava_ray.review.calls import Call, CallPlan, Item, list_judges
from llava_ray.review.ledger import LedgerActor
from llava_ray.review.ledger_file import read_account, read_final_rows
from llava_ray.review.limiter import Limiter
from llava_ray.review.reviewer import Reviewer, Summary
from llava_ray.review.rubric import build_default_rubric

pytestmark = pytest.mark.slow

NUM_KILLS = 50
VICTIMS = 4 * ["reviewer"] + 3 * ["limiter"] + 3 * ["ledger"] + ["job", "none"]


@pytest.fixture(scope="module")
def judge() -> Iterator[Remote]:
    with scripted_judge() as remote:
        yield remote


class Scene:
    """A job without a driver."""

    def __init__(self, judge: Remote, folder: Path, num: int, *, cap: float | None = None, **limits: Any) -> None:
        config = JudgeConfig(
            model="scripted",
            base_url=judge.base_url,
            timeout_s=2.0,
            max_attempts=8,
            max_tokens=64,
            input_dollars=1,
            output_dollars=2,
        )
        self.specs = {spec.name: spec for spec in list_judges(config)}
        items = [Item(f"q{n}", f"What is {n}?", (f"A {n}.", f"B {n}."), ("reference", "model")) for n in range(num)]
        self.plan = CallPlan(
            items, build_default_rubric("pair"), list(self.specs.values()), both_orders=True, samples=1
        )
        self.limits = LimitsConfig(**limits)
        self.path = folder / "ledger.jsonl"
        self.session = 0
        self.ledger = LocalActor(lambda: LedgerActor(str(self.path), f"session {self.session}"))
        self.limiter = LocalActor(lambda: Limiter(self.limits, cap, 60.0, self.ledger))  # type: ignore[arg-type]
        self.num_reviewers = 0

    def reviewer(self) -> Reviewer:
        self.num_reviewers += 1
        return Reviewer(f"r{self.num_reviewers}", self.specs, self.limits, self.limiter, self.ledger)  # type: ignore[arg-type]

    async def run(self, num_reviewers: int) -> list[Summary]:
        calls = list(self.plan)
        reviewers = [self.reviewer() for _ in range(num_reviewers)]
        found = await asyncio.gather(*(r.review(calls[n::num_reviewers]) for n, r in enumerate(reviewers)))
        await close(reviewers)
        return found

    def end(self) -> None:
        self.ledger.instance.file.close()


async def close(reviewers: list[Reviewer]) -> None:
    for reviewer in reviewers:
        for client in reviewer.judges.values():
            await client.close()


def check_windows(stats: dict[str, Any], window: float, limit: float, position: int | None) -> None:
    """No sliding window over its limit, no refusal, and 95 % of the limit used in all whole windows after the first."""
    assert set(stats["outcomes"]) == {"fine"}
    arrivals = [(one[0], 1 if position is None else one[position]) for one in stats["arrivals"]]
    start = arrivals[0][0]
    last = int((arrivals[-1][0] - start) // window)
    assert last >= 2
    for number in range(1, last):
        used = sum(n for time, n in arrivals if number * window <= time - start < (number + 1) * window)
        assert 0.95 * limit <= used <= limit, (number, used)


@pytest.mark.verify  # on a quiet machine: it is held to 95 % of the limit
def test_requests_per_window_are_used_and_never_exceeded(judge: Remote, tmp_path: Path) -> None:
    judge.play(requests_per_minute=1200, window_s=4.0, announce=True)
    scene = Scene(judge, tmp_path, 140, requests_per_minute=1200, window_s=4.0)
    asyncio.run(scene.run(8))
    scene.end()
    check_windows(judge.stats(), 4.0, 80, None)


@pytest.mark.verify  # on a quiet machine: it is held to 95 % of the limit
def test_tokens_per_window_are_used_and_never_exceeded(judge: Remote, tmp_path: Path) -> None:
    judge.play(tokens_per_minute=150_000, window_s=4.0, announce=True)
    scene = Scene(judge, tmp_path, 140, tokens_per_minute=150_000, window_s=4.0)
    asyncio.run(scene.run(8))
    scene.end()
    # Windows are filled with whole requests.
    largest = max(tokens for _, tokens, _ in judge.stats()["arrivals"])
    check_windows(judge.stats(), 4.0, 10_000, 1)
    assert largest < 0.02 * 10_000


def test_a_limit_that_changes_on_the_way_is_followed(judge: Remote, tmp_path: Path) -> None:
    judge.play(requests_per_minute=1200, window_s=2.0, announce=True, drift=[2.0, 600])
    scene = Scene(judge, tmp_path, 60, requests_per_minute=1200, window_s=2.0)
    asyncio.run(scene.run(4))
    scene.end()
    stats = judge.stats()
    assert len(stats["paid"]) == 120
    assert stats["outcomes"].get("429", 0) <= 20
    late = [time for time, _, fault in stats["arrivals"] if time > 6 and not fault]
    assert len(late) <= 1.05 * 10 * (late[-1] - 6) + 20


def test_faults_end_in_reviews_or_reasons(judge: Remote, tmp_path: Path) -> None:
    faults = {"429": 0.04, "500": 0.03, "502": 0.03, "drop": 0.03, "malformed": 0.03, "slow": 0.02, "hang": 0.02}
    judge.play(faults=faults, retry_after=0.1)
    scene = Scene(judge, tmp_path, 100)
    summaries = asyncio.run(scene.run(4))
    scene.end()
    assert sum(summary.done + summary.failed for summary in summaries) == 200
    assert len(list(read_final_rows(scene.path))) == 200
    account, paid = read_account(scene.path), judge.stats()["paid"]
    assert sum(paid.values()) <= len(paid) + account.uncertain
    assert account.uncertain >= 10


def test_the_cap_holds_at_every_moment(judge: Remote, tmp_path: Path) -> None:
    judge.play(faults={"malformed": 0.1}, latency_s=0.01)
    cap = 0.02
    scene = Scene(judge, tmp_path, 100, cap=cap)
    summaries = asyncio.run(scene.run(4))
    scene.end()
    check_money(scene.path, cap)
    assert sum(summary.broke for summary in summaries) > 0
    assert cap - read_account(scene.path).spent < max(call.dollars for call in scene.plan)


def test_killed_at_any_point_nothing_is_lost_and_nothing_paid_twice(judge: Remote, tmp_path: Path) -> None:
    """Reviewers, limiter, ledger and the whole job, killed again and again: the results are those of a quiet run."""
    judge.play(latency_s=0.005)
    quiet = Scene(judge, tmp_path / "quiet", 200)
    asyncio.run(quiet.run(3))
    quiet.end()
    expected = {row["key"]: row["scores"] for row in read_final_rows(quiet.path)}
    judge.play(latency_s=0.04, requests_per_minute=60_000, window_s=1.0)
    cap = 0.5
    stormy = Scene(judge, tmp_path / "stormy", 200, cap=cap, requests_per_minute=60_000, window_s=1.0)
    num_kills = asyncio.run(storm(stormy, random.Random(5)))
    purse = stormy.limiter.instance.budget
    stormy.end()
    assert num_kills == NUM_KILLS
    assert {row["key"]: row["scores"] for row in read_final_rows(stormy.path)} == expected
    account, stats = read_account(stormy.path), judge.stats()
    assert account.uncertain > 0
    assert sum(stats["paid"].values()) <= len(expected) + account.uncertain
    assert len(stats["arrivals"]) <= len(expected) + account.uncertain + account.refused
    check_money(stormy.path, cap)
    # The limiter's books, put together anew after each kill, are the ledger's.
    assert (purse.spent, purse.leased) == (pytest.approx(account.spent), 0)


async def storm(scene: Scene, draw: random.Random) -> int:
    """Work with three reviewers, kill something every few milliseconds, and replace what died as the pool does."""
    calls, num_kills = list(scene.plan), 0
    running: dict[asyncio.Task[Summary], tuple[Reviewer, list[Call]]] = {}
    while True:
        states = await scene.ledger.states.remote([call.key for call in calls])
        held = {call.key for _, some in running.values() for call in some}
        waiting = [call for call, s in zip(calls, states, strict=True) if s != "done" and call.key not in held]
        while waiting and len(running) < 3:
            reviewer, some = scene.reviewer(), waiting[:8]
            waiting = waiting[8:]
            running[asyncio.create_task(reviewer.review(some))] = (reviewer, some)
        if not running:
            return num_kills
        await asyncio.sleep(draw.uniform(0, 0.04))
        victim = draw.choice(VICTIMS) if num_kills < NUM_KILLS else "none"
        num_kills += victim != "none"
        if victim == "limiter":
            scene.limiter.kill()
        elif victim == "ledger":
            scene.ledger.kill(lambda ledger: ledger.file.close())
        elif victim == "job":
            for task, (reviewer, _) in running.items():
                await end(task, reviewer)
            running.clear()
            scene.session += 1
            scene.limiter.kill()
            scene.ledger.kill(lambda ledger: ledger.file.close())
        elif victim == "reviewer":
            task = draw.choice(list(running))
            reviewer, _ = running.pop(task)
            await end(task, reviewer)
            lost = await scene.ledger.abandon.remote(reviewer.name, "it died")
            await scene.limiter.release_owner.remote(reviewer.name, lost)
        for task in [task for task in running if task.done()]:
            task.result()
            await close([running.pop(task)[0]])


async def end(review: asyncio.Task[Summary], reviewer: Reviewer) -> None:
    """Do what the end of its process would do."""
    gatherers = [*reviewer.acquires.values(), reviewer.sends, reviewer.returns, reviewer.finishes, reviewer.settles]
    for task in [review, *(gatherer.running for gatherer in gatherers if gatherer.running)]:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    await close([reviewer])


@pytest.mark.verify
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("limit", "num"),
    [({"requests_per_minute": 300}, 540), ({"tokens_per_minute": 60_000}, 860)],
    ids=["requests", "tokens"],
)
def test_whole_minutes(judge: Remote, tmp_path: Path, limit: dict[str, int], num: int) -> None:
    """Sixteen reviewers over minutes of sixty seconds, with a judge that takes a third of a second."""
    judge.play(**limit, latency_s=0.3, announce=True)
    scene = Scene(judge, tmp_path, num, **limit)
    asyncio.run(scene.run(16))
    scene.end()
    (most,) = limit.values()
    check_windows(judge.stats(), 60.0, most, 1 if "tokens_per_minute" in limit else None)
