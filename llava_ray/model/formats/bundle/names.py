"""Conversion of tensor names in a bundle's projector file to canonical names."""

from llava_ray.model.formats.layout import EMBED_TOKENS
from llava_ray.model.formats.names import IMAGE_NEWLINE


def from_bundle(own: str) -> str:
    """Return the canonical name of a tensor in a bundle's projector file."""
    if own == EMBED_TOKENS:
        return f"language_model.model.{EMBED_TOKENS}"
    return own if own == IMAGE_NEWLINE else f"projector.{own}"
