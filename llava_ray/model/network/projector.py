"""The projector between vision tower and language model, under LLaVA's type names and tensor names."""

import re
from collections.abc import Mapping

from torch import Tensor, nn

from llava_ray.config.geometry import PROJECTOR, ModelGeometry
from llava_ray.errors import ModelError


def build_projector_of(geometry: ModelGeometry) -> nn.Module:
    """Return a new projector as a model's settings describe it. Raises ModelError."""
    return build_projector(geometry.mm_projector_type, geometry.mm_hidden_size, geometry.hidden_size)


def build_projector(mm_projector_type: str, mm_hidden_size: int, hidden_size: int) -> nn.Module:
    """Build a new projector from the tower's width to the language model's.

    ``linear`` is one Linear, ``mlpNx_gelu`` N of them with exact GELU between (tensor names ``0.weight``,
    ``2.weight``, ... as in LLaVA-1.5, https://arxiv.org/abs/2310.03744), ``identity`` nothing. Raises ModelError.
    """
    if mm_projector_type == "linear":
        return nn.Linear(mm_hidden_size, hidden_size)
    if mm_projector_type == "identity":
        if mm_hidden_size != hidden_size:
            raise ModelError(
                f"the identity projector changes no width, but the tower has {mm_hidden_size} and the language model "
                f"{hidden_size}; choose mm_projector_type 'linear' or 'mlp2x_gelu'."
            )
        return nn.Identity()
    depth = re.fullmatch(PROJECTOR, mm_projector_type)
    if depth is None:
        raise ModelError(
            f"unknown mm_projector_type {mm_projector_type!r}; expected 'linear', 'identity' or 'mlpNx_gelu' "
            "such as 'mlp2x_gelu'."
        )
    layers: list[nn.Module] = [nn.Linear(mm_hidden_size, hidden_size)]
    for _ in range(int(depth[1]) - 1):
        layers += [nn.GELU(), nn.Linear(hidden_size, hidden_size)]
    return nn.Sequential(*layers)


def adopt_projector(projector: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy ``weights`` into ``projector``; names and shapes must match exactly.

    Raises ModelError that names the type and widths of ``source`` and those configured.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in projector.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if expected != found:
        wrong = next(name for name in sorted(expected | found) if expected.get(name) != found.get(name))
        raise ModelError(
            f"the projector in {source} does not fit: it is {_describe_projector(found)}, expected "
            f"{_describe_projector(expected)} ({wrong}: found {_shape(found.get(wrong))}, expected "
            f"{_shape(expected.get(wrong))}). Use the vision tower, language model and mm_projector_type "
            "that it was trained with, or start a new one, without pretrain_mm_mlp_adapter, from the language model."
        )
    projector.to_empty(device="cpu").load_state_dict(dict(weights))


def _describe_projector(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Describe a projector by its tensor shapes: its type, the tower's width and the language model's width."""
    matrices = {name: shape for name, shape in sorted(shapes.items()) if name.endswith("weight") and len(shape) == 2}
    if not matrices:
        return f"of an unknown type (tensors {dict(shapes)})" if shapes else "identity (no tensors)"
    kind = "linear" if "weight" in matrices else f"mlp{len(matrices)}x_gelu"
    widths = list(matrices.values())
    return f"{kind} from tower width {widths[0][1]} to language model width {widths[-1][0]}"


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))
