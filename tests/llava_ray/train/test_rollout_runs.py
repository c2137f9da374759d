"""Runs that learn from their own answers: rewards rise, killed processes are replaced, and what is wrong is named."""

import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from commands import descendants, members
from samples import small_run, write_recipe, write_samples
from test_kill_storm import WORKER, read_log, started, wait_until
from test_training import held_out, run
from watched_runs import committed, ledger

from llava_ray.errors import TrainingError
from llava_ray.model.loading import load_pretrained_model
from llava_ray.train.step_file import read_rows

pytestmark = pytest.mark.ray

LONG = pytest.mark.verify  # runs of their own: `make test` has one of a kind
SAMPLER, COORDINATOR = "ray::RolloutActor", "ray::RolloutCoordinator"
GRPO = {
    "train__objective": "grpo",
    "train__lr_scheduler_type": "constant",
    "train__weight_decay": 0.0,
    "train__num_train_epochs": 2,
    "data__on_too_long": "reject",
    "grpo__rewards": ("format:.*e.*",),
    "grpo__group_size": 4,
    "grpo__max_new_tokens": 4,
}


def dotted(**changes: Any) -> dict[str, Any]:
    """Return settings by their dotted keys."""
    return {key.replace("__", "."): value for key, value in changes.items()}


def find_samplers() -> list[int]:
    """Return the processes of this test's cluster that sample answers."""
    return [number for number, title in descendants(os.getpid()).items() if title.startswith(SAMPLER)]


