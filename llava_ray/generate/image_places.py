"""Images in a prompt, and their places in it."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float32
from torch import Tensor

from llava_ray.chat.conversation import IMAGE_TOKEN_INDEX
from llava_ray.images.anyres import Size
from llava_ray.model.network.llava import Llava
from llava_ray.model.network.tower import VisionTower


@dataclass
class PromptImage:
    """An image in a prompt: preprocessed views until its embeddings are computed."""

    key: str
    """Identifies its content, its tower and its projector."""
    num_tokens: int
    llava: Llava
    """The model with that projector."""
    tower: VisionTower
    size: Size = (0, 0)
    views: Float32[Tensor, "n 3 h w"] | None = None
    embeddings: Tensor | None = None
    first: int = 0
    """Position of its first token in the prompt."""


def place_prompt_images(ids: Sequence[int], images: Sequence[PromptImage]) -> None:
    """Set the position of each image's first token in a prompt."""
    place = 0
    for image in images:
        place = ids.index(IMAGE_TOKEN_INDEX, place)
        image.first = place
        place += image.num_tokens
