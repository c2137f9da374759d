"""Batching of many small calls into few large ones: calls that arrive during one are sent with the next."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

_Request = TypeVar("_Request")
_Result = TypeVar("_Result")


class CallBatcher(Generic[_Request, _Result]):
    """Calls a function of a list with all waiting arguments, one call at a time.

    The function may return results for a prefix only: the other arguments are sent again.
    """

    def __init__(self, function: Callable[[list[_Request]], Awaitable[list[_Result]]]) -> None:
        """Initialise with the function to call."""
        self.function = function
        self.waiting: deque[tuple[_Request, asyncio.Future[_Result]]] = deque()
        self.running: asyncio.Task[None] | None = None

    async def __call__(self, request: _Request) -> _Result:
        """Call with one argument, batched with others. Raises the function's errors."""
        future: asyncio.Future[_Result] = asyncio.get_running_loop().create_future()
        self.waiting.append((request, future))
        if self.running is None:
            self.running = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        try:
            while self.waiting:
                # Let tasks that are ready now add their calls first.
                await asyncio.sleep(0)
                requests = list(self.waiting)
                try:
                    answers = await self.function([one for one, _ in requests])
                except Exception as error:  # noqa: BLE001 - raised again in each caller
                    for _, future in requests:
                        self.waiting.popleft()
                        if not future.done():
                            future.set_exception(error)
                    continue
                for answer in answers:
                    _, future = self.waiting.popleft()
                    if not future.done():
                        future.set_result(answer)
        finally:
            self.running = None