def kill_a_sampler(folder: Path, killed: list[int]) -> None:
    """Kill the actor that samples answers once the run has committed its first steps."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        if list(folder.glob("step-*")) and (victims := find_samplers()):
            os.kill(victims[0], signal.SIGKILL)
            killed.append(victims[0])
            return
        time.sleep(0.05)


@pytest.mark.timeout(300)
def test_a_run_learns_from_its_rewards_though_a_sampler_is_killed(ray_cluster: None, tmp_path: Path) -> None:
    write_samples(tmp_path / "held_out", 24, seed=5)
    killed: list[int] = []
    thread = threading.Thread(target=kill_a_sampler, args=(tmp_path / "runs/rewarded", killed))
    thread.start()
    finished = run(tmp_path, "rewarded", **held_out(tmp_path) | GRPO | {"train__max_steps": 12})
    thread.join()
    assert killed
    metrics = list(read_rows(f"{finished.folder.path}/metrics.jsonl"))
    rewards = [row["reward"] for row in metrics]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.3
    assert all(row["rollout_staleness"] == 0 and row["policy_gap"] < 1e-4 for row in metrics)
    # Nothing is trained in a step whose answers all had the rewards of their groups.
    assert all(abs(row["ratio"] - (row["no_spread_share"] < 1)) < 1e-4 and row["grad_norm"] >= 0 for row in metrics)
    assert all({"held_out_loss", "held_out_accuracy"} <= row.keys() for row in metrics if row["step"] % 3 == 2)
    # Each question once an epoch, whatever its number of answers.
    steps = list(read_rows(f"{finished.folder.path}/ledger.jsonl"))
    assert Counter(name for row in steps[:8] for name in row["samples"]) == Counter(f"s{i:04d}" for i in range(64))
    assert load_pretrained_model(finished.folder.bundle).manifest.training["steps"] == 12


@LONG
@pytest.mark.timeout(300)
def test_a_reward_that_fails_ends_the_run_at_once_with_its_name(ray_cluster: None, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"reward 'math:fsum' failed for the answers to 's00.*TypeError"):
        run(tmp_path, "failing", **GRPO | {"grpo__rewards": ("math:fsum",), "train__max_steps": 2})


@LONG
@pytest.mark.timeout(600)
def test_equal_rewards_teach_nothing_and_the_user_is_told(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat = GRPO | {"grpo__rewards": ("format:.*",), "train__max_steps": 12, "grpo__max_new_tokens": 2}
    finished = run(tmp_path, "flat", **flat)
    metrics = list(read_rows(f"{finished.folder.path}/metrics.jsonl"))
    assert {row["loss"] for row in metrics} == {0.0}
    assert {row["grad_norm"] for row in metrics} == {0.0}
    assert {row["no_spread_share"] for row in metrics} == {1.0}
    assert (
        "In 10 steps in a row all answers to a question had the same reward (the last mean: 1)"
        in capsys.readouterr().out
    )


@LONG
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "changes",
    [
        {"train__zero_stage": 0, "grpo__beta": 0.1, "grpo__temperature": 0.8, "grpo__loss_type": "grpo"},
        {"train__zero_stage": 3, "grpo__loss_type": "dr_grpo", "grpo__scale_rewards": "none"},
        {"lora__lora_enable": True, "lora__lora_r": 4, "grpo__beta": 0.1},
        {"model__unfreeze_mm_vision_tower": True, "data__image_aspect_ratio": "pad"},
        {"data__vision_features": "cached", "grpo__num_rollout_actors": 2, "grpo__rollout_batch_size": 8},
        {"grpo__max_staleness": 2},
        {"train__bf16": True, "train__gradient_checkpointing": True},
    ],
    ids=["zero0_kl", "zero3", "lora_kl", "tower", "cached_two_actors", "stale", "bf16"],
)
def test_rewards_rise_under_every_kind_of_setting(ray_cluster: None, tmp_path: Path, changes: dict[str, Any]) -> None:
    finished = run(tmp_path, "varied", **GRPO | {"train__max_steps": 16} | changes)
    metrics = list(read_rows(f"{finished.folder.path}/metrics.jsonl"))
    rewards = [row["reward"] for row in metrics]
    assert sum(rewards[-4:]) > sum(rewards[:4]) + 0.3
    stale = [row["rollout_staleness"] for row in metrics]
    assert stale == [min(step, changes.get("grpo__max_staleness", 0)) for step in range(16)]
    if "grpo__beta" in changes:
        assert metrics[0]["kl"] == pytest.approx(0, abs=1e-5)
        assert metrics[-1]["kl"] > 1e-4
    if not changes.get("train__bf16") and not stale[-1]:
        assert all(row["policy_gap"] < 1e-4 for row in metrics)


@LONG
@pytest.mark.timeout(1500)
def test_kills_of_anything_leave_the_ledger_and_the_losses_of_a_run_that_was_never_disturbed(tmp_path: Path) -> None:
    settings = dotted(**GRPO | {"train__max_steps": 18, "train__num_train_epochs": 3, "run__max_failures": 5})
    recipe = write_recipe(tmp_path, small_run(tmp_path, **settings | {"tracking.log_model": False}))
    with started(recipe, "calm") as process:
        assert process.wait(timeout=400) == 0
    with started(recipe, "storm") as process:
        for number, title in enumerate((SAMPLER, WORKER)):
            wait_until(process, lambda least=3 * number + 3: committed(recipe, "storm") >= least, recipe, "storm")
            victims = [number for number, name in members(process.pid).items() if name.startswith(title)]
            os.kill(victims[0], signal.SIGKILL)
        wait_until(process, lambda: committed(recipe, "storm") >= 9, recipe, "storm")
        process.kill()  # the driver; `started` ends what outlives it
    with started(recipe, "storm") as process:
        wait_until(process, lambda: committed(recipe, "storm") >= 12, recipe, "storm")
        [coordinator] = [number for number, name in members(process.pid).items() if name.startswith(COORDINATOR)]
        os.kill(coordinator, signal.SIGKILL)
        assert process.wait(timeout=100) == 1
    assert "RolloutCoordinator) died" in read_log(recipe, "storm")
    with started(recipe, "storm") as process:
        assert process.wait(timeout=400) == 0
    assert ledger(recipe, "storm") == ledger(recipe, "calm")
    files = [str(tmp_path / f"runs/{name}/metrics.jsonl") for name in ("calm", "storm")]
    calm, storm = ([(row["loss"], row["reward"]) for row in read_rows(file)] for file in files)
    assert len(calm) == 18
    assert calm == storm
