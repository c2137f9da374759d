"""Parameter groups: who decays, whose learning rate."""

import pytest
from torch import nn

from llava_ray.config.train import TrainConfig
from llava_ray.errors import TrainingError
from llava_ray.train.groups import parameter_groups


class Two(nn.Module):
    """A projector and a language model with a norm, as small as can be."""

    def __init__(self) -> None:
        super().__init__()
        self.projector = nn.Linear(3, 4)
        self.language_model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5))


def test_matrices_decay_and_the_projector_has_its_own_rate():
    groups = parameter_groups(Two(), TrainConfig(learning_rate=1e-3, mm_projector_lr=1e-5, weight_decay=0.1))
    found = {g["name"]: (g["lr"], g["weight_decay"], len(g["params"])) for g in groups}
    assert found == {
        "projector.decay": (1e-5, 0.1, 1),
        "projector.no_decay": (1e-5, 0.0, 1),
        "language_model.decay": (1e-3, 0.1, 1),
        "language_model.no_decay": (1e-3, 0.0, 3),
    }


def test_without_a_rate_of_its_own_the_projector_takes_the_common_one():
    assert {g["lr"] for g in parameter_groups(Two(), TrainConfig(learning_rate=1e-3))} == {1e-3}


def test_frozen_parameters_are_in_no_group():
    model = Two()
    model.language_model.requires_grad_(False)
    assert [g["name"] for g in parameter_groups(model, TrainConfig())] == ["projector.decay", "projector.no_decay"]


def test_nothing_to_learn_is_an_error():
    with pytest.raises(TrainingError, match="nothing is trainable"):
        parameter_groups(Two().requires_grad_(False), TrainConfig())
