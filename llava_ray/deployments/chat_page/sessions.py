"""The page's sessions: their owners, and a bound on the results that Gradio keeps for unread ones."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from llava_ray.deployments.http.auth import ApiKey
from llava_ray.deployments.http.limits import HeldAmounts, too_many_bytes_in_flight
from llava_ray.deployments.refusal import RefusalError, refuse

_UNREAD_S = 60.0  # the page opens its stream right after an event
_COPIES = 3  # of a chat while an event runs: the input, the first state of its result and the last

MAX_OWNERS = 10_000  # sessions whose user is remembered


class SessionOwners:
    """The owner of each session where users log in: Gradio itself serves a session to anyone who knows its name."""

    def __init__(self) -> None:
        """Initialise without owners."""
        self.owners: dict[str, str] = {}

    def claim(self, name: str, api_key: ApiKey) -> None:
        """Assign a session to its first user. Raises RefusalError (404) for the session of another user."""
        if not api_key.sha256:  # without keys there are no users
            return
        owner = self.owners.pop(name, api_key.name)
        self.owners[name] = owner  # moved to the end: the first are the least recently used
        if len(self.owners) > MAX_OWNERS:
            del self.owners[next(iter(self.owners))]
        if owner != api_key.name:
            raise refuse(404, "no session of yours; load the page again", "page_session")


@dataclass
class Session:
    """The events of one session whose results have not been read completely."""

    holder: str
    num_bytes: int = 0
    num_streams: int = 0
    last: float = 0.0


class UnreadEvents:
    """A bound on unread results: Gradio queues them until a stream of their session reads them, for ever."""

    def __init__(
        self,
        bytes_in_flight: HeldAmounts,
        drop: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Initialise; count in ``bytes_in_flight``; ``drop`` makes Gradio cancel a session's events."""
        self.bytes_in_flight = bytes_in_flight
        self.drop = drop
        self.clock = clock
        self.sessions: dict[str, Session] = {}

    def add(self, name: str, holder: str, num_bytes: int) -> None:
        """Count a forwarded event. Raises RefusalError (429) if too much is in flight."""
        self.drop_old()
        # Another address may use a session's name; all bytes count for the first one.
        session = self.sessions.get(name) or Session(holder)
        if not self.bytes_in_flight.take(session.holder, _COPIES * num_bytes):
            raise RefusalError(too_many_bytes_in_flight(self.bytes_in_flight))
        self.sessions[name] = session
        session.num_bytes += _COPIES * num_bytes
        session.last = self.clock()

    @contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """Keep a session while one of its streams is open, and release its bytes after the last one."""
        session = self.sessions.get(name)
        if session is None:
            yield
            return
        session.num_streams += 1
        try:
            yield
        finally:
            session.num_streams -= 1
            if not session.num_streams:
                self.release(name, session)

    def drop_old(self) -> None:
        """Drop sessions without a reader."""
        border = self.clock() - _UNREAD_S
        for name, session in list(self.sessions.items()):
            if not session.num_streams and session.last < border:
                self.release(name, session)
                self.drop(name)

    def release(self, name: str, session: Session) -> None:
        """Release the bytes of a session."""
        if self.sessions.get(name) is session:
            del self.sessions[name]
            self.bytes_in_flight.release(session.holder, session.num_bytes)
