"""What is asked of a kind of vision tower, whichever library its modules are from."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from llava_ray.model.network.tower_families import Family


@runtime_checkable
class TowerNetwork(Protocol):
    """How the modules of a kind of tower are used: pixels in, features of the selected layers out.

    It holds no weights. ``config`` has ``hidden_size``, ``num_hidden_layers``, ``patch_size`` and ``image_size``;
    ``family`` says where the blocks are, which modules only serve what comes after them, and how many tokens stand
    before the patches. All else (freezing, several scales, state under the modules' own names) is ``VisionTower``'s.
    """

    config: Any
    family: Family

    def extract(
        self, backbone: nn.Module, pixel_values: Float[Tensor, "n 3 h w"], depths: Sequence[int]
    ) -> Float[Tensor, "n t v"]:
        """Return hidden states, prefix tokens included, side by side: a number of blocks for each, as ordered.

        ``backbone`` has no more blocks than the largest of ``depths``, and no final norm.
        """

    def enable_checkpointing(self, backbone: nn.Module) -> None:
        """Let the blocks compute their activations again in the backward pass."""
