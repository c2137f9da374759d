"""Who joins the running batch, and how much of the prompts a step reads: first come, first served."""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class HasPrompt(Protocol):
    """What is known of a request's prompt."""

    @property
    def num_read(self) -> int:
        """Count the tokens of the prompt that the model has read."""

    @property
    def num_unread(self) -> int:
        """Count those that it has still to read."""


R = TypeVar("R", bound=HasPrompt)


@dataclass(frozen=True)
class PrefillChunk(Generic[R]):
    """How many tokens of a request's prompt a step reads."""

    request: R
    num_tokens: int

    @property
    def slots(self) -> tuple[int, int]:
        """Return the first of these tokens in the prompt, and the one after the last; before they are read."""
        return self.request.num_read, self.request.num_read + self.num_tokens


class WaitingQueue(Generic[R]):
    """Requests that have no room yet. Nobody overtakes, so that a long one is not starved by short ones."""

    def __init__(self) -> None:
        """Begin empty."""
        self._line: deque[R] = deque()

    def __len__(self) -> int:
        """Count those who wait."""
        return len(self._line)

    def join(self, request: R) -> None:
        """Stand at the end."""
        self._line.append(request)

    def leave(self, request: R) -> bool:
        """Go away unserved; return whether the request stood here."""
        stood_here = request in self._line
        if stood_here:
            self._line.remove(request)
        return stood_here

    def admit(self, num_places: int, find_room: Callable[[R], bool]) -> list[R]:
        """Let in at most so many from the front, as long as there is room for the first."""
        admitted: list[R] = []
        while self._line and len(admitted) < num_places and find_room(self._line[0]):
            admitted.append(self._line.popleft())
        return admitted


def share_chunk(running: Iterable[R], chunk: int) -> list[PrefillChunk[R]]:
    """Deal a step's ``chunk`` of prompt tokens to those who have some left, in the order they came in.

    A stream that writes waits for one such chunk at most between two of its tokens.
    """
    readings: list[PrefillChunk[R]] = []
    for request in running:
        if chunk and request.num_unread:
            readings.append(PrefillChunk(request, min(chunk, request.num_unread)))
            chunk -= readings[-1].num_tokens
    return readings
