"""The page's sessions: whose each is, and what Gradio keeps for those that nobody reads, which is bounded here."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from llava_ray.deployments.http.auth import ApiKey
from llava_ray.deployments.http.limits import HeldAmounts, too_many_bytes_in_flight
from llava_ray.deployments.refusal import RefusalError, refuse

_UNREAD_S = 60.0  # the page opens its stream right after an event
_COPIES = 3  # of a chat while an event runs: as it came, as the first state of its outcome and as the last

MAX_OWNERS = 10_000  # sessions whose user is remembered


class SessionOwners:
    """Whose each session is where users log in: Gradio gives what one holds to everybody who knows its name."""

    def __init__(self) -> None:
        """Know none."""
        self.owners: dict[str, str] = {}

    def claim(self, name: str, who: ApiKey) -> None:
        """Take a session for whoever uses it first. Raises RefusalError (404) for the session of another user."""
        if not who.sha256:  # without keys there are no users
            return
        owner = self.owners.pop(name, who.name)
        self.owners[name] = owner  # at the end: the first are those that have been quiet for longest
        if len(self.owners) > MAX_OWNERS:
            del self.owners[next(iter(self.owners))]
        if owner != who.name:
            raise refuse(404, "no session of yours; load the page again", "page_session")


@dataclass
class Session:
    """The events of one session whose outcome has not been read to its end."""

    holder: str
    num_bytes: int = 0
    num_streams: int = 0
    last: float = 0.0


class UnreadEvents:
    """Gradio queues the outcomes of events until a stream of their session takes them, however long that is."""

    def __init__(
        self,
        bytes_in_flight: HeldAmounts,
        drop: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Count in ``bytes_in_flight``; ``drop`` makes Gradio end a session's events, and forget their outcomes."""
        self.bytes_in_flight = bytes_in_flight
        self.drop = drop
        self.clock = clock
        self.sessions: dict[str, Session] = {}

    def add(self, name: str, holder: str, num_bytes: int) -> None:
        """Count an event that is let through. Raises RefusalError (429) if too much is in flight."""
        self.drop_old()
        # Another address may use a session's name; whoever was first holds all of it.
        session = self.sessions.get(name) or Session(holder)
        if not self.bytes_in_flight.take(session.holder, _COPIES * num_bytes):
            raise RefusalError(too_many_bytes_in_flight(self.bytes_in_flight))
        self.sessions[name] = session
        session.num_bytes += _COPIES * num_bytes
        session.last = self.clock()

    @contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """Keep a session while one of its streams is open; what it held is free once the last one has ended."""
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
        """Drop the sessions that nobody has come to read."""
        border = self.clock() - _UNREAD_S
        for name, session in list(self.sessions.items()):
            if not session.num_streams and session.last < border:
                self.release(name, session)
                self.drop(name)

    def release(self, name: str, session: Session) -> None:
        """Give back what a session held."""
        if self.sessions.get(name) is session:
            del self.sessions[name]
            self.bytes_in_flight.release(session.holder, session.num_bytes)
