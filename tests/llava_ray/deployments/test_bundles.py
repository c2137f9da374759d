"""Streams in bundles arrive whole and in order, whatever overtakes what, and end when their replica does."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError

from llava_ray.deployments import bundle_reading, bundles
from llava_ray.deployments.bundle_reading import StreamCalls
from llava_ray.deployments.bundles import BundleCall, ReplicaBundles, StreamPlace
from llava_ray.deployments.messages import Task
from llava_ray.deployments.refusal import RefusalError, Refused
from llava_ray.deployments.replica import AnswerPiece
from llava_ray.deployments.routing import SessionRouter
from llava_ray.generate.engine import GenerationChunk, Sampling

FULL = Refused(429, "the queue is full", "queue_full", retry_after_s=1)


class FakeReplica:
    """A replica with a handle to it in one process: messages of different calls overtake each other."""

    def __init__(self, step_s: float = 0.002) -> None:
        self.bundles = ReplicaBundles("r1")
        self.step_s = step_s
        self.calls: list[FakeCall] = []
        self.running = 0
        self.run = SimpleNamespace(remote=lambda task, place: self.called(self.answer(task, place)))
        self.carry = SimpleNamespace(remote=lambda call: self.called(self.bundles.carry(call), carries=True))

    def options(self, **options: Any) -> "FakeReplica":
        return self

    def called(self, messages: AsyncGenerator[Any, None], *, carries: bool = False) -> "FakeCall":
        delay_s = 0.0 if carries else self.step_s * 3 * (len(self.calls) % 5)
        self.calls.append(FakeCall(messages, carries=carries, delay_s=delay_s))
        return self.calls[-1]

    async def answer(self, task: Task, place: StreamPlace) -> AsyncGenerator[Any, None]:
        async for message in self.bundles.send(place, self.tokens(task), may_bundle=task.stream):
            yield message

    async def tokens(self, task: Task) -> AsyncGenerator[Refused | list[AnswerPiece], None]:
        self.running += 1
        try:
            for number in range(task.sampling.max_tokens):
                await asyncio.sleep(self.step_s)
                if task.prompt == "refused" and number == 5:
                    yield FULL
                    return
                yield [(0, GenerationChunk(f"{task.request_id}.{number} ", (number,)))]
        finally:
            self.running -= 1


class FakeCall:
    """What a handle's call returns: its messages come with a delay of its own."""

    def __init__(self, messages: AsyncGenerator[Any, None], *, carries: bool, delay_s: float) -> None:
        self.carries = carries
        self.cancelled = False
        self.sent: asyncio.Queue[Any] = asyncio.Queue()
        self.pump = asyncio.create_task(self.send(messages, delay_s))

    async def send(self, messages: AsyncGenerator[Any, None], delay_s: float) -> None:
        loop, end = asyncio.get_running_loop(), StopAsyncIteration()
        async with contextlib.aclosing(messages):
            async for message in messages:
                loop.call_later(delay_s, self.sent.put_nowait, message)
        loop.call_later(delay_s + 0.001, self.sent.put_nowait, end)

    def __aiter__(self) -> "FakeCall":
        return self

    async def __anext__(self) -> Any:
        message = await self.sent.get()
        if isinstance(message, Exception):
            raise message
        return message

    def cancel(self) -> None:
        self.cancelled = True
        self.pump.cancel()

    def die(self) -> None:
        self.pump.cancel()
        self.sent.put_nowait(ActorUnavailableError("gone", None))


def task(name: str, num_tokens: int = 40, *, prompt: str = "", stream: bool = True) -> Task:
    return Task(name, "m", prompt=prompt, sampling=Sampling(max_tokens=num_tokens), stream=stream)


async def said(calls: StreamCalls, asked: Task, pause_s: float = 0.0) -> str:
    text = ""
    async for pieces in calls.call(asked, "", 5.0):
        text += "".join(chunk.text for _, chunk in pieces)
        await asyncio.sleep(pause_s)
    return text


def expected(name: str, num_tokens: int = 40) -> str:
    return "".join(f"{name}.{number} " for number in range(num_tokens))


def run(test: Callable[[FakeReplica, StreamCalls], Any], step_s: float = 0.002) -> FakeReplica:
    async def running() -> FakeReplica:
        replica = FakeReplica(step_s)
        async with asyncio.timeout(20):
            await test(replica, StreamCalls(replica, "ingress"))  # type: ignore[arg-type]
        return replica

    return asyncio.run(running())


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "_IDLE_S", 0.05)


def test_every_stream_arrives_whole_and_in_order_and_most_of_it_bundled() -> None:
    async def test(replica: FakeReplica, calls: StreamCalls) -> None:
        async def later(index: int) -> str:
            await asyncio.sleep(index * 0.003)
            return await said(calls, task(f"q{index}", stream=index % 4 != 3))

        texts = await asyncio.gather(*(later(index) for index in range(16)))
        assert texts == [expected(f"q{index}") for index in range(16)]
        assert not calls.streams
        assert not calls.at_replica
        while replica.bundles.bundles or calls.carriers:  # nothing is left open
            await asyncio.sleep(0.005)

    replica = run(test)
    assert sum(call.carries for call in replica.calls) == 1


