"""Images of prompts as input of the language model: which ones a step needs, and which part of each."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from llava_ray.generate.builtin.batching import ImageSpan
from llava_ray.generate.prompts import PromptImage
from llava_ray.model.network.llava import Llava
from llava_ray.model.network.quantization import find_dtype
from llava_ray.model.network.tower import VisionTower


def find_overlapping(images: Sequence[PromptImage], start: int, end: int) -> list[PromptImage]:
    """Return the images that have tokens in a range of a prompt."""
    return [image for image in images if image.first < end and image.first + image.num_tokens > start]


def visible_part(image: PromptImage, start: int, end: int) -> ImageSpan:
    """Return the part of an image that lies in a range of a prompt."""
    assert image.embeddings is not None
    first, last = max(start, image.first), min(end, image.first + image.num_tokens)
    return ImageSpan(first - start, last - start, image.embeddings[first - image.first : last - image.first])


def embed_images(tower: VisionTower, images: Sequence[PromptImage]) -> list[Tensor]:
    """Compute the embeddings of images, with one pass of the tower over all of them."""
    views = [image.views for image in images if image.views is not None]
    features = tower.extract(torch.cat(views)).split([len(some) for some in views])
    embedded: dict[int, Tensor] = {}
    for llava in dict.fromkeys(image.llava for image in images):
        mine = [place for place, image in enumerate(images) if image.llava is llava]
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
