"""A check that a language model keeps packed samples separate."""

import inspect

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from llava_ray.errors import ModelError

# Model types whose packed rows equal separate ones in the tests. Others are probed when they are loaded.
PROVEN = frozenset({"gemma", "gemma2", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3"})


def check_packing(language_model: PreTrainedModel) -> None:
    """Raise ModelError if the model would let a packed sample attend to its neighbour.

    State-space models carry their state across the border, and some older models build their mask without
    ``position_ids``. No config states this, so a type that the tests do not cover is probed with two short samples.
    """
    model_type = language_model.config.model_type
    if model_type in PROVEN:
        return
    accepted = inspect.signature(language_model.forward).parameters
    lacking = {"inputs_embeds", "position_ids", "logits_to_keep"} - accepted.keys()
    if lacking:
        raise ModelError(
            f"language models of type {model_type!r} take no {' and no '.join(sorted(lacking))}, which packed training "
            f"needs. Choose another; {', '.join(sorted(PROVEN))} are tested."
        )
    if is_partitioned(language_model):
        raise ModelError(
            f"language models of type {model_type!r} have to be probed before they are trained, which cannot be done "
            "while ZeRO 3 has their weights partitioned. Set train.zero_stage to 2 or less."
        )
    if not _sees_borders(language_model):
        raise ModelError(
            f"language models of type {model_type!r} let packed samples see each other, so training on them would be "
            f"wrong. Choose another; {', '.join(sorted(PROVEN))} are tested."
        )


@torch.no_grad()
def _sees_borders(language_model: PreTrainedModel) -> bool:
    """Return whether a sample's logits stay the same when another sample precedes it in the row."""
    embedded, position_ids = embed_probe(language_model)
    packed = language_model(inputs_embeds=embedded, position_ids=position_ids, use_cache=False).logits[:, 4:]
    alone = language_model(inputs_embeds=embedded[:, 4:], position_ids=position_ids[:, 4:], use_cache=False).logits
    return are_close(packed, alone)


def is_partitioned(language_model: PreTrainedModel) -> bool:
    """Return whether ZeRO 3 has partitioned the weights: a forward pass outside the engine is then impossible."""
    return not next(language_model.get_input_embeddings().parameters()).numel()


def embed_probe(language_model: PreTrainedModel) -> tuple[Float[Tensor, "1 8 d"], Int[Tensor, "1 8"]]:
    """Return embeddings and positions of two samples of four tokens in one row.

    Only the positions, which restart at 0, tell the model where the second begins: transformers derives its
    block-diagonal mask from them, without a cache.
    """
    ids = torch.arange(8, device=language_model.device)[None]
    return language_model.get_input_embeddings()(ids), ids % 4


def are_close(packed: Float[Tensor, "1 4 vocab"], alone: Float[Tensor, "1 4 vocab"]) -> bool:
    """Return whether two logits differ by rounding alone.

    Relative to the spread: kernels for other lengths round differently, but a leak changes logits by far more.
    """
    return torch.allclose(packed.float(), alone.float(), rtol=0.02, atol=0.02 * float(alone.float().std()))