def test_a_lone_stream_has_no_second_call() -> None:
    async def test(replica: FakeReplica, calls: StreamCalls) -> None:
        assert await said(calls, task("q")) == expected("q")
        assert await said(calls, task("p")) == expected("p")

    assert not any(call.carries for call in run(test).calls)


def test_a_client_that_leaves_ends_its_stream_and_no_other() -> None:
    async def test(replica: FakeReplica, calls: StreamCalls) -> None:
        others = [asyncio.create_task(said(calls, task(f"q{index}"))) for index in range(3)]
        leaving = asyncio.create_task(said(calls, task("leaving", 10_000)))
        while not replica.bundles.bundles or replica.bundles.bundles["ingress"].num_streams < 4:
            await asyncio.sleep(0.002)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        while replica.running == 4:
            await asyncio.sleep(0.002)
        assert await asyncio.gather(*others) == [expected(f"q{index}") for index in range(3)]

    run(test)


def test_a_slow_client_delays_no_other_and_gets_all() -> None:
    async def test(replica: FakeReplica, calls: StreamCalls) -> None:
        slow = asyncio.create_task(said(calls, task("slow"), pause_s=0.02))
        others = await asyncio.gather(*(said(calls, task(f"q{index}")) for index in range(3)))
        assert others == [expected(f"q{index}") for index in range(3)]
        assert not slow.done()
        assert await slow == expected("slow")

    run(test)


def test_a_silent_replicas_call_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_reading, "SILENCE_S", 0.2)

    async def test(replica: FakeReplica, calls: StreamCalls) -> None:
        with pytest.raises(TimeoutError):
            await said(calls, task("q"))

    assert [call.cancelled for call in run(test, step_s=5.0).calls] == [True]


def test_a_refusal_ends_its_own_stream_alone() -> None:
    async def test(replica: FakeReplica, calls: StreamCalls) -> None:
        asked = [task("q0"), task("q1", prompt="refused"), task("q2")]
        first, refused, last = await asyncio.gather(*(said(calls, one) for one in asked), return_exceptions=True)
        assert (first, last) == (expected("q0"), expected("q2"))
        assert isinstance(refused, RefusalError)
        assert refused.refused == FULL

    run(test)


def test_the_streams_of_a_replica_that_dies_end_with_its_error() -> None:
    async def test(replica: FakeReplica, calls: StreamCalls) -> None:
        streams = [asyncio.create_task(said(calls, task(f"q{index}", 10_000))) for index in range(4)]
        await asyncio.sleep(0.05)
        for call in replica.calls:
            call.die()
        ends = await asyncio.gather(*streams, return_exceptions=True)
        assert [type(end) for end in ends] == [ActorUnavailableError] * 4
        while calls.carriers:
            await asyncio.sleep(0.005)

    run(test)


def test_a_lost_bundle_ends_its_streams_and_the_next_ones_get_another() -> None:
    async def test(replica: FakeReplica, calls: StreamCalls) -> None:
        streams = [asyncio.create_task(said(calls, task(f"q{index}", 10_000))) for index in range(4)]
        await asyncio.sleep(0.05)
        next(call for call in replica.calls if call.carries).die()
        ends = await asyncio.gather(*streams, return_exceptions=True)
        assert all(isinstance(end, ActorUnavailableError | RefusalError) for end in ends)
        while replica.running or calls.carriers:  # the replica notices with its next piece
            await asyncio.sleep(0.005)
        texts = await asyncio.gather(*(said(calls, task(f"p{index}")) for index in range(4)))
        assert texts == [expected(f"p{index}") for index in range(4)]

    assert sum(call.carries for call in run(test).calls) == 2


def test_items_that_never_come_are_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_reading, "SILENCE_S", 1.5)

    async def test(replica: FakeReplica, calls: StreamCalls) -> None:
        streams = [asyncio.create_task(said(calls, task(f"q{index}", 60))) for index in range(2)]
        await asyncio.sleep(0.05)
        calls.streams[0].add_bundled = lambda item: None  # type: ignore[method-assign]
        ends = await asyncio.gather(*streams, return_exceptions=True)
        assert isinstance(ends[0], TimeoutError)
        assert ends[1] == expected("q1", 60)

    run(test)


def test_a_call_that_carries_goes_to_its_replica_and_waits_for_none() -> None:
    router = object.__new__(SessionRouter)
    replicas = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in ("a", "b", "c")]

    def chosen(name: str) -> Any:
        pending = SimpleNamespace(args=[BundleCall("ingress", name)])
        return asyncio.run(router.choose_replicas(replicas, pending))  # type: ignore[arg-type]

    assert chosen("b") == [[replicas[1]]]
    assert chosen("d") == [[replicas[0]]]


def test_a_replica_carries_for_itself_and_once_for_an_ingress() -> None:
    async def running() -> None:
        own = ReplicaBundles("r1")
        assert [one async for one in own.carry(BundleCall("ingress", "r2"))] == []
        open_call = own.carry(BundleCall("ingress", "r1"))
        assert await anext(open_call) == []
        assert [one async for one in own.carry(BundleCall("ingress", "r1"))] == []
        assert [one async for one in open_call] == []  # idle

    asyncio.run(running())
