"""LLaVA itself: image features through the projector into the language model's embeddings.

Positions of image features hold IMAGE_TOKEN_INDEX (-200), once per feature, so every length is known before the model
runs and the vocabulary never grows. A training batch is one packed row: ``position_ids`` restart at 0 with each
sample, which is all that attention needs to keep samples apart.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from llava_ray.chat.conversation import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_ray.errors import ModelError

LOGITS_CHUNK = 512  # supervised tokens whose logits are in fp32 at one time


class Llava(nn.Module):
    """A projector and a language model: all that learns, and all that a training engine has to wrap."""

    def __init__(self, projector: nn.Module, language_model: PreTrainedModel, mm_hidden_size: int) -> None:
        """Compose the two; ``mm_hidden_size`` is the width of the features that the projector takes."""
        super().__init__()
        self.projector = projector
        self.language_model = language_model
        self.mm_hidden_size = mm_hidden_size

    def forward(
        self,
        input_ids: Int[Tensor, "1 t"],
        position_ids: Int[Tensor, "1 t"],
        labels: Int[Tensor, "1 t"],
        features: Float[Tensor, "n p v"] | None = None,
    ) -> Float[Tensor, " s"]:
        """Return the fp32 cross-entropy of each supervised token of a packed row, in order.

        Labels are shifted here: position i predicts ``labels[i + 1]``, never across the border of two samples. The
        result's sum can always be differentiated, also when it is empty. Raises ModelError if features and image
        positions differ in number.
        """
        predicting, targets = find_targets(labels, position_ids)
        logits = self.language_model(
            inputs_embeds=self.embed(input_ids, features),
            position_ids=position_ids,
            # With a cache, transformers no longer sees the borders between samples.
            use_cache=False,
            logits_to_keep=predicting,
        ).logits
        return token_losses(logits[0], targets)

    def embed(
        self, input_ids: Int[Tensor, "b t"], features: Float[Tensor, "n p v"] | None = None
    ) -> Float[Tensor, "b t d"]:
        """Return token embeddings with the projected features, in order, at the image positions.

        Raises ModelError if features and image positions differ in number.
        """
        is_image = input_ids == IMAGE_TOKEN_INDEX
        embeddings: Tensor = self.language_model.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        num_positions = int(is_image.sum())
        num_features = 0 if features is None else features.shape[0] * features.shape[1]
        if num_positions != num_features:
            raise ModelError(
                f"{num_positions} image positions in input_ids, but {num_features} image features; expected as many "
                "of one as of the other. Expand each image to as many positions as the tower gives features."
            )
        if features is None or num_features == 0:
            # Every rank must use the same parameters in the same order, or ZeRO 2 and 3 wait for one another forever.
            unused: Tensor = self.projector(embeddings.new_zeros(1, 1, self.mm_hidden_size))
            return embeddings + 0.0 * unused.sum()
        projected: Tensor = self.projector(features.to(embeddings.device, embeddings.dtype))
        return embeddings.masked_scatter(is_image.unsqueeze(-1), projected.to(embeddings.dtype))


def find_targets(
    labels: Int[Tensor, "1 t"], position_ids: Int[Tensor, "1 t"]
) -> tuple[Int[Tensor, " s"], Int[Tensor, " s"]]:
    """Return the positions that predict a supervised token, and those tokens.

    A sample's first token (position 0) is never predicted: what stands before it belongs to another sample.
    """
    following = labels[0, 1:].masked_fill(position_ids[0, 1:] == 0, IGNORE_INDEX)
    predicting = (following != IGNORE_INDEX).nonzero().squeeze(1)
    return predicting, following[predicting]


def token_losses(logits: Float[Tensor, "s vocab"], targets: Int[Tensor, " s"]) -> Float[Tensor, " s"]:
    """Return the cross-entropy of each token in fp32.

    Half-precision logits are widened a chunk at a time and again in the backward pass: 2,048 tokens of a vocabulary of
    152,000 would otherwise hold 1.2 GB of fp32 copies.
    """
    if logits.dtype == torch.float32 or not logits.shape[0]:
        return fp32_losses(logits, targets)
    chunks = zip(torch.split(logits, LOGITS_CHUNK), torch.split(targets, LOGITS_CHUNK), strict=True)
    return torch.cat(
        [checkpoint(fp32_losses, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    )


def fp32_losses(logits: Float[Tensor, "s vocab"], targets: Int[Tensor, " s"]) -> Float[Tensor, " s"]:
    """Return the cross-entropy of each token, computed in fp32."""
    return cross_entropy(logits.float(), targets, reduction="none")
