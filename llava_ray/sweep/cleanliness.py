"""Whether a sweep can clean up after itself, and whether it has."""

import time
from dataclasses import dataclass

import ray
from ray.util.placement_group import placement_group_table
from ray.util.state import list_actors
from ray.util.state.exception import RayStateApiException

from llava_ray.errors import ConfigError

PATIENCE_S = 60.0


@dataclass(frozen=True)
class Belongings:
    """What a cluster has free, and which groups of resources are reserved."""

    cpus: float
    gpus: float
    groups: frozenset[str]


def check_state_api() -> None:
    """Raise ConfigError where nobody answers questions about actors.

    Ray gives back the reserved resources of a stopped trial by asking whether its controller lives. Without an answer
    it never does, and the sweep would wait for them for ever.
    """
    where = ray._private.worker.get_dashboard_url()  # not among the public calls
    try:
        if not where:
            raise ConnectionError("there is none")
        list_actors(address=f"http://{where}", limit=1)
    except (RayStateApiException, OSError) as error:
        raise ConfigError(
            f"the cluster's dashboard does not answer ({error}), and a sweep needs it to free what stopped trials have "
            "reserved: start Ray with include_dashboard=True, or leave cluster.address out"
        ) from error


def take_stock() -> Belongings:
    """Return what is free and reserved now."""
    free = ray.available_resources()
    groups = frozenset(name for name, row in placement_group_table().items() if row["state"] != "REMOVED")
    return Belongings(free.get("CPU", 0.0), free.get("GPU", 0.0), groups)


def wait_until_clean(before: Belongings, seconds: float = PATIENCE_S) -> list[str]:
    """Wait until all that was free before a sweep is free again; return what still is not, in words."""
    end = time.monotonic() + seconds
    while True:
        now = take_stock()
        left = [f"{len(now.groups - before.groups)} placement groups"] if now.groups - before.groups else []
        left += [f"{before.cpus - now.cpus:g} CPUs"] if now.cpus < before.cpus - 1e-3 else []
        left += [f"{before.gpus - now.gpus:g} GPUs"] if now.gpus < before.gpus - 1e-3 else []
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.5)
