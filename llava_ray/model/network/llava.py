"""LLaVA itself: image features through the projector into the language model's embeddings.

Positions of image features hold IMAGE_TOKEN_INDEX (-200), once per feature, so every length is known before the model
runs and the vocabulary need not grow. A training batch is one packed row: ``position_ids`` restart at 0 with each
sample. Where ``attend_by_sample`` was called, attention computes each sample by itself, and otherwise the whole row
under a mask that transformers builds from the positions.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from llava_ray.chat.conversation import IMAGE_TOKEN_INDEX
from llava_ray.errors import ModelError
from llava_ray.images.anyres import Size
from llava_ray.images.tokens import NEWLINE, ImageTokens
from llava_ray.model.network.attention_switch import SampleAttention
from llava_ray.model.network.head_loss import compute_head_losses, find_plain_head
from llava_ray.model.network.sample_attention import SampleBorders
from llava_ray.model.network.tower import VisionTower

_ONE_VIEW = ImageTokens(rows=1, columns=1)  # each image is one view, whose features stand as they come


class Llava(nn.Module):
    """A projector, a language model and, if it is trained, a tower: everything that a training engine wraps."""

    def __init__(
        self,
        projector: nn.Module,
        language_model: PreTrainedModel,
        mm_hidden_size: int,
        image_tokens: ImageTokens = _ONE_VIEW,
        image_newline: Float[Tensor, " d"] | None = None,
    ) -> None:
        """Compose the parts; ``mm_hidden_size`` is the width of the features that the projector takes.

        ``image_tokens`` says how the views of an image are joined; ``image_newline`` is the vector that ends a row of
        patches, kept only where that rule has one.
        """
        super().__init__()
        self.projector = projector
        self.language_model = language_model
        self.mm_hidden_size = mm_hidden_size
        self.image_tokens = image_tokens
        if image_tokens.has_newline and image_newline is None:
            raise ModelError(
                "mm_patch_merge_type 'spatial_unpad' ends rows of patches with a learned vector, and there is none; "
                "expected a tensor image_newline beside the projector's."
            )
        kept = image_newline if image_tokens.has_newline else None
        self.image_newline = None if kept is None else nn.Parameter(kept)
        self.first_learnt_token = 0
        self.sample_attention: SampleAttention | None = None
        self._tower: tuple[VisionTower, ...] = ()

    def adopt_tower(self, tower: VisionTower) -> None:
        """Register the tower, so that it is trained with the rest; ``forward`` then takes pixels, not features."""
        self.vision_tower = tower.backbone  # canonical tensor names: vision_tower.<the backbone's own>
        self._tower = (tower,)

    def attend_by_sample(self) -> None:
        """Compute attention sample by sample from now on: every row then needs its borders. Raises ModelError."""
        self.sample_attention = SampleAttention(self.language_model)

    def own_attention(self) -> AbstractContextManager[None]:
        """Return a context in which the language model attends as it came, such as to generate answers."""
        return self.sample_attention.paused() if self.sample_attention else nullcontext()

    @property
    def embeddings_name(self) -> str:
        """Return the name of the input embeddings among this module's parameters."""
        table = self.language_model.get_input_embeddings().weight
        return next(name for name, parameter in self.named_parameters() if parameter is table)

    def forward(  # noqa: PLR0913 - what a row has
        self,
        input_ids: Int[Tensor, "1 t"],
        position_ids: Int[Tensor, "1 t"],
        predicting: Int[Tensor, " s"],
        features: Float[Tensor, "n p v"] | None = None,
        image_sizes: Sequence[Size] = (),
        pixels: Float[Tensor, "n 3 h w"] | None = None,
        *,
        borders: SampleBorders | None = None,
        image_positions: Int[Tensor, " m"] | None = None,
        targets: Int[Tensor, " s"] | None = None,
    ) -> Float[Tensor, "s vocab"] | Float[Tensor, " s"]:
        """Return the logits of a packed row at the positions ``predicting``, in order.

        Given the ``targets`` that these positions are to predict, a model whose head is plain returns their losses
        instead (cross-entropy in fp32), without holding the logits of all.

        ``features`` are those of all views of all images, ``image_sizes`` each image's (width, height) in pixels,
        which anyres needs; ``pixels`` stand for the features where the tower has been adopted. ``borders`` are needed
        for attention by sample alone, ``image_positions`` spare a GPU's host the wait for their number. Only the
        language model's head is limited to ``predicting``. The result's sum can always be differentiated, also when it
        is empty. Raises ModelError if features and image positions differ in number.
        """
        blank = None
        for tower in self._tower:  # before anything else, with images or not: every rank in the same order (see touch)
            if pixels is not None:
                features = tower(pixels)
            elif features is None:
                blank = tower.blank_features()
        inputs: dict[str, Any] = {
            "inputs_embeds": self.embed(input_ids, features, image_sizes, blank, image_positions),
            "position_ids": position_ids,
            # With a cache, transformers no longer sees the borders between samples.
            "use_cache": False,
            **({"borders": borders} if self.sample_attention else {}),
        }
        head = None if targets is None else find_plain_head(self.language_model)
        if head is None or targets is None:
            logits: Tensor = self.language_model(**inputs, logits_to_keep=predicting).logits
            return logits[0]
        hidden: Tensor = self.language_model.base_model(**inputs).last_hidden_state
        softcap = getattr(self.language_model.config, "final_logit_softcapping", None)
        return compute_head_losses(head, hidden[:, predicting], targets, softcap)

    def embed(
        self,
        input_ids: Int[Tensor, "b t"],
        features: Float[Tensor, "n p v"] | None = None,
        image_sizes: Sequence[Size] = (),
        blank: Float[Tensor, "1 p v"] | None = None,
        image_positions: Int[Tensor, " m"] | None = None,
    ) -> Float[Tensor, "b t d"]:
        """Return token embeddings with the projected features, in order, at the image positions.

        ``blank`` are features of no weight for a row without images. ``image_positions`` count through all rows; they
        are looked for in ``input_ids`` if they are not given. Raises ModelError if features and image positions differ
        in number.
        """
        is_image = input_ids == IMAGE_TOKEN_INDEX
        embeddings: Tensor = self.language_model.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        if self.first_learnt_token:
            learnt = input_ids >= self.first_learnt_token
            embeddings = torch.where(learnt.unsqueeze(-1), embeddings, embeddings.detach())
        num_features = 0 if features is None else features.shape[0] * features.shape[1]
        order = self.arrange(num_features, image_sizes)
        if image_positions is None:
            image_positions = is_image.flatten().nonzero().squeeze(1)
        num_positions, num_arranged = len(image_positions), num_features if order is None else len(order)
        if num_positions != num_arranged:
            raise ModelError(
                f"{num_positions} image positions in input_ids, but {num_arranged} image features; expected as many "
                "of one as of the other. Expand each image to as many positions as the tower gives features."
            )
        if features is None or num_features == 0:
            blank = embeddings.new_zeros(1, 1, self.mm_hidden_size) if blank is None else blank
            return embeddings + 0.0 * self.zero_weight_image_path(blank.to(embeddings.dtype))
        if order is None and self.image_newline is not None:
            embeddings = embeddings + 0.0 * self.image_newline.sum()
        projected = self.project(features.to(embeddings.device, embeddings.dtype), order).to(embeddings.dtype)
        return embeddings.flatten(0, 1).index_copy(0, image_positions, projected).view_as(embeddings)

    def project(self, features: Float[Tensor, "n p v"], order: Int[Tensor, " t"] | None) -> Float[Tensor, "t d"]:
        """Project features to the language model's width, in the given order (see ``arrange``) or unchanged."""
        projected: Tensor = self.projector(features).flatten(0, 1)
        return projected if order is None else self.laid_out(projected, order.to(projected.device))

    def arrange(self, num_features: int, image_sizes: Sequence[Size]) -> Int[Tensor, " t"] | None:
        """Return the index of the feature at each image position; None where features are in order already.

        Raises ModelError if ``num_features`` are not those of images of these sizes.
        """
        tokens = self.image_tokens
        if not tokens.grid_pinpoints:
            return None
        expected = sum(tokens.num_views(*size) for size in image_sizes) * tokens.num_features
        if expected != num_features:
            raise ModelError(
                f"{num_features} image features, but images of {list(image_sizes)} pixels have {expected} with anyres; "
                "give image_sizes as (width, height) of each image before it was cut, in order."
            )
        return torch.from_numpy(tokens.arrange(image_sizes))

    def laid_out(self, projected: Float[Tensor, "m d"], order: Int[Tensor, " t"]) -> Float[Tensor, "t d"]:
        """Return the projected features in their order, with image_newline where a row of patches ends."""
        merged = projected.index_select(0, order.clamp(min=0))
        if self.image_newline is None:
            return merged
        newline = self.image_newline.to(merged.dtype)
        return torch.where((order == NEWLINE).unsqueeze(-1), newline, merged)

    def zero_weight_image_path(self, blank: Float[Tensor, "1 p v"]) -> Float[Tensor, ""]:
        """Return a zero that depends on every parameter that only images use.

        Every rank must use the same parameters in the same order, or ZeRO 2 and 3 wait for one another forever.
        """
        touched: Tensor = self.projector(blank).sum()
        return touched if self.image_newline is None else touched + self.image_newline.sum()
