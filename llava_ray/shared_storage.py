"""Whether every node of the cluster sees the same folders: asked before work starts, not found out hours later."""

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
"""For all nodes together to answer; starting a worker process takes seconds."""

_REMEDY = (
    "mount one storage at the same place on all nodes (clusters/README.md, Storage), or name a URL that all can reach, "
    "such as s3://bucket/runs"
)


@dataclass(frozen=True)
class Places:
    """Folders and files, local or URLs: what every node writes to, and what every node reads."""

    written: tuple[str, ...] = ()
    read: tuple[str, ...] = ()

    @classmethod
    def of(cls, written: Sequence[str], read: Sequence[str | None]) -> "Places":
        """Write local paths out; among ``read``, leave out what is no file here: hub ids, and what is not set."""
        here = [_absolute(name) for name in read if name and ("://" in name or Path(name).expanduser().exists())]
        return cls(tuple(map(_absolute, written)), tuple(here))


def check_shared(places: Places) -> None:
    """Let every node of the connected cluster try ``places``; do nothing where there is only one node.

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
    """Return what is wrong, node by node: a mark of this process that is not seen, or one of theirs not seen here."""
    asked = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = ray.remote(look).options(num_cpus=0, scheduling_strategy=there, max_retries=0)
        asked[node["NodeID"]] = task.remote(places, token, node["NodeID"])
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=_PATIENCE_S)
    faults = []
    for node in nodes:
        faults += [f"{_described(node)}: {fault}" for fault in _answer_of(asked[node["NodeID"]])] or [
            f"{_described(node)} writes to another {place!r} than this node"
            for place in places.written
            if _attempt(_read_mark, place, token, node["NodeID"])
        ]
    return faults


def _answer_of(task: ray.ObjectRef) -> list[str]:
    """Return a node's own complaints, or that it did not answer."""
    try:
        found: list[str] = ray.get(task, timeout=0)
    except GetTimeoutError:
        return [f"no answer within {_PATIENCE_S:g} s"]
    except RayError as error:
        return [str(error).strip().splitlines()[-1]]
    return found


def look(places: Places, token: str, node_id: str) -> list[str]:
    """Read the driver's mark in each folder, leave one of this node's own, find what is read; return complaints."""
    faults = []
    for place in places.written:
        fault = _attempt(_read_mark, place, token, DRIVER) or _attempt(write_mark, place, token, node_id)
        faults += [fault] if fault else []
    return faults + [fault for place in places.read if (fault := _attempt(_find, place, token, node_id))]


def _attempt(act: Callable[[str, str, str], None], place: str, token: str, name: str) -> str | None:
    """Return what went wrong in words, None if nothing."""
    try:
        act(place, token, name)
    except (OSError, ValueError, ImportError) as error:
        return f"{place!r}: {error or type(error).__name__}"
    return None


def write_mark(place: str, token: str, name: str) -> None:
    """Leave a small file that says who wrote it."""
    files, inner = fsspec.core.url_to_fs(place)
    files.makedirs(inner, exist_ok=True)
    files.pipe_file(f"{inner}/{mark(token, name)}", name.encode())


def _read_mark(place: str, token: str, name: str) -> None:
    """Read such a file. Raises FileNotFoundError, or ValueError where somebody else wrote it."""
    files, inner = fsspec.core.url_to_fs(place)
    files.invalidate_cache()
    try:
        said = files.cat_file(f"{inner}/{mark(token, name)}")
    except FileNotFoundError as error:
        raise FileNotFoundError("what another node wrote there is not to be seen") from error
    if said != name.encode():
        raise ValueError("holds what nobody wrote")


def _find(place: str, token: str, name: str) -> None:
    """Raise FileNotFoundError where nothing is there."""
    del token, name
    files, inner = fsspec.core.url_to_fs(place)
    files.invalidate_cache()
    if not files.exists(inner):
        raise FileNotFoundError("is not there")


def mark(token: str, name: str) -> str:
    """Return the file's name."""
    return f".shared-{token}-{uuid.uuid5(uuid.NAMESPACE_URL, name).hex}"


def _remove_marks(place: str, token: str, name: str) -> None:
    """Leave nothing behind."""
    del name
    files, inner = fsspec.core.url_to_fs(place)
    files.invalidate_cache()
    for left in files.glob(f"{inner}/.shared-{token}-*"):
        files.rm_file(left)


def _absolute(folder: str) -> str:
    """Return a URL as it is and a local path from the root."""
    return folder.rstrip("/") if "://" in folder else str(Path(folder).expanduser().absolute())


def _described(node: dict[str, Any]) -> str:
    """Name a node as its operator knows it."""
    pool = node["Labels"].get(POOL_LABEL)
    return f"node {node['NodeManagerAddress']}" + (f" (pool {pool})" if pool else "")
