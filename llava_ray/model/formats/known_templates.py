"""The conversation templates of published checkpoints that do not record their own. No torch."""

from collections.abc import Mapping
from typing import Any

from llava_ray.model.formats.hub.settings import is_hub
from llava_ray.model.formats.noted_settings import find_noted

# (layout's model type, language model's type, size of its own vocabulary) -> template it was trained with.
# The original's first generation (no mm_projector_type in its config) used too many templates to list.
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
    """Return the template that a published checkpoint records or is known to use; None if neither."""
    noted = find_noted(config, "config.json")
    if version := noted.get("version") or noted.get("manifest", {}).get("version"):
        return str(version)
    hub = is_hub(config)
    if not hub and "mm_projector_type" not in config:
        return None
    # The converter to the hub's layout added <image> right after the language model's own tokens.
    vocabulary = config.get("image_token_index") if hub else language_config.get("vocab_size")
    family = config["model_type"] if hub else "original"
    return _KNOWN_TEMPLATES.get((family, str(language_config.get("model_type")), vocabulary or 0))
