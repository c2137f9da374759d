"""Routing of requests to replicas: to where their text or images are cached, otherwise to the session's replica."""

import random
from typing import Any

from ray.serve._private.common import ReplicaID
from ray.serve._private.replica_result import ReplicaResult
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.request_router import PendingRequest, RunningReplica

from llava_ray.deployments.affinity import CacheableContents, Placements, rank_replicas, read_contents
from llava_ray.deployments.bundles import BundleCall
from llava_ray.deployments.messages import Task

# A request leaves its replica when that has so many more requests than the least busy of two others.
_MAX_EXTRA_REQUESTS = 4


class SessionRouter(ConsistentHashRouter):
    """The replica that has a request's text, then its images, then rendezvous hashing of its session.

    Two random choices for requests without a session, which are retries, and other replicas for those of an overloaded
    one. Serve's own session router hashes requests without a session by their id, ignoring load, and leaves a replica
    only when it is full; waiting for a busy replica then takes longer than reading the prompt again. Only its retry
    loop, which keeps each request's candidates, is used here.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Initialise without knowing where anything is."""
        super().__init__(*args, **kwargs)
        self.placements = Placements()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return ranked lists of candidates; in each Serve takes the replica with the shortest queue."""
        if not candidate_replicas:
            return []
        first = pending_request.args[0] if pending_request is not None and pending_request.args else None
        if isinstance(first, BundleCall):
            named = [one for one in candidate_replicas if one.replica_id.unique_id == first.replica_id]
            return [named or candidate_replicas[:1]]  # another ends it at once, while no candidate would be waited for
        if pending_request is None or not pending_request.metadata.session_id:
            return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
        pending_request.routing_context.should_backoff = True
        by_id = {one.replica_id.unique_id: one for one in candidate_replicas}
        contents = _contents_of(pending_request)
        holders = [] if contents is None else self.placements.find_holders(contents, by_id)
        ranked = [by_id[name] for name in rank_replicas(pending_request.metadata.session_id, list(by_id), holders)]
        home, others = ranked[0], ranked[1:3]
        if others and self.queue(home) > _MAX_EXTRA_REQUESTS + min(self.queue(other) for other in others):
            return [[home, *others]]
        return [[home], others] if others else [[home]]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        """Remember where a request went."""
        del result
        contents = _contents_of(pending_request)
        if contents is not None:
            self.placements.record(contents, replica_id.unique_id)

    def queue(self, replica: RunningReplica) -> int:
        """Return the cached number of requests of a replica."""
        return self.replica_queue_len_cache.get(replica.replica_id) or 0


def _contents_of(pending_request: PendingRequest) -> CacheableContents | None:
    """Return what a request holds, read once; None for calls without a task."""
    task = pending_request.args[0] if pending_request.args else None
    if not isinstance(task, Task):
        return None
    known = getattr(pending_request, "_contents", None)
    if known is None:
        known = read_contents(task)
        pending_request._contents = known
    return known
