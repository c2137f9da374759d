"""What an actor returns of a question: its prompt and images, the sampled answers, and their rewards."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from llava_ray.chat.conversation import Turn, split_system
from llava_ray.generate.group_sampling import SampledAnswer
from llava_ray.images.anyres import Size


@dataclass(frozen=True)
class AskedQuestion:
    """One question of a step, and its record's answer; images as pixels (uint8) or features, one entry a view."""

    id: str
    text: str
    prompt: list[int]
    """Image positions hold -200, as many as the image has features."""
    images: Tensor | None
    sizes: list[Size]
    truth: str


@dataclass(frozen=True)
class RolloutGroup:
    """The sampled answers to one question, and their rewards."""

    asked: AskedQuestion
    answers: list[SampledAnswer]
    texts: list[str]
    rewards: Float[np.ndarray, "g k"]
    """Each reward of each answer."""
    reference: list[list[float]] | None = None
    """The log-probability of each token under the weights that the run started with."""


def final_question(turns: Sequence[Turn]) -> tuple[str | None, Sequence[Turn], Turn] | None:
    """Return what ``chat.conversation.first_question`` does, of the last supervised answer."""
    system, spoken = split_system(turns)
    places = [place for place, turn in enumerate(spoken) if turn.role == "gpt" and turn.supervised and not turn.calls]
    return (system, spoken[: places[-1]], spoken[places[-1]]) if places else None
