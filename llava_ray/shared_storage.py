"""A check that every node of the cluster sees the same folders, made before work starts instead of hours later."""

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from llava_ray.errors import ConfigError
from llava_ray.placement import POOL_LABEL, alive_nodes

DRIVER = "driver"
_PATIENCE_S = 60.0
"""Seconds in which all nodes must answer; starting a worker process takes several."""

_REMEDY = (
    "mount one storage at the same place on all nodes (clusters/README.md, Storage), or name a URL that all can reach, "
    "such as s3://bucket/runs"
)


@dataclass(frozen=True)
class Places:
    """Folders and files, local or URLs, that every node writes to or reads."""

    written: tuple[str, ...] = ()
    read: tuple[str, ...] = ()

    @classmethod
    def of(cls, written: Sequence[str], read: Sequence[str | None]) -> "Places":
        """Make local paths absolute; drop hub ids and unset values from ``read``."""
        local = [name for name in read if name and not name.startswith("hf:/")]
        here = [_absolute(name) for name in local if "://" in name or Path(name).expanduser().exists()]
        return cls(tuple(map(_absolute, written)), tuple(here))


def check_shared(places: Places) -> None:
    """Check ``places`` from every node of the connected cluster; return at once where there is only one node.

    Raises ConfigError that names each node, each place and what is wrong with it.
    """
    nodes = alive_nodes()
    if len(nodes) < 2 or not (places.written or places.read):
        return
    token = uuid.uuid4().hex
    try:
        faults = [fault for place in places.written if (fault := _attempt(write_mark, place, token, DRIVER))]
        faults = faults or _ask_nodes(nodes, places, token)
    finally:
        for place in places.written:
            _attempt(_remove_marks, place, token, DRIVER)
    if faults:
        raise ConfigError("storage is not shared by all nodes: " + "; ".join(faults) + f". Remedy: {_REMEDY}")


def _ask_nodes(nodes: Sequence[dict[str, Any]], places: Places, token: str) -> list[str]:
    """Return the faults of each node: the driver's mark not visible there, or its mark not visible here."""
    tasks = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = ray.remote(check_from_node).options(num_cpus=0, scheduling_strategy=there, max_retries=0)
        tasks[node["NodeID"]] = task.remote(places, token, node["NodeID"])
    ray.wait(list(tasks.values()), num_returns=len(tasks), timeout=_PATIENCE_S)
    faults = []
    for node in nodes:
        faults += [f"{_described(node)}: {fault}" for fault in _answer_of(tasks[node["NodeID"]])] or [
            f"{_described(node)} writes to another {place!r} than this node"
            for place in places.written
            if _attempt(_read_mark, place, token, node["NodeID"])
        ]
    return faults


def _answer_of(task: ray.ObjectRef) -> list[str]:
    """Return the faults that a node reports, or that it did not answer."""
    try:
        found: list[str] = ray.get(task, timeout=0)
    except GetTimeoutError:
        return [f"no answer within {_PATIENCE_S:g} s"]
    except RayError as error:
        return [str(error).strip().splitlines()[-1]]
    return found


def check_from_node(places: Places, token: str, node_id: str) -> list[str]:
    """Read the driver's mark in each folder, write this node's own, look for the files to read; return the faults."""
    faults = []
    for place in places.written:
        fault = _attempt(_read_mark, place, token, DRIVER) or _attempt(write_mark, place, token, node_id)
        faults += [fault] if fault else []
    return faults + [fault for place in places.read if (fault := _attempt(_find, place, token, node_id))]


def _attempt(act: Callable[[str, str, str], None], place: str, token: str, name: str) -> str | None:
    """Return a description of the failure, None if there is none."""
    try:
        act(place, token, name)
    except (OSError, ValueError, ImportError) as error:
        return f"{place!r}: {error or type(error).__name__}"
    return None


def write_mark(place: str, token: str, name: str) -> None:
    """Write a small file that names its writer."""
    files, inner = fsspec.core.url_to_fs(place)
    files.makedirs(inner, exist_ok=True)
    files.pipe_file(f"{inner}/{mark_name(token, name)}", name.encode())


def _read_mark(place: str, token: str, name: str) -> None:
    """Read a mark. Raises FileNotFoundError, or ValueError where another writer's name is in it."""
    files, inner = fsspec.core.url_to_fs(place)
    files.invalidate_cache()
    try:
        content = files.cat_file(f"{inner}/{mark_name(token, name)}")
    except FileNotFoundError as error:
        raise FileNotFoundError("a file that another node wrote there is not visible") from error
    if content != name.encode():
        raise ValueError("holds a file with other content than was written")


def _find(place: str, token: str, name: str) -> None:
    """Raise FileNotFoundError where the path does not exist."""
    del token, name
    files, inner = fsspec.core.url_to_fs(place)
    files.invalidate_cache()
    if not files.exists(inner):
        raise FileNotFoundError("does not exist")


def mark_name(token: str, name: str) -> str:
    """Return the file name of a writer's mark."""
    return f".shared-{token}-{uuid.uuid5(uuid.NAMESPACE_URL, name).hex}"


def _remove_marks(place: str, token: str, name: str) -> None:
    """Delete all marks of this check."""
    del name
    files, inner = fsspec.core.url_to_fs(place)
    files.invalidate_cache()
    for left in files.glob(f"{inner}/.shared-{token}-*"):
        files.rm_file(left)


def _absolute(folder: str) -> str:
    """Return a local path as an absolute one, a URL unchanged."""
    return folder.rstrip("/") if "://" in folder else str(Path(folder).expanduser().absolute())


def _described(node: dict[str, Any]) -> str:
    """Return a node's address and pool for messages."""
    pool = node["Labels"].get(POOL_LABEL)
    return f"node {node['NodeManagerAddress']}" + (f" (pool {pool})" if pool else "")
