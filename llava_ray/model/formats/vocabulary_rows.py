"""Vocabulary rows: truncated to the language model's own, or extended for a token that a layout adds."""

from typing import Literal

import torch
from torch import Tensor

from llava_ray.errors import ModelError
from llava_ray.model.formats.names import LANGUAGE_MODEL_PREFIX
from llava_ray.model.tensors.weight_files import Stored

Vocabulary = Literal["auto", "kept", "padded", "truncated"]
EMBEDDINGS = f"{LANGUAGE_MODEL_PREFIX}model.embed_tokens.weight"
TABLES = (EMBEDDINGS, f"{LANGUAGE_MODEL_PREFIX}lm_head.weight", f"{LANGUAGE_MODEL_PREFIX}lm_head.bias")
_MULTIPLE = 64  # what the published hub models round to


def choose_rows(vocabulary: Vocabulary, *, found: int, own: int, needed: int) -> int:
    """Compute the number of rows of an exported table.

    There are ``found`` rows now, ``own`` of them the language model's, and the tokenizer's ids need ``needed``. "auto"
    adds rows only where needed. Raises ModelError where tokens would have no row.
    """
    padded = found if found >= needed and found % _MULTIPLE == 0 else -(-needed // _MULTIPLE) * _MULTIPLE
    rows = {"kept": found, "truncated": own, "padded": padded, "auto": found if needed <= found else padded}[vocabulary]
    if needed > rows:
        raise ModelError(
            f"vocabulary: the tokenizer's ids take {needed} rows, but with --vocabulary {vocabulary} the table has "
            f"{rows} of them. Use --vocabulary padded, which adds rows up to {padded}."
        )
    return rows


def with_rows(tensors: dict[str, Stored], rows: int) -> dict[str, Stored]:
    """Return the tensors with embeddings and head of that many rows; new ones are the mean of the old.

    A mean row's logit is never above the best of the others, so an added token is never the greedy choice.
    """
    changed = {}
    for name in TABLES:
        if name in tensors and tensors[name].shape[0] != rows:
            old = tensors[name]
            changed[name] = old.mapped(lambda table: _resized(table, rows), (rows, *old.shape[1:]))
    return {**tensors, **changed}


def _resized(table: Tensor, rows: int) -> Tensor:
    if rows <= table.shape[0]:
        return table[:rows]
    mean = table.mean(0, keepdim=True, dtype=torch.float32).to(table.dtype)
    return torch.cat([table, mean.expand(rows - table.shape[0], *table.shape[1:])])
