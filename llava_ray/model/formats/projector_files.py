"""Loading of projectors from any model folder or from a file of their own."""

from pathlib import Path

from torch import Tensor

from llava_ray.errors import ModelError
from llava_ray.model.formats.layout import EMBED_TOKENS, ORIGINAL_PROJECTOR_FILE, PROJECTOR_FILE
from llava_ray.model.formats.layouts import read_layout
from llava_ray.model.formats.names import IMAGE_NEWLINE
from llava_ray.model.formats.original.names import from_original
from llava_ray.model.tensors.tensor_files import StoredTensor, read_tensor_file
from llava_ray.model.tensors.tensor_reading import read_tensors

# Weights trained with a projector and stored in its file: the vector that ends a row of anyres patches, and the input
# embeddings of new tokens.
_COMPANIONS = (IMAGE_NEWLINE, EMBED_TOKENS)


def _find_projector(path: Path) -> dict[str, StoredTensor]:
    """Find a projector's tensors in any model folder, a .safetensors file or LLaVA's mm_projector.bin.

    Names have no prefix (``0.weight``). Raises ModelError for a file that is missing, damaged, holds
    more than tensors, or holds no projector.
    """
    file = _find_projector_file(path)
    if file is None:
        return read_layout(path).part("projector")
    tensors = read_tensor_file(file)
    marked = {from_original(name): tensor for name, tensor in tensors.items()}
    weights = {name.removeprefix("projector."): t for name, t in marked.items() if name.startswith("projector.")}
    if not tensors:
        raise ModelError(f"{file} holds no tensors; expected a projector, with names such as mm_projector.0.weight.")
    return weights or {name: tensor for name, tensor in tensors.items() if not name.endswith(_COMPANIONS)}


def _find_projector_file(path: Path) -> Path | None:
    """Find the file that holds a projector and its companions; None for a folder without. Raises ModelError."""
    alone = [path / PROJECTOR_FILE, path / ORIGINAL_PROJECTOR_FILE] if path.is_dir() else [path]
    files = [file for file in alone if file.is_file()]
    if not files and not path.is_dir():
        raise ModelError(
            f"no projector at {path}; expected a bundle or another model folder, a .safetensors file or LLaVA's "
            f"{ORIGINAL_PROJECTOR_FILE}. Check pretrain_mm_mlp_adapter."
        )
    return files[0] if files else None


def load_companions(path: str | Path) -> dict[str, Tensor]:
    """Load the weights beside a projector in its file, by the names in COMPANIONS. Raises ModelError."""
    file = _find_projector_file(Path(path))
    if file is None:
        return read_tensors(read_layout(Path(path)).companions)
    stored = read_tensor_file(file)
    return read_tensors({name: t for own, t in stored.items() for name in _COMPANIONS if own.endswith(name)})


def load_projector_weights(path: str | Path) -> dict[str, Tensor]:
    """Load a projector's tensors, see ``_find_projector``. Raises ModelError."""
    return read_tensors(_find_projector(Path(path)))
