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


def outcome(kind: str, folder: Path) -> dict[str, Any]:
    """What the program prints."""
    done = subprocess.run(
        [sys.executable, str(TESTS / "four_nodes.py"), kind, str(folder)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found, indent=1))
    return found


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A cluster that stays as it is."""
    return outcome("fixed", tmp_path_factory.mktemp("fixed"))


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A cluster that makes nodes when they are wanted."""
    return outcome("growing", tmp_path_factory.mktemp("growing"))


def test_each_kind_of_work_lands_in_its_pool(fixed: dict[str, Any]) -> None:
    placements = fixed["undisturbed"]["placements"]
    assert set(placements["decode"]) == {"decode"}
    assert placements["decode"]["decode"] > 10
    assert set(placements["vision"]) == {"vision"}
    assert set(placements["train"]) == {"train"}


def test_gpus_are_taken_from_the_pool_that_they_are_meant_for(fixed: dict[str, Any]) -> None:
    assert fixed["gpus"] == {"train": [["train", 1], ["train", 1]], "vision": ["vision", 1]}


def test_a_run_goes_on_without_a_node_that_went_away(fixed: dict[str, Any]) -> None:
    undisturbed, disturbed = fixed["undisturbed"], fixed["disturbed"]
    assert (undisturbed["nodes"], disturbed["nodes"]) == (4, 3)
    assert 0 < disturbed["removed_after_step"] < disturbed["steps"]
    assert disturbed["ledger"] == undisturbed["ledger"]
    assert sum(disturbed["placements"]["decode"].values()) > 0
    assert "decode" not in disturbed["placements"]["decode"]


def test_what_does_not_fit_or_is_not_shared_is_refused_in_words(fixed: dict[str, Any]) -> None:
    too_many, apart, missing = fixed["refusals"]
    assert "3 workers want 1 GPU each, the pool 'train' has 2" in too_many
    assert apart.count("memory://runs") >= 4
    assert "(pool vision)" in apart
    assert "s3://bucket/runs" in apart
    assert missing.count("'/not/there': is not there") == 4


def test_a_run_goes_on_with_the_node_that_comes_for_one_that_went_away(
    fixed: dict[str, Any], growing: dict[str, Any]
) -> None:
    disturbed = growing["disturbed"]
    assert growing["waits_for"] == 64
    assert 0 < disturbed["removed_after_step"] < disturbed["steps"]
    assert disturbed["ledger"] == fixed["undisturbed"]["ledger"]
    assert disturbed["nodes"] == 4
    assert {kind: set(pools) for kind, pools in disturbed["placements"].items()} == {
        "decode": {"decode"},
        "vision": {"vision"},
        "train": {"train"},
    }
