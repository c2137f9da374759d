"""Pooled features, which requests may ask for instead of an answer: normalised vectors of texts and of images."""

import torch
from jaxtyping import Float
from torch import Tensor

from llava_ray.errors import ModelError
from llava_ray.generate.builtin.prompt_images import embed_images
from llava_ray.generate.engine import GenerationChunk
from llava_ray.generate.prompts import PromptImage
from llava_ray.generate.readings import PromptReading
from llava_ray.generate.sampling import not_finite_error
from llava_ray.generate.vision_cache import VisionCache


def pool_image(image: PromptImage, of_tower: bool, cache: VisionCache) -> Float[Tensor, " d"]:
    """Return the mean of an image's features: of the tower's patches, or of the language model's input."""
    if of_tower:
        assert image.views is not None
        return image.tower.extract(image.views).flatten(0, 1).float().mean(0)
    if image.embeddings is None:
        [image.embeddings] = embed_images([image])
        cache.keep(image.key, image.embeddings)
    return image.embeddings.float().mean(0)


def as_vector_chunk(
    vector: Float[Tensor, " d"] | None, num_tokens: int, *, queued_s: float = 0.0, num_cached_tokens: int = 0
) -> GenerationChunk:
    """Return the only chunk of a request for features: the vector of length 1. Raises ModelError if it is not finite.

    ``num_tokens`` are those that the model has read.
    """
    if vector is None:
        raise ModelError("this language model has no states before its head. Ask for the features of images.")
    wide = vector.float()
    unit = torch.nn.functional.normalize(wide, dim=0)
    if not bool(unit.isfinite().all()) or not bool(wide.isfinite().all()):
        raise not_finite_error("a vector of features")
    values = unit.cpu().numpy().astype("<f4").tobytes()
    return GenerationChunk(
        "",
        (),
        finish_reason="stop",
        num_prompt_tokens=num_tokens,
        queued_s=queued_s,
        num_cached_tokens=num_cached_tokens,
        reading=PromptReading(vector=values),
    )
