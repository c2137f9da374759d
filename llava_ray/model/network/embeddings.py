"""New token rows in a language model's embeddings."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from llava_ray.errors import ModelError


def extend_embeddings(model: PreTrainedModel, new_ids: Sequence[int], rows: Float[Tensor, "k d"] | None = None) -> None:
    """Add a row for each new token, the mean of the old ones, to the input and output embeddings.

    A table that has room already (many are padded) is not enlarged. ``rows`` are trained input embeddings, the last k
    of which belong to the new tokens, as in the original's mm_projector.bin. Under ZeRO 3 every rank must call this,
    because gathering a partitioned table is a collective. Raises ModelError if ``rows`` do not fit.
    """
    if not new_ids:
        return
    num_rows: int = model.config.get_text_config().vocab_size
    # Some tokenizers have tokens beyond the table already: these need new rows as well.
    without_meaning = [*range(num_rows, max(new_ids) + 1), *(token for token in new_ids if token < num_rows)]
    if max(new_ids) >= num_rows:
        model.resize_token_embeddings(max(new_ids) + 1, mean_resizing=False)
    inputs = model.get_input_embeddings().get_parameter("weight")
    head = model.get_output_embeddings()
    outputs = inputs if head is None else head.get_parameter("weight")
    for table in [inputs] if outputs is inputs else [inputs, outputs]:
        with _whole(table), torch.no_grad():
            # The mean of the trained rows, in fp32: a random row could have a larger logit than any trained token.
            table[without_meaning] = table[: min(without_meaning)].float().mean(0).to(table.dtype)
            if rows is not None and table is inputs:
                table[list(new_ids)] = _fitting_rows(rows, len(new_ids), table.shape[1]).to(table)


def _fitting_rows(rows: Float[Tensor, "k d"], num_new: int, width: int) -> Float[Tensor, "num_new d"]:
    """Return the trained rows of the new tokens. Raises ModelError."""
    if rows.shape[0] < num_new or rows.shape[1] != width:
        raise ModelError(
            f"the projector has {tuple(rows.shape)} embeddings, but {num_new} new tokens of width {width} need "
            f"theirs; set mm_use_im_start_end and mm_use_im_patch_token as it was trained, on the same language model."
        )
    return rows[-num_new:]


@contextmanager
def _whole(parameter: nn.Parameter) -> Iterator[None]:
    """Gather a parameter that ZeRO 3 has partitioned, to read and write it as a whole; rank 0's changes are kept."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter], modifier_rank=0):
        yield
