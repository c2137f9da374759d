"""Many small calls as few large ones: what comes in while one is on its way goes with the next."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Asked = TypeVar("Asked")
Said = TypeVar("Said")


class CallBatcher(Generic[Asked, Said]):
    """Calls a function of a list with as much as is waiting; one call is on its way at a time.

    The function may answer only the first so many: the others are asked again.
    """

    def __init__(self, function: Callable[[list[Asked]], Awaitable[list[Said]]]) -> None:
        """Keep the function."""
        self.function = function
        self.waiting: deque[tuple[Asked, asyncio.Future[Said]]] = deque()
        self.running: asyncio.Task[None] | None = None

    async def __call__(self, asked: Asked) -> Said:
        """Ask one thing, with whatever else is asked now. Raises what the function raises."""
        future: asyncio.Future[Said] = asyncio.get_running_loop().create_future()
        self.waiting.append((asked, future))
        if self.running is None:
            self.running = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        try:
            while self.waiting:
                # Those that have just become ready come along.
                await asyncio.sleep(0)
                asked = list(self.waiting)
                try:
                    answers = await self.function([one for one, _ in asked])
                except Exception as error:  # noqa: BLE001 - whoever asked gets it
                    for _, future in asked:
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
