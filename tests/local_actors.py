"""Actors without processes: the classes that Ray would run, on one event loop, killed as often as a test likes."""

import asyncio
from collections.abc import Callable
from typing import Any

from ray.exceptions import ActorUnavailableError


class Method:
    def __init__(self, actor: "LocalActor", name: str) -> None:
        self.actor, self.name = actor, name

    async def remote(self, *arguments: Any) -> Any:
        return await self.actor.call(self.name, arguments)


class LocalActor:
    """Looks like an actor's handle. ``kill`` ends all calls where they stand; then ``make`` starts it anew."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make
        self.instance = make()
        self.calls: set[asyncio.Task[Any]] = set()

    def __getattr__(self, name: str) -> Method:
        return Method(self, name)

    async def call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        task = asyncio.create_task(getattr(self.instance, name)(*arguments))
        self.calls.add(task)
        try:
            return await asyncio.shield(task)  # a caller that dies does not end the call
        except asyncio.CancelledError:
            if task.cancelled():
                raise ActorUnavailableError("killed", None) from None
            raise
        finally:
            if task.done():
                self.calls.discard(task)

    def kill(self, end: Callable[[Any], None] = lambda instance: None) -> None:
        """End it; ``end`` does what the end of its process would do."""
        for task in self.calls:
            task.cancel()
        self.calls.clear()
        end(self.instance)
        self.instance = self.make()
