"""Release of a sweep's cluster resources: whether it is possible, the release itself, and its verification."""

import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray import PlacementGroupID
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from ray.util.state import list_actors, list_placement_groups
from ray.util.state.exception import RayStateApiException

from llava_ray.errors import ConfigError

_RELEASE_TIMEOUT_S = 60.0
_SECONDS_BETWEEN_ROUNDS = 5.0
_ORPHANED_ROUNDS = 3  # without an actor for so many rounds: starting a run's workers takes less
_MOST_ACTORS = 10_000  # that Ray lists


@dataclass(frozen=True)
class ClusterUsage:
    """The free resources of a cluster, and its placement groups."""

    cpus: float
    gpus: float
    groups: frozenset[str]


def check_state_api(where: str | None) -> None:
    """Check that Ray's state API responds; ``where`` is the dashboard's address. Raises ConfigError.

    Ray releases the resources of a stopped trial after asking the state API whether its controller is alive. Without a
    response it never does, and the sweep would wait for ever.
    """
    try:
        if where is None:
            raise ConnectionError("there is none")
        list_actors(address=where, limit=1)
    except (RayStateApiException, OSError) as error:
        raise ConfigError(
            f"the cluster's dashboard does not respond ({error}), and a sweep needs it to free the resources of "
            "stopped trials: start Ray with include_dashboard=True, or leave cluster.address out"
        ) from error


def find_dashboard_address() -> str | None:
    """Return the address of the connected cluster's dashboard, None where there is none."""
    where = ray._private.worker.get_dashboard_url()  # not among the public calls
    return f"http://{where}" if where else None


@dataclass(frozen=True)
class Group:
    """A placement group, with the fields that identify its owner."""

    id: str
    job: str
    bundles: Sequence[Mapping[str, float]]


@contextmanager
def release_orphaned_groups(bundle: Mapping[str, float]) -> Iterator[None]:
    """Release placement groups that stopped runs of this job leave behind, until the block ends.

    Ray's own clean-up misses groups that a run's controller reserves while it is being stopped: it sees its workers
    die, and starts new ones at once. ``bundle`` holds a worker's resources.
    """
    done = threading.Event()
    job = ray.get_runtime_context().get_job_id()

    def clear() -> None:
        num_rounds: dict[str, int] = {}
        while not done.wait(_SECONDS_BETWEEN_ROUNDS):
            try:
                orphans = find_orphans(*_list_reserved(), job, bundle)
            except (RayStateApiException, OSError):  # a busy dashboard; retried in the next round
                continue
            num_rounds = {name: num_rounds.get(name, 0) + 1 for name in orphans}
            for name in [name for name, rounds in num_rounds.items() if rounds >= _ORPHANED_ROUNDS]:
                remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))

    thread = threading.Thread(target=clear, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _list_reserved() -> tuple[list[Group], set[str]]:
    """Return the groups that hold resources, and the ids of those with an actor."""
    where = find_dashboard_address()
    groups = [
        Group(row.placement_group_id, row.creator_job_id, [bundle["unit_resources"] for bundle in row.bundles])
        for row in list_placement_groups(address=where, filters=[("state", "=", "CREATED")], detail=True)
    ]
    actors = list_actors(address=where, filters=[("state", "!=", "DEAD")], detail=True, limit=_MOST_ACTORS)
    return groups, {actor.placement_group_id for actor in actors if actor.placement_group_id}


def find_orphans(
    groups: Sequence[Group], occupied: Collection[str], job: str, bundle: Mapping[str, float]
) -> list[str]:
    """Return the worker groups of this job's runs without an actor."""
    return [
        group.id
        for group in groups
        if group.job == job and group.id not in occupied and all(bundle.items() <= own.items() for own in group.bundles)
    ]


def snapshot_usage() -> ClusterUsage:
    """Return the current usage of the cluster."""
    free = ray.available_resources()
    groups = frozenset(name for name, row in placement_group_table().items() if row["state"] != "REMOVED")
    return ClusterUsage(free.get("CPU", 0.0), free.get("GPU", 0.0), groups)


def wait_until_released(before: ClusterUsage, seconds: float = _RELEASE_TIMEOUT_S) -> list[str]:
    """Wait until the resources of before a sweep are free again; describe those that are not."""
    end = time.monotonic() + seconds
    while True:
        now = snapshot_usage()
        left = [f"{len(now.groups - before.groups)} placement groups"] if now.groups - before.groups else []
        left += [f"{before.cpus - now.cpus:g} CPUs"] if now.cpus < before.cpus - 1e-3 else []
        left += [f"{before.gpus - now.gpus:g} GPUs"] if now.gpus < before.gpus - 1e-3 else []
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.5)
