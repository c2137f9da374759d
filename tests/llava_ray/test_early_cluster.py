"""A cluster that another process starts early: joined where it is what was asked for, and ended with its command."""

import json
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import ray

from llava_ray import early_cluster
from llava_ray.early_cluster import end_early, join_early, start_early
from llava_ray.local_ray import NO_DASHBOARD_VARIABLE

Own = Callable[[int, int, bool, int, int], NoReturn]


def owning(says: bytes) -> Own:
    """Return what the forked process does in place of starting Ray: say something, and end when it may."""

    def own(num_cpus: int, port: int, dashboard: bool, saying: int, holding: int) -> NoReturn:
        try:
            os.write(saying, says)
            os.close(saying)
            if says:
                os.read(holding, 1)
        finally:
            os._exit(0)

    return own


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What ``ray.init`` was called with."""
    monkeypatch.setenv(NO_DASHBOARD_VARIABLE, "")
    monkeypatch.setattr(early_cluster, "forks_prepared", lambda: True)
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "init", lambda **options: calls.append(options))
    yield calls
    end_early()


def started(monkeypatch: pytest.MonkeyPatch, says: bytes) -> int:
    """Start a cluster early and return the id of the process that owns it."""
    monkeypatch.setattr(early_cluster, "_own_cluster", owning(says))
    start_early(4, dashboard_port=1, dashboard=False)
    assert early_cluster._owner is not None
    return early_cluster._owner.pid


def has_ended(pid: int) -> bool:
    """Return whether a process is gone and waited for."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


WHERE = json.dumps({"address": "127.0.0.1:7", "auth": None}).encode() + b"\n"


def test_it_is_joined_and_ends_when_the_command_says_so(monkeypatch, joined):
    pid = started(monkeypatch, WHERE)
    assert join_early(4, dashboard=False, log_to_driver=False)
    assert joined == [{"address": "127.0.0.1:7", "log_to_driver": False}]
    assert os.environ[NO_DASHBOARD_VARIABLE] == "1"
    assert not has_ended(pid)
    end_early()
    assert has_ended(pid)
    assert not join_early(4, dashboard=False)


def test_it_is_started_once(monkeypatch, joined):
    pid = started(monkeypatch, WHERE)
    start_early(4, dashboard_port=1, dashboard=False)
    assert early_cluster._owner.pid == pid


@pytest.mark.parametrize(("num_cpus", "dashboard"), [(8, False), (4, True)])
def test_one_that_is_not_what_is_asked_for_is_ended(monkeypatch, joined, num_cpus, dashboard):
    pid = started(monkeypatch, WHERE)
    assert not join_early(num_cpus, dashboard=dashboard)
    assert has_ended(pid)
    assert joined == []


def test_one_that_could_not_be_started_is_left_to_the_command(monkeypatch, joined):
    pid = started(monkeypatch, b"")
    assert not join_early(4, dashboard=False)
    assert has_ended(pid)
    assert joined == []


def test_a_process_that_cannot_fork_workers_starts_none(monkeypatch, joined):
    monkeypatch.setattr(early_cluster, "forks_prepared", lambda: False)
    start_early(4, dashboard_port=1, dashboard=False)
    assert early_cluster._owner is None
    assert not join_early(4, dashboard=False)


def test_its_tokens_are_known_to_the_command(monkeypatch, joined):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    initialized: list[str] = []
    monkeypatch.setattr(ray._raylet, "Config", SimpleNamespace(initialize=initialized.append))
    started(monkeypatch, json.dumps({"address": "a", "auth": "token"}).encode() + b"\n")
    assert join_early(4, dashboard=False)
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert initialized == [""]
