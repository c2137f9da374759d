"""Pools of nodes for decoding, vision features and training, distinguished by node labels.

The label ``pool`` names a node's purpose. An autoscaling cluster names all its pools on its head node with the label
``pools`` ("decode.vision.train"), because their nodes may not exist yet. A cluster without such labels has no pools,
and everything runs anywhere.
"""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Literal, get_args

import ray

_Pool = Literal["decode", "vision", "train"]

POOL_LABEL = "pool"
_POOLS_LABEL = "pools"  # a label's value may hold dots, but no commas


def find_pools() -> frozenset[_Pool]:
    """Return the pools that the connected cluster has, or can start nodes for."""
    return pools_among([node["Labels"] for node in alive_nodes()])


def can_grow() -> bool:
    """Return whether the connected cluster starts nodes on demand."""
    return any(node["Labels"].get(_POOLS_LABEL) for node in alive_nodes())


def in_pool(pool: _Pool) -> dict[str, Any]:
    """Return the options of a task or actor that belongs to a pool; none where the connected cluster has no such pool.

    An autoscaling cluster replaces the last node of a pool when it is lost. On any other the work moves to other nodes.
    """
    return pool_options(pool, find_pools(), elsewhere=not can_grow())


def pool_selector(pool: _Pool) -> dict[str, str] | None:
    """Return the labels of a pool's nodes, None where the connected cluster has no such pool."""
    return {POOL_LABEL: pool} if pool in find_pools() else None


def pool_resources(pool: _Pool) -> dict[str, float]:
    """Return the CPUs and GPUs available to a pool's work: those of its nodes, or all where there is no such pool."""
    nodes = alive_nodes()
    if pool in find_pools():
        nodes = [node for node in nodes if node["Labels"].get(POOL_LABEL) == pool]
    return {name: sum(node["Resources"].get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")}


def pools_among(labels: Sequence[Mapping[str, str]]) -> frozenset[_Pool]:
    """Return the pools that nodes with these labels belong to or announce; other label values are ignored."""
    named = {some.get(POOL_LABEL) for some in labels}
    named |= {name for some in labels for name in some.get(_POOLS_LABEL, "").split(".")}
    return frozenset(pool for pool in get_args(_Pool) if pool in named)


def pool_options(pool: _Pool, pools: AbstractSet[_Pool], *, elsewhere: bool) -> dict[str, Any]:
    """Return the Ray options of a task or actor of ``pool``, given the existing ``pools``.

    ``elsewhere`` lets it run on other nodes too. On an autoscaling cluster it must not: Ray starts nodes only for work
    that no existing node can take.
    """
    if pool not in pools:
        return {}
    options: dict[str, Any] = {"label_selector": {POOL_LABEL: pool}}
    # Nodes without the label match too.
    return options | ({"fallback_strategy": [{"label_selector": {POOL_LABEL: f"!in({pool})"}}]} if elsewhere else {})


def alive_nodes() -> list[dict[str, Any]]:
    """Return the connected cluster's nodes."""
    return [node for node in ray.nodes() if node["Alive"]]
