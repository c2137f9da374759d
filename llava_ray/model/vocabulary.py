"""LLaVA's optional tokens around images: in the tokenizer, the template and the embeddings."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from llava_ray.chat.templates import Template, find_template
from llava_ray.errors import ModelError
from llava_ray.model.sources import load_padding_tokenizer

IM_PATCH_TOKEN = "<im_patch>"
IM_START_TOKEN = "<im_start>"
IM_END_TOKEN = "<im_end>"
IMAGE_TOKENS = (IM_PATCH_TOKEN, IM_START_TOKEN, IM_END_TOKEN)


def add_image_tokens(tokenizer: PreTrainedTokenizerBase, *, start_end: bool, patch: bool) -> tuple[int, ...]:
    """Add the tokens that the settings ask for, in the original's order; return the ids of those that are new."""
    known = tokenizer.get_added_vocab()
    wanted = [IM_PATCH_TOKEN] * patch + [IM_START_TOKEN, IM_END_TOKEN] * start_end
    missing = [token for token in wanted if token not in known]
    if missing:
        tokenizer.add_tokens(missing, special_tokens=True)
    return tuple(tokenizer.get_added_vocab()[token] for token in missing)


def load_text_side(
    folder: Path, version: str, *, start_end: bool, patch: bool
) -> tuple[PreTrainedTokenizerBase, tuple[int, ...], Template]:
    """Load a tokenizer with the tokens that the settings ask for, the new ones' ids, and the template.

    Raises ModelError or ConfigError.
    """
    tokenizer = load_padding_tokenizer(folder)
    new_ids = add_image_tokens(tokenizer, start_end=start_end, patch=patch)
    return tokenizer, new_ids, with_image_tags(find_template(version, tokenizer), start_end=start_end)


def image_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids of the optional tokens that the tokenizer knows, in order."""
    known = tokenizer.get_added_vocab()
    return tuple(sorted(known[token] for token in IMAGE_TOKENS if token in known))


def with_image_tags(template: Template, *, start_end: bool) -> Template:
    """Return the template with <im_start> and <im_end> next to each image, inside the template's own tags."""
    if not start_end:
        return template
    before, after = template.image_tags
    return replace(template, image_tags=(before + IM_START_TOKEN, IM_END_TOKEN + after))


def extend_embeddings(model: PreTrainedModel, new_ids: Sequence[int], rows: Float[Tensor, "k d"] | None = None) -> None:
    """Give each new token a row of its own: the mean of the old ones, in the input and in the output embeddings.

    A table that has room already (many are padded) is not made larger. ``rows`` are input embeddings that were learnt
    before, the last k of which belong to the new tokens, as in the original's mm_projector.bin. Under ZeRO 3 every
    rank must call this. Raises ModelError if ``rows`` do not fit.
    """
    if not new_ids:
        return
    num_rows: int = model.config.get_text_config().vocab_size
    # Some tokenizers hold tokens beyond the table already: such rows are as new as ours.
    without_meaning = [*range(num_rows, max(new_ids) + 1), *(token for token in new_ids if token < num_rows)]
    if max(new_ids) >= num_rows:
        model.resize_token_embeddings(max(new_ids) + 1, mean_resizing=False)
    inputs = model.get_input_embeddings().get_parameter("weight")
    head = model.get_output_embeddings()
    outputs = inputs if head is None else head.get_parameter("weight")
    for table in [inputs] if outputs is inputs else [inputs, outputs]:
        with whole(table), torch.no_grad():
            table[without_meaning] = table[: min(without_meaning)].float().mean(0).to(table.dtype)
            if rows is not None and table is inputs:
                table[list(new_ids)] = fitting_rows(rows, len(new_ids), table.shape[1]).to(table)


def fitting_rows(rows: Float[Tensor, "k d"], num_new: int, width: int) -> Float[Tensor, "num_new d"]:
    """Return the learnt rows of the new tokens. Raises ModelError."""
    if rows.shape[0] < num_new or rows.shape[1] != width:
        raise ModelError(
            f"the projector brings {tuple(rows.shape)} embeddings, but {num_new} new tokens of width {width} need "
            f"theirs; set mm_use_im_start_end and mm_use_im_patch_token as it was trained, on the same language model."
        )
    return rows[-num_new:]


@contextmanager
def whole(parameter: nn.Parameter) -> Iterator[None]:
    """Let a parameter be read and written as a whole where ZeRO 3 has it partitioned; rank 0's writing counts."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter], modifier_rank=0):
        yield
