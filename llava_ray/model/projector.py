"""The projector between vision tower and language model, under LLaVA's type names and tensor names."""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from llava_ray.errors import ModelError

PROJECTOR_FILE = "projector.safetensors"
ORIGINAL_PREFIX = "mm_projector."
# What is learnt beside a projector and kept in its file: the vector that ends a row of anyres patches, and the input
# embeddings of new tokens.
IMAGE_NEWLINE = "image_newline"
EMBED_TOKENS = "embed_tokens.weight"
COMPANIONS = (IMAGE_NEWLINE, EMBED_TOKENS)


def build_projector(mm_projector_type: str, mm_hidden_size: int, hidden_size: int) -> nn.Module:
    """Return a new projector from the tower's width to the language model's.

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
    depth = re.fullmatch(r"mlp([1-9]\d*)x_gelu", mm_projector_type)
    if depth is None:
        raise ModelError(
            f"unknown mm_projector_type {mm_projector_type!r}; expected 'linear', 'identity' or 'mlpNx_gelu' "
            "such as 'mlp2x_gelu'."
        )
    layers: list[nn.Module] = [nn.Linear(mm_hidden_size, hidden_size)]
    for _ in range(int(depth[1]) - 1):
        layers += [nn.GELU(), nn.Linear(hidden_size, hidden_size)]
    return nn.Sequential(*layers)


def load_projector_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a projector's tensors from a bundle folder, a .safetensors file or LLaVA's mm_projector.bin.

    Names come back without any prefix (``0.weight``). A pickle is read with ``weights_only=True``: nothing in it is
    run. Raises ModelError for a file that is missing or unreadable.
    """
    tensors = read_projector_file(path)
    marked = {name.rpartition(ORIGINAL_PREFIX)[2]: value for name, value in tensors.items() if ORIGINAL_PREFIX in name}
    return marked or {name: value for name, value in tensors.items() if not name.endswith(COMPANIONS)}


def load_companions(path: str | Path) -> dict[str, Tensor]:
    """Read what lies beside a projector in its file, by the names in COMPANIONS. Raises ModelError."""
    tensors = read_projector_file(path)
    return {name: value for own, value in tensors.items() for name in COMPANIONS if own.endswith(name)}


def read_projector_file(path: str | Path) -> dict[str, Tensor]:
    """Return all tensors of the file that holds the projector. Raises ModelError."""
    file = find_projector_file(Path(path))
    try:
        if file.suffix == ".safetensors":
            tensors = load_file(file)
        else:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise ModelError(f"{file} cannot be read as projector weights ({error}); copy it again.") from error
    return tensors


def find_projector_file(path: Path) -> Path:
    """Return the file that holds the projector: ``path`` itself, or the one in that folder. Raises ModelError."""
    candidates = [path / PROJECTOR_FILE, path / "mm_projector.bin"] if path.is_dir() else [path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise ModelError(
        f"no projector at {path}; expected a bundle folder with {PROJECTOR_FILE}, a .safetensors file or LLaVA's "
        "mm_projector.bin. Check pretrain_mm_mlp_adapter."
    )


def adopt_projector(projector: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy ``weights`` into ``projector``; every tensor must be there, with the same shape, and no other.

    Raises ModelError that says which type and widths ``source`` seems to have and which are configured.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in projector.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if expected != found:
        raise ModelError(
            f"the projector in {source} does not fit: it is {describe_projector(found)}, expected "
            f"{describe_projector(expected)}. Use the vision tower, language model and mm_projector_type that it was "
            "trained with, or leave pretrain_mm_mlp_adapter out to start a new one."
        )
    projector.load_state_dict(dict(weights))


def describe_projector(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Put a projector's tensor shapes into words: its type, the tower's width and the language model's width."""
    matrices = {name: shape for name, shape in sorted(shapes.items()) if name.endswith("weight") and len(shape) == 2}
    if not matrices:
        return f"of an unknown type (tensors {dict(shapes)})" if shapes else "identity (no tensors)"
    kind = "linear" if "weight" in matrices else f"mlp{len(matrices)}x_gelu"
    widths = list(matrices.values())
    return f"{kind} from tower width {widths[0][1]} to language model width {widths[-1][0]}"
