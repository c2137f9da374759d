"""Images of prompts as input of the language model: which ones a step needs, and which part of each."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from llava_ray.generate.builtin.batching import ImageSpan
from llava_ray.generate.image_places import PromptImage
from llava_ray.model.network.llava import Llava
from llava_ray.model.network.quantization import find_dtype


def find_overlapping(images: Sequence[PromptImage], start: int, end: int) -> list[PromptImage]:
    """Return the images that have tokens in a range of a prompt."""
    return [image for image in images if image.first < end and image.first + image.num_tokens > start]


def visible_part(image: PromptImage, start: int, end: int) -> ImageSpan:
    """Return the part of an image that lies in a range of a prompt."""
    assert image.embeddings is not None
    first, last = max(start, image.first), min(end, image.first + image.num_tokens)
    return ImageSpan(first - start, last - start, image.embeddings[first - image.first : last - image.first])


def embed_images(images: Sequence[PromptImage]) -> list[Tensor]:
    """Compute the embeddings of images, with one pass of each tower over all of its own."""
    embedded: dict[int, Tensor] = {}
    for tower in dict.fromkeys(image.tower for image in images):
        of_tower = [place for place, image in enumerate(images) if image.tower is tower]
        views = [found for place in of_tower if (found := images[place].views) is not None]
        features = dict(
            zip(of_tower, tower.extract(torch.cat(views)).split([len(some) for some in views]), strict=True)
        )
        for llava in dict.fromkeys(images[place].llava for place in of_tower):
            mine = [place for place in of_tower if images[place].llava is llava]
            parts = _project_images(
                llava, torch.cat([features[place] for place in mine]), [images[place] for place in mine]
            )
            embedded |= zip(mine, parts, strict=True)
    return [embedded[place] for place in range(len(images))]


def _project_images(llava: Llava, features: Float[Tensor, "n p v"], images: Sequence[PromptImage]) -> list[Tensor]:
    """Compute the embeddings of images of one projector from the ``features`` of all their views."""
    device, dtype = llava.language_model.device, find_dtype(llava.language_model)
    order = llava.arrange(features.shape[0] * features.shape[1], [image.size for image in images])
    projected = llava.project(features.to(device, dtype), order).to(dtype)
    # Copies: a cached slice would keep the memory of all images of the batch.
    return [part.clone() for part in projected.split([image.num_tokens for image in images])]
