"""Which replica takes a request: a chat's turns go where its images are known, everything else where there is room."""

import hashlib
import random

from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.request_router import PendingRequest, RunningReplica

# A chat leaves its replica when that has so many more requests than the least busy of two others.
_PATIENCE = 4


class SessionRouter(ConsistentHashRouter):
    """Rendezvous hashing for sessions, two random choices for the rest, and for sessions of an overrun replica.

    Serve's own router for sessions hashes requests without one by their id, blind to load, and leaves a replica only
    when it is full; images of one chat are then waited for longer than it takes to encode them again. Its loop, which
    keeps each request with the replicas chosen for it, is what is built on.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return candidates; of each inner list Serve takes the one with the shortest queue."""
        if not candidate_replicas:
            return []
        if pending_request is None or not pending_request.metadata.session_id:
            return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
        pending_request.routing_context.should_backoff = True
        ranked = sorted(
            candidate_replicas, key=lambda one: _weight(pending_request.metadata.session_id, one), reverse=True
        )
        home, others = ranked[0], ranked[1:3]
        if others and self.queue(home) > _PATIENCE + min(self.queue(other) for other in others):
            return [[home, *others]]
        return [[home], others] if others else [[home]]

    def queue(self, replica: RunningReplica) -> int:
        """Return how many requests a replica has, as far as this router knows."""
        return self.replica_queue_len_cache.get(replica.replica_id) or 0


def _weight(session: str, replica: RunningReplica) -> bytes:
    """Return what a session prefers the replica by; it changes for no other when one comes or goes."""
    return hashlib.blake2b(f"{session}\0{replica.replica_id.unique_id}".encode(), digest_size=8).digest()
