"""Scheduling of the running batch: admission of requests and prefill of their prompts, first come, first served."""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, runtime_checkable


@runtime_checkable
class HasPrompt(Protocol):
    """A request with a prompt that is partly prefilled."""

    @property
    def num_read(self) -> int:
        """Return the number of prompt tokens that are in the cache."""

    @property
    def num_unread(self) -> int:
        """Return the number of prompt tokens that are not in the cache yet."""

    @property
    def num_tokens(self) -> int:
        """Return the most tokens of prompt and answer."""


R = TypeVar("R", bound=HasPrompt)


@dataclass(frozen=True)
class PrefillChunk(Generic[R]):
    """The tokens of a request's prompt that a step prefills."""

    request: R
    num_tokens: int

    @property
    def slots(self) -> tuple[int, int]:
        """Return the range of these tokens in the prompt; valid before they are read."""
        return self.request.num_read, self.request.num_read + self.num_tokens


class WaitingQueue(Generic[R]):
    """Requests that wait for a slot, strictly in order, so that a long one is not starved by short ones."""

    def __init__(self) -> None:
        """Initialise an empty queue."""
        self._queue: deque[R] = deque()
        self.num_tokens = 0
        """Tokens of prompts and answers that wait."""

    def __len__(self) -> int:
        """Return the number of waiting requests."""
        return len(self._queue)

    def join(self, request: R) -> None:
        """Append a request."""
        self._queue.append(request)
        self.num_tokens += request.num_tokens

    def leave(self, request: R) -> bool:
        """Remove a request before it is admitted; return whether it was waiting."""
        was_waiting = request in self._queue
        if was_waiting:
            self._queue.remove(request)
            self.num_tokens -= request.num_tokens
        return was_waiting

    def admit(self, most: int, reserve_slot: Callable[[R], bool]) -> list[R]:
        """Admit at most ``most`` requests from the front, until one finds no room."""
        admitted: list[R] = []
        while self._queue and len(admitted) < most and reserve_slot(self._queue[0]):
            admitted.append(self._queue.popleft())
            self.num_tokens -= admitted[-1].num_tokens
        return admitted


def split_prefill_chunk(running: Iterable[R], chunk: int) -> list[PrefillChunk[R]]:
    """Distribute a step's ``chunk`` of prompt tokens over requests with unread ones, in order of arrival.

    This bounds the pause of a decoding stream between two tokens to the time of one such chunk.
    """
    chunks: list[PrefillChunk[R]] = []
    for request in running:
        if chunk and request.num_unread:
            chunks.append(PrefillChunk(request, min(chunk, request.num_unread)))
            chunk -= chunks[-1].num_tokens
    return chunks
