"""Settings of GRPO that cannot work are refused with the remedy."""

from typing import Any

import pytest

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.errors import ConfigError
from llava_ray.objectives.cross_entropy import CrossEntropy
from llava_ray.objectives.grpo import Grpo
from llava_ray.objectives.table import build_held_out_objective, build_objective


def settings(**changes: Any) -> FinetuneConfig:
    given = {
        "model": {"model_name_or_path": "a", "vision_tower": "b"},
        "data": {"data_path": "c", "on_too_long": "reject"},
        "train": {"objective": "grpo"},
    }
    return FinetuneConfig.parsed(given).replaced({key.replace("__", "."): value for key, value in changes.items()})


def test_the_objective_has_the_sections_settings() -> None:
    assert build_objective(settings()) == Grpo(0.2, 0.2, 0.0, 1.0)
    changed = {"grpo__epsilon": 0.1, "grpo__epsilon_high": 0.28, "grpo__beta": 0.04, "grpo__temperature": 0.8}
    assert build_objective(settings(**changed)) == Grpo(0.1, 0.28, 0.04, 0.8)
    assert isinstance(build_held_out_objective(settings()), CrossEntropy)
    assert isinstance(build_objective(settings(train__objective="cross_entropy")), CrossEntropy)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"grpo__group_size": 1}, "'grpo.group_size' = 1: .*compared with the others.*give 2 or more"),
        ({"grpo__rewards": ()}, "rewards is empty"),
        ({"grpo__rewards": ("exact", "exact")}, "names one twice"),
        ({"grpo__reward_weights": (1.0, 2.0)}, "2 numbers for 1 rewards"),
        ({"grpo__reward_weights": (0.0,)}, "are all 0"),
        ({"grpo__temperature": 0.0}, "'grpo.temperature' = 0.0"),
        ({"grpo__reward_weights": (float("nan"),)}, "grpo.reward_weights"),
        ({"data__on_too_long": "truncate"}, 'question that was cut.*set "reject"'),
        ({"data__vision_features": "streamed"}, 'set "inline" or "cached"'),
        ({"grpo__max_new_tokens": 2048}, "leaves no room for a question"),
        ({"train__objective": "cross_entropy", "grpo__beta": 0.1}, "has no effect without train.objective"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        settings(**changes)
