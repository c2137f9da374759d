"""Useful floating-point operations of a training step: what the model's own arithmetic needs, however it is done.

Counted are matrix products alone, two operations for each multiplication with an addition. Not counted: padding,
activations computed again in the backward pass, attention between different samples or to later tokens, the head where
nothing is supervised. The backward pass counts where gradients are needed: those of activations from the first
trainable parameter on, those of weights for trainable ones.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from llava_ray.model.network.attention_shape import AttentionShape
from llava_ray.model.network.llava import Llava
from llava_ray.model.network.tower import VisionTower
from llava_ray.model.summary import count_positions
from llava_ray.train.planning.sizing import find_blocks

# The last names of the layers that take what attention returns, or what goes on in an MLP; the others of the same
# module share its input.
_INNER = ("o_proj", "out_proj", "dense", "proj", "wo", "down_proj", "fc2", "w2", "weights_out", "c_proj")


@dataclass(frozen=True)
class StepWork:
    """The work of a step on one rank."""

    num_tokens: Sequence[int]
    """Of each sample."""
    num_supervised: int
    num_features: int = 0
    """Image features that go through the projector."""
    num_views: int = 0
    """Views of images that go through the tower here; none where their features are given."""


@dataclass(frozen=True)
class UsefulFlops:
    """A model's useful operations, forward and backward: for each token, supervised token, image feature and view."""

    token: float
    supervised: float
    feature: float
    view: float
    pairs: tuple[tuple[float, int | None], ...]
    """For each layer: operations for each pair of a token and an earlier one, and how far attention reaches."""

    @classmethod
    def measure(cls, llava: Llava, tower: VisionTower | None, image_side: int = 0) -> "UsefulFlops":
        """Count the operations of a model whose parts are frozen as they will be; ``image_side`` is a view's.

        Without a tower its features are given, and nothing is counted for views.
        """
        flow = _Flow()
        adopted = "vision_tower" in dict(llava.named_children())
        view = 0.0 if tower is None else _count_tower(flow if adopted else _Flow(frozen=True), tower, image_side)
        feature = flow.count(_linears(llava.projector))
        model = llava.language_model
        newline = llava.image_newline
        embeddings = model.get_input_embeddings()
        flow.learns = flow.learns or _trains(embeddings) or (newline is not None and newline.requires_grad)
        token, pairs = 0.0, []
        text: Any = model.config.get_text_config()
        width = AttentionShape.of(text).width
        for number, block in enumerate(find_blocks(model)):
            linear, share = _count_block(flow, block)
            token += linear
            pairs.append((4 * width * share, _window(text, number)))
        head = model.get_output_embeddings()
        return cls(token, flow.count([("head", head)]), feature, view, tuple(pairs))

    def count(self, work: StepWork) -> float:
        """Return the operations of a step on one rank."""
        attention = sum(
            flops * count_pairs(length, window) for flops, window in self.pairs for length in work.num_tokens
        )
        return (
            attention
            + self.token * sum(work.num_tokens)
            + self.supervised * work.num_supervised
            + self.feature * work.num_features
            + self.view * work.num_views
        )


def count_pairs(length: int, window: int | None) -> float:
    """Return how many pairs of a token and an earlier one causal attention compares: half the square."""
    reach = min(window or length, length)
    return reach * length - reach**2 / 2


class _Flow:
    """The way through a model: whether activations need gradients at the place reached."""

    def __init__(self, *, frozen: bool = False) -> None:
        """Start where nothing needs any; a ``frozen`` part never does."""
        self.frozen = frozen
        self.learns = False

    def count(self, layers: Sequence[tuple[str, nn.Module]]) -> float:
        """Return the operations of layers one behind the other, for each row of their input."""
        return sum(self.count_parallel([layer]) for layer in layers)

    def count_parallel(self, layers: Sequence[tuple[str, nn.Module]]) -> float:
        """Return the operations of layers that take the same input, for each row of it."""
        total, learns = 0.0, self.learns
        for name, layer in layers:
            trains = _trains(layer) and not self.frozen
            # An adapter's second matrix takes what its first, which is trained, returns.
            needed = self.learns or ".lora_B." in f".{name}."
            total += 2 * _num_weights(layer) * (1 + needed + trains)
            learns = learns or trains
        self.learns = learns
        return total


def _count_block(flow: _Flow, block: nn.Module) -> tuple[float, int]:
    """Return a block's operations in its matrices for each row, and its attention's passes: 1, or 3 with gradients."""
    own = {id(parameter) for _, layer in _linears(block) for parameter in layer.parameters()}
    norms = (parameter for parameter in block.parameters() if id(parameter) not in own)
    flow.learns = flow.learns or (not flow.frozen and any(parameter.requires_grad for parameter in norms))
    layers = _linears(block)
    attention = [one for one in layers if _in_attention(block, one[0])]
    total, passes = 0.0, 1
    for part in (attention, [one for one in layers if one not in attention]):
        outer = [one for one in part if not _is_inner(one[0])]
        total += flow.count_parallel(outer)
        if part is attention:
            passes = 3 if flow.learns else 1
        total += flow.count_parallel([one for one in part if one not in outer])
    return total, passes


def _count_tower(flow: _Flow, tower: VisionTower, image_side: int) -> float:
    """Return the operations of a tower for one view, to its last selected layer."""
    positions = count_positions(tower, min(tower.s2_scales) if tower.s2_scales else image_side)
    blocks = list(tower.backbone.get_submodule(tower.family.blocks).children())
    inside = {id(module) for block in blocks for module in block.modules()}
    ends = [(name, module) for name, module in _linears(tower.backbone) if id(module) not in inside]
    total = (positions - tower.num_prefix_tokens) * flow.count(ends)  # of patches
    flow.learns = flow.learns or (not flow.frozen and any(p.requires_grad for p in tower.backbone.parameters()))
    width = int(tower.config.hidden_size)
    for block in blocks:
        linear, passes = _count_block(flow, block)
        total += positions * linear + 4 * width * positions**2 * passes
    return total * tower.passes_per_view


def _linears(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the matrices inside a module with their names, those of adapters too."""
    kinds = nn.Linear | nn.Conv2d
    return [(name, inner) for name, inner in module.named_modules() if isinstance(inner, kinds)]


def _num_weights(layer: nn.Module) -> int:
    """Return the size of a layer's matrix as it was before any quantisation or partition."""
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels * layer.out_channels * layer.kernel_size[0] * layer.kernel_size[1]
    assert isinstance(layer, nn.Linear)
    return layer.in_features * layer.out_features


def _trains(layer: nn.Module) -> bool:
    """Return whether a layer's matrix is trained."""
    return bool(layer.get_parameter("weight").requires_grad)


def _in_attention(block: nn.Module, name: str) -> bool:
    """Return whether a layer of a block belongs to its attention."""
    return any("attention" in type(parent).__name__.lower() for parent in _parents(block, name))


def _parents(block: nn.Module, name: str) -> Iterator[nn.Module]:
    """Yield the modules of a block that hold a layer."""
    names = name.split(".")
    for depth in range(1, len(names)):
        yield block.get_submodule(".".join(names[:depth]))


def _is_inner(name: str) -> bool:
    """Return whether a layer takes what attention, or the first half of an MLP, returns."""
    names = [part for part in name.split(".") if part not in ("base_layer", "lora_A", "lora_B", "default")]
    return names[-1] in _INNER


def _window(text: Any, layer: int) -> int | None:
    """Return how many tokens a layer's attention reaches back; None for all."""
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    if not window or (kinds and "sliding" not in kinds[layer]) or getattr(text, "use_sliding_window", True) is False:
        return None
    return int(window)
