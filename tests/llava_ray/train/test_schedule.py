"""The learning rate's schedule: transformers' own formulas, and an import that stays light."""

import math

import pytest
import torch
from commands import imported
from transformers import get_scheduler, get_wsd_schedule

from llava_ray.config.train import TrainConfig
from llava_ray.train.schedule import schedule

LIKE = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}  # transformers' names


def rates(scheduled, optimizer, num_steps):
    """Return the learning rate of each step."""
    found = []
    for _ in range(num_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduled.step()
    return found


def adam():
    """Return an optimizer of one number."""
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=2e-5)


@pytest.mark.parametrize("shape", LIKE)
@pytest.mark.parametrize(("num_steps", "warmup"), [(1, 0.03), (7, 0.0), (100, 0.03), (10, 1.0)])
def test_rates_are_those_of_transformers(shape, num_steps, warmup):
    train = TrainConfig(lr_scheduler_type=shape, warmup_ratio=warmup, learning_rate=2e-5)
    ours, theirs = adam(), adam()
    expected = get_scheduler(LIKE[shape], theirs, math.ceil(warmup * num_steps), num_steps)
    assert rates(schedule(ours, train, num_steps), ours, num_steps) == pytest.approx(
        rates(expected, theirs, num_steps), abs=1e-20
    )


def test_a_stable_rate_falls_over_the_last_three_tenths():
    train = TrainConfig(lr_scheduler_type="warmup_stable_decay", warmup_ratio=0.05, learning_rate=2e-5)
    ours, theirs = adam(), adam()
    expected = get_wsd_schedule(theirs, 10, 57, num_training_steps=200, decay_type="linear")
    assert rates(schedule(ours, train, 200), ours, 200) == pytest.approx(rates(expected, theirs, 200), abs=1e-20)


@pytest.mark.slow
def test_a_worker_without_an_adapter_imports_neither_peft_nor_bitsandbytes():
    assert not {"peft", "bitsandbytes"} & imported("llava_ray.train.loop")
