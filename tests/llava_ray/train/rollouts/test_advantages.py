"""Advantages and weights against their published formulas, and steps without anything to learn."""

import numpy as np
import pytest

from llava_ray.config.grpo import GrpoConfig
from llava_ray.generate.group_sampling import SampledAnswer
from llava_ray.train.rollouts.advantages import compute_advantages, find_spread, weigh_answers
from llava_ray.train.rollouts.answered import AskedQuestion, RolloutGroup
from llava_ray.train.rollouts.step_metrics import measure_rollouts


def test_advantages_are_rewards_less_their_groups_mean_over_its_deviation() -> None:
    rewards = np.array([[1.0, 0, 0, 1], [0.5, 0.5, 0.5, 0.5], [0, 0, 0, 2]])
    scaled, plain = (compute_advantages(rewards, scale) for scale in ("group", "none"))
    assert plain.tolist() == [[0.5, -0.5, -0.5, 0.5], [0, 0, 0, 0], [-0.5, -0.5, -0.5, 1.5]]
    assert scaled[0] == pytest.approx(np.array([1, -1, -1, 1]) * 0.5 / (np.sqrt(1 / 3) + 1e-4))
    assert scaled[2] == pytest.approx(np.array([-0.5, -0.5, -0.5, 1.5]) / (1 + 1e-4))
    assert not scaled[1].any()


def test_equal_rewards_whose_mean_is_rounded_have_no_advantage() -> None:
    rewards = np.full((2, 3), 0.1) * np.array([[1], [3]])
    assert (rewards[0] - rewards[0].mean()).any(), "rounding would be taken for a spread, and scaled up"
    assert not compute_advantages(rewards, "group").any()
    assert not find_spread(rewards).any()


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_weights_make_a_mean_over_tokens_the_published_one(loss_type: str) -> None:
    lengths, draw = np.array([1, 4, 7]), np.random.default_rng(0)
    losses = [draw.random(length) for length in lengths]
    grpo = GrpoConfig(loss_type=loss_type, max_new_tokens=9)
    weights = weigh_answers(lengths, grpo)
    ours = sum(weight * some.sum() for weight, some in zip(weights, losses, strict=True)) / lengths.sum()
    expected = {
        "grpo": np.mean([some.mean() for some in losses]),
        "dapo": np.concatenate(losses).mean(),
        "dr_grpo": np.concatenate(losses).sum() / (3 * 9),
    }
    assert ours == pytest.approx(expected[loss_type])


def test_the_metrics_of_a_step() -> None:
    asked = AskedQuestion("q", "?", [1], None, [], "yes")
    answers = [SampledAnswer([3, 4], [-1.0, -2.0], ended=True), SampledAnswer([5], [-1.0], ended=False)]
    values = np.array([[[1.0, 0], [0, 0]], [[1, 1], [1, 1]]])
    groups = [RolloutGroup(asked, answers, ["a", "b"], some) for some in values]
    metrics = measure_rollouts(groups, values, values.sum(2), ["exact", "format:^a+$"])
    assert metrics["reward"] == 1.25
    assert metrics["no_spread_share"] == metrics["unfinished_share"] == 0.5
    assert metrics["answer_tokens"] == 1.5
    assert (metrics["reward_0_exact"], metrics["reward_1_format_a_"]) == (0.75, 0.5)
