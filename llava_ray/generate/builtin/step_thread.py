"""The thread that loads a model and runs its steps, for callers on an event loop."""

import asyncio
import functools
from collections.abc import Callable
from threading import Condition, Thread
from typing import Any, Protocol, TypeVar

import torch

from llava_ray.errors import ModelError
from llava_ray.generate.builtin.running_batch import RunningBatch, StepResults
from llava_ray.generate.builtin.running_request import RunningRequest


class HasBatch(Protocol):
    """A loaded model with the batch whose steps are run."""

    @property
    def batch(self) -> RunningBatch:
        """The batch; only the thread calls its steps."""


L = TypeVar("L", bound=HasBatch)


class StepThread:
    """The thread of one model. All methods but those that begin with ``_`` are called on the event loop."""

    def __init__(self, fail_all: Callable[[BaseException], None]) -> None:
        """Initialise a thread that is not started; ``fail_all`` tells all callers, on the event loop, why it died."""
        self.fail_all = fail_all
        self._thread: Thread | None = None
        self._failure: BaseException | None = None
        self._changed = Condition()
        self._to_add: list[RunningRequest] = []
        self._to_drop: list[RunningRequest] = []
        self._between: list[tuple[Callable[[], None], asyncio.Future[None]]] = []
        """Calls to make before the next step."""
        self._stopping = False

    @property
    def is_started(self) -> bool:
        """Return whether the model was loaded once."""
        return self._thread is not None

    async def start(self, load: Callable[[], L]) -> L:
        """Load the model in the thread, and begin to run its steps. Raises what ``load`` raises."""
        self._loop = asyncio.get_running_loop()
        loading: asyncio.Future[L] = self._loop.create_future()
        thread = Thread(target=self._run, args=(load, loading), name="model-steps", daemon=True)
        thread.start()
        try:
            loaded = await loading
        except asyncio.CancelledError:
            self._stopping = True
            raise
        self._thread = thread
        return loaded

    def check_alive(self) -> None:
        """Check that steps are run. Raises ModelError."""
        if self._failure is not None:
            raise ModelError(f"the engine's loop died: {self._failure!r}. Restart it.") from self._failure
        if self._thread is None or not self._thread.is_alive():
            raise ModelError("the engine's loop is not running. Restart it.")

    def joining(self) -> list[RunningRequest]:
        """Return the requests that the batch has not seen yet."""
        return list(self._to_add)

    def add(self, running: RunningRequest) -> None:
        """Let a request join before the next step."""
        with self._changed:
            self._to_add.append(running)
            self._changed.notify()

    def drop(self, running: RunningRequest) -> None:
        """Let a request leave before the next step, if it has not ended."""
        with self._changed:
            if not running.ended:
                running.ended = True
                self._to_drop.append(running)
                self._changed.notify()

    async def call(self, function: Callable[[], None]) -> None:
        """Call a function in the thread, before its next step. Raises its error, or ModelError."""
        self.check_alive()
        done: asyncio.Future[None] = self._loop.create_future()
        with self._changed:
            if self._stopping:
                raise ModelError("the engine is stopping.")
            self._between.append((function, done))
            self._changed.notify()
        await done

    async def stop(self) -> None:
        """End the thread after its step, and free the model."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._thread.join)

    def _run(self, load: Callable[[], L], loading: "asyncio.Future[L]") -> None:
        try:
            loaded = load()
        except BaseException as error:  # noqa: BLE001 - whatever it was, start raises it
            self._tell(_settle, loading, None, error)
            return
        self._tell(_settle, loading, loaded)
        self._serve(loaded.batch)

    @torch.inference_mode()
    def _serve(self, batch: RunningBatch) -> None:
        """Run steps until the thread is to stop."""
        try:
            while True:
                with self._changed:
                    while not (self._stopping or self._to_add or self._to_drop or self._between or batch.has_work):
                        self._changed.wait()
                    joining, self._to_add = self._to_add, []
                    leaving, self._to_drop = self._to_drop, []
                    between, self._between = self._between, []
                batch.add(joining)
                batch.drop(leaving)
                for function, done in between:
                    self._call(function, done)
                if self._stopping:
                    break
                if results := batch.step():
                    self._tell(_deliver, results)
        except BaseException as error:  # noqa: BLE001 - whatever it was, all waiting callers must receive it
            self._failure = error
            self._tell(self.fail_all, error)
        finally:
            with self._changed:
                self._stopping = True
                between, self._between = self._between, []
            for _, done in between:
                self._tell(_settle, done, None, ModelError("the engine has stopped."))
            batch.close()
            torch.cuda.empty_cache()

    def _call(self, function: Callable[[], None], done: "asyncio.Future[None]") -> None:
        """Call a function between two steps; its error is its caller's alone."""
        failure: Exception | None = None
        try:
            function()
        except Exception as error:  # noqa: BLE001 - the caller raises it
            failure = error
        self._tell(_settle, done, None, failure)

    def _tell(self, function: Callable[..., None], *arguments: object) -> None:
        """Call a function on the event loop."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(functools.partial(function, *arguments))


def _deliver(results: StepResults) -> None:
    """Give each request its chunk or error."""
    for running, result in results:
        running.queue.put_nowait(result)


def _settle(done: "asyncio.Future[Any]", result: Any, failure: BaseException | None = None) -> None:
    """Set the result of a call, or its error, unless its caller has gone."""
    if done.cancelled():
        return
    if failure is None:
        done.set_result(result)
    else:
        done.set_exception(failure)
