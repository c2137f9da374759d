"""LLaVA's optional tokens around images, in the tokenizer and the template."""

from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from llava_ray.chat.template import Template
from llava_ray.chat.templates import find_template
from llava_ray.model.formats.sources import load_padding_tokenizer

_IM_PATCH_TOKEN = "<im_patch>"
_IM_START_TOKEN = "<im_start>"
_IM_END_TOKEN = "<im_end>"
_IMAGE_TOKENS = (_IM_PATCH_TOKEN, _IM_START_TOKEN, _IM_END_TOKEN)


def add_image_tokens(tokenizer: PreTrainedTokenizerBase, *, start_end: bool, patch: bool) -> tuple[int, ...]:
    """Add the configured image tokens, in the original's order; return the ids of those that are new."""
    known = tokenizer.get_added_vocab()
    wanted = [_IM_PATCH_TOKEN] * patch + [_IM_START_TOKEN, _IM_END_TOKEN] * start_end
    missing = [token for token in wanted if token not in known]
    if missing:
        tokenizer.add_tokens(missing, special_tokens=True)
    return tuple(tokenizer.get_added_vocab()[token] for token in missing)


def load_text_side(
    folder: Path, version: str, *, start_end: bool, patch: bool
) -> tuple[PreTrainedTokenizerBase, tuple[int, ...], Template]:
    """Load a tokenizer with the configured image tokens, the ids of new ones, and the template.

    Raises ModelError or ConfigError.
    """
    tokenizer = load_padding_tokenizer(folder)
    new_ids = add_image_tokens(tokenizer, start_end=start_end, patch=patch)
    return tokenizer, new_ids, with_image_tags(find_template(version, tokenizer), start_end=start_end)


def image_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids of the optional tokens that the tokenizer knows, in order."""
    known = tokenizer.get_added_vocab()
    return tuple(sorted(known[token] for token in _IMAGE_TOKENS if token in known))


def with_image_tags(template: Template, *, start_end: bool) -> Template:
    """Return the template with <im_start> and <im_end> next to each image, inside the template's own tags."""
    if not start_end:
        return template
    before, after = template.image_tags
    return replace(template, image_tags=(before + _IM_START_TOKEN, _IM_END_TOKEN + after))
