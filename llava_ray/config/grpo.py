"""Settings of group-relative policy optimisation, and what the other sections must be for it."""

from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from llava_ray.config.data import DataConfig
from llava_ray.config.schema import ConfigSection
from llava_ray.config.train import TrainConfig

GRPO = "grpo"
_FEWEST = 2  # answers that have a spread


class GrpoConfig(ConfigSection):
    """Group-relative policy optimisation (train.objective = "grpo"): the model learns from rewards of its own answers.

    Each record is asked up to its last supervised answer, which is the truth that rewards compare with.
    """

    group_size: PositiveInt = 8
    """Answers sampled to each question, at least 2: an answer's advantage is its reward compared with its group's.
    train.global_batch_size counts questions."""
    rewards: tuple[str, ...] = ("exact",)
    """What answers are rewarded for: exact, words, vqa, number, anls, letter, yes_no or contains (each compares with
    the record's answer), the name of a benchmark for its scorer, "format:PATTERN" for a regular expression that the
    answer must match as a whole, or "module:function" for one of your own."""
    reward_weights: tuple[float, ...] = ()
    """Weight of each reward in their sum; default: 1 each."""
    temperature: Annotated[float, Field(ge=0.05, le=10)] = 1.0
    """Temperature of the sampled answers, and of the probabilities that are trained."""
    max_new_tokens: PositiveInt = 64
    """Most tokens of an answer."""
    epsilon: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """The ratio of new to old probability of a token is clipped at 1 - epsilon."""
    epsilon_high: PositiveFloat | None = None
    """It is clipped at 1 + epsilon_high; default: epsilon. 0.28 is DAPO's."""
    beta: NonNegativeFloat = 0.0
    """Weight of the KL divergence from the model that the run starts with; 0 computes none."""
    scale_rewards: Literal["group", "none"] = "group"
    """Divide advantages by the standard deviation of their group's rewards, or not (Dr. GRPO)."""
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = "dapo"
    """The mean over the step's tokens ("dapo"), over answers of the mean over their tokens ("grpo"), or the sum over
    tokens by answers times max_new_tokens ("dr_grpo")."""
    max_staleness: NonNegativeInt = 0
    """Most optimiser steps between the weights that sample answers and those that learn from them. 0 waits for the
    newest, and a resumed run repeats the same answers; more lets both work at the same time."""
    num_rollout_actors: PositiveInt = 1
    """Actors that sample answers, each with the whole model. May be changed when a run is resumed."""
    gpus_per_rollout_actor: PositiveFloat = 1.0
    """GPUs that each of them reserves where the workers have GPUs. May be changed when a run is resumed."""
    rollout_batch_size: PositiveInt = 64
    """Answers that an actor samples together, at least those to one question."""

    @field_validator("group_size")
    @classmethod
    def groups_have_a_spread(cls, value: int) -> int:
        """Reject groups of one answer."""
        if value < _FEWEST:
            raise ValueError("an answer is compared with the others of its group; give 2 or more (8 is usual)")
        return value

    @model_validator(mode="after")
    def every_reward_has_a_weight(self) -> Self:
        """Reject rewards that are missing, named twice, or not as many as their weights."""
        if not self.rewards:
            raise ValueError('rewards is empty: name at least one, such as "exact"')
        if len(set(self.rewards)) < len(self.rewards):
            raise ValueError("rewards names one twice; give it a weight in reward_weights instead")
        if self.reward_weights and len(self.reward_weights) != len(self.rewards):
            raise ValueError(
                f"reward_weights has {len(self.reward_weights)} numbers for {len(self.rewards)} rewards; give one each"
            )
        if self.reward_weights and not any(self.reward_weights):
            raise ValueError("reward_weights are all 0: every answer would have the same reward; give others")
        return self


def check_grpo(grpo: GrpoConfig, train: TrainConfig, data: DataConfig) -> None:
    """Reject settings of other sections that do not fit rollouts, and a section that has no effect."""
    if train.objective != GRPO:
        if grpo != GrpoConfig():
            raise ValueError('the section [grpo] has no effect without train.objective = "grpo"')
        return
    if data.sources:
        raise ValueError(
            'train.objective = "grpo" with data.sources: questions are asked by one template and length rule; give '
            "data.data_path"
        )
    if data.on_too_long != "reject":
        raise ValueError(
            f'train.objective = "grpo" with data.on_too_long = {data.on_too_long!r}: a question that was cut is '
            'another question; set "reject"'
        )
    if data.vision_features == "streamed":
        raise ValueError(
            'train.objective = "grpo" with data.vision_features = "streamed": the actors that sample answers compute '
            'features themselves; set "inline" or "cached"'
        )
    if grpo.max_new_tokens >= train.model_max_length:
        raise ValueError(
            f"grpo.max_new_tokens = {grpo.max_new_tokens} leaves no room for a question in train."
            f"model_max_length = {train.model_max_length}; lower the first or raise the second"
        )
