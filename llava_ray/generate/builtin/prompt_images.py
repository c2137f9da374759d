"""The images of prompts on their way into the language model: which are looked at, and what of them a step reads."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from llava_ray.generate.builtin.batching import Placed
from llava_ray.generate.prompts import PromptImage
from llava_ray.model.network.llava import Llava
from llava_ray.model.network.quantization import find_dtype
from llava_ray.model.network.tower import VisionTower


def overlapping(images: Sequence[PromptImage], start: int, end: int) -> list[PromptImage]:
    """Return the images that have tokens in that part of a prompt."""
    return [image for image in images if image.first < end and image.first + image.num_tokens > start]


def visible_part(image: PromptImage, start: int, end: int) -> Placed:
    """Return what of an image stands in that part of a prompt."""
    assert image.embeddings is not None
    first, last = max(start, image.first), min(end, image.first + image.num_tokens)
    return Placed(first - start, last - start, image.embeddings[first - image.first : last - image.first])


def embed_images(tower: VisionTower, images: Sequence[PromptImage]) -> list[Tensor]:
    """Return the images as the language model reads them, all seen by the tower together."""
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
    """Return images that are seen through one projector; ``features`` are those of all their views."""
    device, dtype = llava.language_model.device, find_dtype(llava.language_model)
    order = llava.arrange(features.shape[0] * features.shape[1], [image.size for image in images])
    projected = llava.project(features.to(device, dtype), order).to(dtype)
    # Copies, so that keeping one of them does not keep them all.
    return [part.clone() for part in projected.split([image.num_tokens for image in images])]
