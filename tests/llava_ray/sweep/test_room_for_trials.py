"""How many trials a cluster has room for, and settings of shares of a GPU."""

from types import SimpleNamespace

import pytest

from llava_ray import runtime
from llava_ray.config.run import ClusterConfig
from llava_ray.errors import ConfigError
from llava_ray.runtime import Resources, local_cpus, local_runs, local_threads, runs_at_once, share_cores, share_node
from llava_ray.sweep.cluster_usage import Group, check_state_api, find_orphans


@pytest.mark.parametrize(
    ("total", "resources", "expected"),
    [
        ({"CPU": 5}, Resources(1, 1.0, False, None), 2),
        ({"CPU": 96, "GPU": 8}, Resources(1, 1.0, True, None), 8),
        ({"CPU": 96, "GPU": 8}, Resources(4, 1.0, True, None), 2),
        ({"CPU": 96, "GPU": 8}, Resources(1, 1.0, True, None, 0.25), 32),
        ({"CPU": 12, "GPU": 8}, Resources(1, 1.0, True, None), 6),
        ({"CPU": 1}, Resources(1, 0.5, False, None), 1),
    ],
)
def test_as_many_trials_as_fit_with_their_data_tasks(total, resources, expected):
    assert runs_at_once(total, resources) == expected


def test_a_local_cluster_has_room_for_the_trials_that_its_cores_carry(monkeypatch):
    monkeypatch.setattr(runtime, "num_cores", lambda: 8)
    cluster = ClusterConfig(num_workers=2, cpus_per_worker=1.0)
    assert local_runs(cluster) == 4
    resources = Resources(2, 1.0, False, None)
    assert runs_at_once({"CPU": local_cpus(cluster, 4)}, resources) == 4
    assert local_cpus(ClusterConfig(num_workers=2), 1) == 8


@pytest.mark.parametrize(
    ("cores", "workers", "runs", "threads"), [(2, 1, 1, 2), (2, 2, 1, 1), (8, 3, 1, 2), (8, 1, 8, 1), (2, 4, 1, 1)]
)
def test_cores_are_shared_out_to_the_workers_that_there_are(monkeypatch, cores, workers, runs, threads):
    monkeypatch.setattr(runtime, "num_cores", lambda: cores)
    shared = share_cores(Resources(workers, 1.0, False, None), runs, given=False)
    assert shared.num_threads == threads
    assert shared.cores == cores
    assert shared.bundle == {"CPU": 1.0}  # reserved is what it was: the stream of data finds its CPUs
    assert share_cores(Resources(workers, 3.5, False, None), runs, given=True).num_threads == 3
    assert local_threads(ClusterConfig(num_workers=workers)) == max(1, cores // workers)
    assert local_threads(ClusterConfig(num_workers=workers, cpus_per_worker=3.5)) == 3


@pytest.mark.parametrize(
    ("nodes", "given", "use_gpu", "threads"),
    [
        ([("here", 8.0)], False, False, 8),
        ([("here", 2.0)], False, False, 2),  # as many as the cluster was given
        ([("here", 16.0)], False, False, 8),  # of logical ones, as many as there are
        ([("here", 8.0)], True, False, 1),
        ([("here", 8.0)], False, True, 1),
        ([("there", 8.0)], False, False, 1),
        ([("here", 8.0), ("there", 8.0)], False, False, 1),
    ],
)
def test_the_only_node_of_a_joined_cluster_is_shared_out_too(monkeypatch, nodes, given, use_gpu, threads):
    monkeypatch.setattr(runtime, "num_cores", lambda: 8)
    rows = [{"NodeID": name, "Alive": True, "Labels": {}, "Resources": {"CPU": cpus}} for name, cpus in nodes]
    monkeypatch.setattr(runtime.ray, "nodes", lambda: rows)
    monkeypatch.setattr(runtime.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "here"))
    shared = share_node(Resources(1, 1.0, use_gpu, None), given=given)
    assert shared.num_threads == threads
    assert shared.bundle["CPU"] == 1.0


def test_a_quota_of_cores_counts(monkeypatch):
    monkeypatch.setattr(runtime.os, "cpu_count", lambda: 64)
    monkeypatch.setattr(runtime.os, "sched_getaffinity", lambda _: set(range(64)))
    for said, expected in (("200000 100000", 2), ("150000 100000", 2), ("max 100000", 64), ("5000 100000", 1)):
        monkeypatch.setattr(runtime.Path, "read_text", lambda self, said=said: said)
        assert runtime.num_cores() == expected


def test_what_is_reserved_for_workers_and_stands_empty_is_nobodys():
    bundle = Resources(1, 1.0, False, None).bundle
    groups = [
        Group("running", "job", [{"CPU": 1.0}]),
        Group("left", "job", [{"CPU": 1.0, "accelerator_type:A100": 0.001}]),
        Group("tune's own", "job", [{"CPU": 0.01}]),
        Group("somebody else's", "other", [{"CPU": 1.0}]),
    ]
    assert find_orphans(groups, {"running"}, "job", bundle) == ["left"]
    shared = Resources(1, 1.0, True, None, 0.25).bundle
    assert shared == {"CPU": 1.0, "GPU": 0.25}
    assert find_orphans(groups, {"running"}, "job", shared) == []


def test_what_nccl_cannot_do_is_refused():
    for values in ({"num_workers": 2, "gpus_per_worker": 0.5}, {"num_workers": 1, "gpus_per_worker": 2.0}):
        with pytest.raises(ConfigError, match="a worker drives one GPU"):
            ClusterConfig.parsed(values)


@pytest.mark.parametrize("where", [None, "http://127.0.0.1:9"])
def test_a_cluster_without_a_dashboard_is_refused(where):
    with pytest.raises(ConfigError, match="dashboard does not respond"):
        check_state_api(where)
