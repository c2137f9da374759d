"""Settings of use that a model folder states: conversation template and longest sequence."""

from llava_ray.chat.templates import CHAT_TEMPLATE, TEMPLATES
from llava_ray.errors import ModelError
from llava_ray.model.formats.layout import Layout
from llava_ray.reading import short_repr

_DEFAULT_LENGTH = 2048  # the original's, where a config says nothing


def find_version(layout: Layout, requested: str | None) -> str:
    """Return the conversation template: the requested one, the folder's, or that of its kind. Raises ModelError."""
    version = requested or layout.settings.get("version")
    if version is None:
        raise ModelError(
            f"{layout.folder} ({layout.kind}) does not say which conversation template it was trained with, and the "
            "wrong one makes it answer nonsense. Give it as version: v1 for Vicuna-based LLaVA-1.5 and 1.6, "
            f"{CHAT_TEMPLATE} for the tokenizer's own, or one of {', '.join(sorted(TEMPLATES))}."
        )
    return str(version)


def find_length(layout: Layout) -> int:
    """Return the longest sequence that a model was trained for, at most its language model's positions."""
    positions = (layout.language_config or {}).get("max_position_embeddings")
    positions = positions if type(positions) is int else None
    length = layout.settings.get("model_max_length") or _DEFAULT_LENGTH
    if type(length) is not int or length < 0:
        raise ModelError(
            f"{layout.folder}: model_max_length is {short_repr(length)}, expected a number of tokens; fix it."
        )
    return int(min(length, positions or length))
