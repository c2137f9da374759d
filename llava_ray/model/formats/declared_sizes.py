"""Checks of the sizes in a config.json, made before anything of that size is allocated. No torch."""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llava_ray.errors import ModelError
from llava_ray.model.tensors.tensor_files import read_json_object
from llava_ray.reading import MAX_SHOWN, short_repr

_MAX_COUNT = 1024  # of layers, labels, …: objects that are created one by one
_MAX_SIZE = 2**24
_MAX_PIXELS_A_SIDE = 2**13
_COUNTS = re.compile(r"(?:^|_)(?:layers?|labels|depths?)$")
_SIDES = frozenset({"image_size", "patch_size"})
# Sizes that every model needs; others may be 0.
POSITIVE = frozenset(
    {
        "hidden_size",
        "image_size",
        "intermediate_size",
        "max_position_embeddings",
        "n_embd",
        "n_head",
        "n_layer",
        "num_attention_heads",
        "num_channels",
        "num_hidden_layers",
        "num_key_value_heads",
        "num_patches",
        "patch_size",
        "vocab_size",
    }
)
_SIZES = frozenset({"head_dim", "num_experts", "num_local_experts", "n_routed_experts"})  # 0 in some models
_TEXTS = frozenset({"model_type", "hidden_act", "dtype", "torch_dtype", "_name_or_path", "mm_vision_tower"})
_LENGTHS = frozenset({"model_max_length"})  # 10 ** 30 where there is none
_TABLES = frozenset({"text_config", "vision_config", "rope_parameters", "rope_scaling", "quantization_config"})


def read_config(file: Path) -> dict[str, Any]:
    """Read and check a config.json. Raises ModelError that names the file, and the key of an implausible size."""
    config = read_json_object(file)
    check_declared(config, str(file))
    return config


def check_declared(config: Mapping[str, Any], where: str) -> None:
    """Raise ModelError that names the key of an invalid or implausible size, at any depth of a config."""
    for key, value in _leaves(config, ""):
        own = key.rpartition(".")[2]
        if value is None:
            continue
        if own in _TABLES:
            raise _unfit(where, key, value, "a table")
        if own in _TEXTS and not isinstance(value, str):
            raise _unfit(where, key, value, "a word")
        if own in POSITIVE and type(value) is not int:
            raise _unfit(where, key, value, "a whole number")
        if isinstance(value, float) and math.isinf(value):
            raise _unfit(where, key, value, "a finite number")
        if type(value) is int:
            _check_number(own, key, value, where)


def _check_number(own: str, key: str, value: int, where: str) -> None:
    if own in POSITIVE and value <= 0:
        raise _unfit(where, key, value, "a number above 0")
    most = _MAX_COUNT if _COUNTS.search(own) else _MAX_PIXELS_A_SIDE if own in _SIDES else _MAX_SIZE
    if (own in POSITIVE | _SIZES or most != _MAX_SIZE) and value > most:
        raise _unfit(where, key, value, f"at most {most:,}")
    if abs(value) > 2**53 and own not in _LENGTHS:
        raise _unfit(where, key, value, "a number of at most 64 bits")


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield all leaf values with their keys, those of tables and of lists of sizes; reading has bounded the depth."""
    own = key.rpartition(".")[2]
    if isinstance(value, Mapping) and own not in _TEXTS | POSITIVE:
        for name, item in value.items():
            yield from _leaves(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and value and (own in POSITIVE or _COUNTS.search(own)):
        for item in value:
            yield from _leaves(item, key)
    else:
        yield key, value


def _unfit(where: str, key: str, value: object, expected: str) -> ModelError:
    return ModelError(
        f"{where}: {key[:MAX_SHOWN]} is {short_repr(value)}, expected {expected}. The file was edited or "
        "damaged: copy it "
        "again."
    )
