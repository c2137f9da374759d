"""How many requests a replica holds; the next one is refused before anything of it is read."""

from collections.abc import Iterator
from contextlib import contextmanager

from llava_ray.deployments.refusal import RefusalError, Refused


class Admission:
    """A count with a bound. Serve's own ``max_queued_requests`` counts for each caller apart; this one for all."""

    def __init__(self, max_running: int, max_queued: int, retry_after_s: int) -> None:
        """Hold at most ``max_running + max_queued`` answers."""
        self.limit = max_running + max_queued
        self.max_queued = max_queued
        self.retry_after_s = retry_after_s
        self.held = 0

    @contextmanager
    def admitted(self, num_answers: int = 1) -> Iterator[None]:
        """Hold a place for each answer while the block runs. Raises RefusalError (429) if there are too few."""
        if self.held + num_answers > self.limit:
            raise RefusalError(
                Refused(
                    429,
                    f"no place left, {self.max_queued} requests wait already; try again in {self.retry_after_s} s",
                    "queue_full",
                    retry_after_s=self.retry_after_s,
                )
            )
        self.held += num_answers
        try:
            yield
        finally:
            self.held -= num_answers
