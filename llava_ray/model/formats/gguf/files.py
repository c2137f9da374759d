"""Writing of GGUF files, one tensor in memory at a time. The package gguf is an extra, imported on demand."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llava_ray.errors import ModelError
from llava_ray.model.tensors.weight_files import Stored

TensorType = Literal["f32", "f16", "bf16", "q8_0"]
_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
_BLOCK = 32  # numbers of a row that q8_0 rounds together


def import_gguf() -> Any:
    """Return the package gguf. Raises ModelError that says how to install it."""
    try:
        import gguf
    except ImportError as error:
        raise ModelError(
            f"GGUF files need the package gguf, which cannot be imported ({error}): pip install 'llava_ray[gguf]'"
        ) from error
    return gguf


def write_gguf(
    file: Path,
    architecture: str,
    tensors: Mapping[str, Stored],
    wanted: TensorType,
    describe: Callable[[Any], None],
) -> None:
    """Write a file of ``tensors`` by their names in it; ``describe`` adds the metadata to gguf's writer.

    Vectors are kept in float32, and matrices whose rows q8_0 cannot divide in float16, as llama.cpp's own converter
    does.
    """
    gguf = import_gguf()
    writer = gguf.GGUFWriter(path=None, arch=architecture)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[wanted]])
    describe(writer)
    kinds = {name: _choose_type(tensor, wanted) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        kind = gguf.GGMLQuantizationType[kinds[name].upper()]
        plain = {"f32": np.float32, "f16": np.float16}.get(kinds[name])
        shape = tensor.shape if plain else gguf.quant_shape_to_byte_shape(tensor.shape, kind)
        dtype = np.dtype(plain or np.uint8)
        num_bytes = int(np.prod(shape)) * dtype.itemsize
        writer.add_tensor_info(name, shape, dtype, num_bytes, raw_dtype=None if plain else kind)
    writer.write_header_to_file(path=file)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors.items():
        kind = gguf.GGMLQuantizationType[kinds[name].upper()]
        values = tensor.load().float().contiguous().numpy()
        writer.write_tensor_data(gguf.quants.quantize(values, kind))
    writer.close()


def _choose_type(tensor: Stored, wanted: TensorType) -> str:
    """Return the type of a tensor in the file."""
    if len(tensor.shape) < 2:
        return "f32"
    if wanted == "q8_0" and tensor.shape[-1] % _BLOCK:
        return "f16"
    return wanted
