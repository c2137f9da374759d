"""Routing of requests to replicas: chats stay where their images are cached, others go to the least busy."""

import hashlib
import random

from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.request_router import PendingRequest, RunningReplica

# A chat leaves its replica when that has so many more requests than the least busy of two others.
_MAX_EXTRA_REQUESTS = 4


class SessionRouter(ConsistentHashRouter):
    """Rendezvous hashing for sessions, two random choices for the rest and for sessions of an overloaded replica.

    Serve's own session router hashes requests without a session by their id, ignoring load, and leaves a replica only
    when it is full; waiting for a busy replica then takes longer than encoding the images again. Only its retry loop,
    which keeps each request's candidates, is used here.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return ranked lists of candidates; in each Serve takes the replica with the shortest queue."""
        if not candidate_replicas:
            return []
        if pending_request is None or not pending_request.metadata.session_id:
            return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
        pending_request.routing_context.should_backoff = True
        ranked = sorted(
            candidate_replicas, key=lambda one: _weight(pending_request.metadata.session_id, one), reverse=True
        )
        home, others = ranked[0], ranked[1:3]
        if others and self.queue(home) > _MAX_EXTRA_REQUESTS + min(self.queue(other) for other in others):
            return [[home, *others]]
        return [[home], others] if others else [[home]]

    def queue(self, replica: RunningReplica) -> int:
        """Return the cached number of requests of a replica."""
        return self.replica_queue_len_cache.get(replica.replica_id) or 0


def _weight(session: str, replica: RunningReplica) -> bytes:
    """Return a replica's rendezvous weight for a session, independent of other replicas."""
    return hashlib.blake2b(f"{session}\0{replica.replica_id.unique_id}".encode(), digest_size=8).digest()
