"""Admission control of a replica: a request over the limit is rejected before its images are read."""

from collections.abc import Iterator
from contextlib import contextmanager

from llava_ray.deployments.refusal import RefusalError, Refused


class Admission:
    """A bounded count of answers. Serve's own ``max_queued_requests`` counts per caller; this one counts all."""

    def __init__(self, max_running: int, max_queued: int, retry_after_s: int) -> None:
        """Initialise a limit of ``max_running + max_queued`` answers."""
        self.limit = max_running + max_queued
        self.max_queued = max_queued
        self.retry_after_s = retry_after_s
        self.held = 0

    @contextmanager
    def admitted(self, num_answers: int = 1) -> Iterator[None]:
        """Occupy a slot for each answer while the block runs. Raises RefusalError (429) if there are too few."""
        if self.held + num_answers > self.limit:
            raise RefusalError(
                Refused(
                    429,
                    f"the queue is full, {self.max_queued} requests are waiting; try again in {self.retry_after_s} s",
                    "queue_full",
                    retry_after_s=self.retry_after_s,
                )
            )
        self.held += num_answers
        try:
            yield
        finally:
            self.held -= num_answers
