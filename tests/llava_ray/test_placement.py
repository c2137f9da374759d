"""Pools by label, without a cluster of several nodes (tests/clusters/test_four_nodes.py has one)."""

from pathlib import Path

import pytest

from llava_ray.config.run import ClusterConfig
from llava_ray.placement import can_grow, find_pools, in_pool, pool_options, pool_resources, pool_selector, pools_among
from llava_ray.runtime import fit_resources
from llava_ray.shared_storage import DRIVER, Places, check_from_node, mark_name, write_mark

TOKEN = "token"


def test_pools_are_those_of_nodes_and_those_announced() -> None:
    assert pools_among([]) == pools_among([{"pool": "somebody-else's"}, {"ray.io/node-id": "7"}]) == frozenset()
    assert pools_among([{"pool": "train"}, {"pool": "decode"}]) == {"train", "decode"}
    assert pools_among([{"pools": "decode.vision.train"}, {}]) == {"train", "decode", "vision"}


def test_what_belongs_to_a_pool_runs_elsewhere_only_where_the_pool_gets_no_new_nodes() -> None:
    fixed, growing = (pool_options("decode", {"train", "decode"}, elsewhere=elsewhere) for elsewhere in (True, False))
    assert growing == {"label_selector": {"pool": "decode"}}
    assert fixed == growing | {"fallback_strategy": [{"label_selector": {"pool": "!in(decode)"}}]}
    assert pool_options("decode", {"train"}, elsewhere=True) == {}


@pytest.mark.ray
def test_a_machine_without_labels_has_no_pools(ray_cluster: None) -> None:
    assert (find_pools(), can_grow()) == (frozenset(), False)
    assert (in_pool("decode"), pool_selector("train")) == ({}, None)
    assert pool_resources("train") == {"CPU": 4.0, "GPU": 0.0}
    assert fit_resources(ClusterConfig(num_workers=2)).cpus_per_worker == 1.0


def test_a_node_sees_what_the_driver_wrote_and_says_what_it_does_not_see(tmp_path: Path) -> None:
    shared, apart = str(tmp_path / "shared"), str(tmp_path / "apart")
    write_mark(shared, TOKEN, DRIVER)
    assert check_from_node(Places((shared,), (str(tmp_path),)), TOKEN, "node") == []
    assert (tmp_path / "shared" / mark_name(TOKEN, "node")).exists()
    faults = check_from_node(Places((shared, apart), (str(tmp_path / "data.json"),)), TOKEN, "node")
    assert faults == [
        f"{apart!r}: a file that another node wrote there is not visible",
        f"{str(tmp_path / 'data.json')!r}: does not exist",
    ]


def test_places_leave_out_what_is_no_file_here(tmp_path: Path) -> None:
    here = tmp_path / "model"
    here.mkdir()
    places = Places.of([str(tmp_path), "s3://bucket/runs/"], [str(here), "lmsys/vicuna-7b-v1.5", None, "s3://bucket/x"])
    assert places == Places((str(tmp_path), "s3://bucket/runs"), (str(here), "s3://bucket/x"))
