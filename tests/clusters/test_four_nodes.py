"""Pools on a cluster of four nodes: what runs where, what is refused, and a node that goes away during a run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.verify, pytest.mark.ray, pytest.mark.timeout(900)]

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the program prints."""
    folder = tmp_path_factory.mktemp("four")
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run(
        [sys.executable, str(TESTS / "four_nodes.py"), str(folder)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found, indent=1))
    return found


def test_each_kind_of_work_lands_in_its_pool(told: dict[str, Any]) -> None:
    placements = told["placements"]
    assert placements["train"] == {"train": 2}
    assert set(placements["vision"]) == {"vision"}
    assert set(placements["decode"]) == {"decode"}
    assert placements["decode"]["decode"] > 10


def test_gpus_are_taken_from_the_pool_that_they_are_meant_for(told: dict[str, Any]) -> None:
    assert told["gpus"] == {"train": [["train", 1], ["train", 1]], "vision": ["vision", 1]}


def test_a_run_goes_on_without_a_node_that_went_away(told: dict[str, Any]) -> None:
    assert told["nodes_left"] == 3
    assert 0 < told["removed_after_step"] < told["steps"]
    assert told["same_ledger"]
    assert told["after_removal"]
    assert "decode" not in told["after_removal"]


def test_what_does_not_fit_or_is_not_shared_is_refused_in_words(told: dict[str, Any]) -> None:
    too_many, apart, missing = told["refusals"]
    assert "3 workers want a GPU each, the pool 'train' has 2" in too_many
    assert apart.count("memory://runs") == 4
    assert "(pool vision)" in apart
    assert "s3://bucket/runs" in apart
    assert missing.count("'/not/there': is not there") == 4
