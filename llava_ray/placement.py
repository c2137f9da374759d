"""Which nodes do what: pools of nodes for decoding, vision features and training, told apart by node labels.

A node says what it is for with the label ``pool``; a cluster that makes nodes only when they are wanted names all its
pools on its head node, with the label ``pools`` ("decode.vision.train"). A cluster without such labels has no pools,
and everything runs anywhere.
"""

from typing import Any, Literal, get_args

import ray

Pool = Literal["decode", "vision", "train"]

POOL_LABEL = "pool"
POOLS_LABEL = "pools"  # a label's value may hold dots, but no commas


def find_pools() -> frozenset[Pool]:
    """Return the pools that the connected cluster has, or can make nodes for."""
    alive = [node["Labels"] for node in ray.nodes() if node["Alive"]]
    named = {labels.get(POOL_LABEL) for labels in alive} | announced(alive)
    return frozenset(pool for pool in get_args(Pool) if pool in named)


def announced(labels: list[dict[str, str]]) -> set[str]:
    """Return the pools that nodes name for nodes that need not be there yet."""
    return {name for some in labels for name in some.get(POOLS_LABEL, "").split(".") if name}


def can_grow() -> bool:
    """Return whether the cluster makes nodes when they are wanted."""
    return bool(announced([node["Labels"] for node in ray.nodes() if node["Alive"]]))


def pool_selector(pool: Pool) -> dict[str, str] | None:
    """Return the label selector of a pool's nodes, None where the cluster has no such pool."""
    return {POOL_LABEL: pool} if pool in find_pools() else None


def in_pool(pool: Pool) -> dict[str, Any]:
    """Return the options of a task or actor that belongs to a pool, and goes on elsewhere once no node of it is left.

    None at all where the cluster has no such pool.
    """
    pools = find_pools()
    if pool not in pools:
        return {}
    others = sorted(pools - {pool})
    elsewhere = [{"label_selector": {POOL_LABEL: f"in({','.join(others)})"}}] if others else []
    return {"label_selector": {POOL_LABEL: pool}, "fallback_strategy": [*elsewhere, ANYWHERE]}


ANYWHERE: dict[str, Any] = {"label_selector": {POOL_LABEL: "!in(nowhere)"}}


def pool_resources(pool: Pool) -> dict[str, float]:
    """Return the CPUs and GPUs of the nodes that a pool's work may use now: its own, or all where there is no pool."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if pool in find_pools():
        nodes = [node for node in nodes if node["Labels"].get(POOL_LABEL) == pool]
    return {name: sum(node["Resources"].get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")}
