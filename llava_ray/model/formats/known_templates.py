"""Conversation templates that published checkpoints were trained with and do not name themselves. No torch."""

from collections.abc import Mapping
from typing import Any

from llava_ray.model.formats.hub.settings import is_hub
from llava_ray.model.formats.noted_settings import find_noted

# (layout's model type, language model's type, size of its own vocabulary) -> template it was trained with.
# The original's first generation (no mm_projector_type in its config) came with too many templates to be listed.
_KNOWN_TEMPLATES = {
    ("original", "llama", 32000): "v1",  # LLaVA-1.5, 1.6-Vicuna
    ("original", "llama", 64000): "chatml_direct",  # 1.6-34B, on Hermes-Yi
    ("original", "mistral", 32000): "mistral_instruct",  # 1.6-Mistral
    ("llava", "llama", 32000): "v1",
    ("llava_next", "llama", 32000): "v1",
    ("llava_next", "llama", 64000): "chatml_direct",
    ("llava_next", "mistral", 32000): "mistral_instruct",
}


def find_noted_version(config: Mapping[str, Any], language_config: Mapping[str, Any]) -> str | None:
    """Return the template that a published checkpoint says or is known to be trained with; None if neither."""
    noted = find_noted(config, "config.json")
    if version := noted.get("version") or noted.get("manifest", {}).get("version"):
        return str(version)
    hub = is_hub(config)
    if not hub and "mm_projector_type" not in config:
        return None
    # The converter to the hub's layout put <image> right behind the language model's own tokens.
    vocabulary = config.get("image_token_index") if hub else language_config.get("vocab_size")
    family = config["model_type"] if hub else "original"
    return _KNOWN_TEMPLATES.get((family, str(language_config.get("model_type")), vocabulary or 0))
