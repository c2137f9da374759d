"""Reading and checking of a PEFT adapter's files: ours, or the LoRA folder of the original LLaVA."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llava_ray.errors import ModelError
from llava_ray.model.formats.layout import ADAPTER_CONFIG, ADAPTER_FILE, ADAPTER_FILES, OLD_ADAPTER_FILE
from llava_ray.model.formats.original.names import PEFT_PREFIX
from llava_ray.model.tensors.tensor_files import StoredTensor, read_json_object, read_metadata, read_tensor_file
from llava_ray.model.tensors.tensor_reading import read_tensors
from llava_ray.reading import is_file, short_repr, wrap_errors

_MAX_RANK = 2**16
_ALL_LINEAR = "all-linear"
_PLAIN_NAME = re.compile(r"[\w.\-]{1,200}")
# PEFT's settings that build other layers than plain LoRA.
_STRUCTURAL = (
    "alora_invocation_tokens",
    "arrow_config",
    "corda_config",
    "eva_config",
    "layer_replication",
    "loftq_config",
    "megatron_config",
    "target_parameters",
    "trainable_token_indices",
    "use_qalora",
)

# Name prefixes of wrapped layers outside the language model in the original's adapters.
_FOREIGN_PARTS = ("model.vision_tower.", "model.mm_projector.", "model.vision_resampler.")


@dataclass(frozen=True)
class AdapterFiles:
    """The contents of an adapter's folder. ``tensors`` are named as in the language model, without the adapter's name.

    ``base`` and ``base_fingerprint`` identify the model that it was trained on, if the folder records them.
    """

    folder: Path
    config: Any
    tensors: dict[str, Tensor]
    base: str | None
    base_fingerprint: str | None


def read_adapter(folder: Path) -> AdapterFiles:
    """Read an adapter. Raises ModelError that names a file that is missing, damaged or not of a plain LoRA."""
    config = _read_adapter_config(folder)
    file = next((folder / name for name in ADAPTER_FILES if is_file(folder / name)), None)
    if file is None:
        raise ModelError(f"{folder} holds no adapter: neither {ADAPTER_FILE} nor {OLD_ADAPTER_FILE} is there.")
    stored = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in read_tensor_file(file).items()}
    _check_ranks(config, stored, file)
    metadata = read_metadata(file) if file.suffix == ".safetensors" else {}
    return AdapterFiles(
        folder=folder,
        config=_with_targets(config, stored),
        tensors=_without_foreign_parts(read_tensors(stored), file),
        base=metadata.get("base_model") or config.base_model_name_or_path or None,
        base_fingerprint=metadata.get("base_model_fingerprint"),
    )


def _read_adapter_config(folder: Path) -> Any:
    """Read adapter_config.json as PEFT's LoraConfig. Raises ModelError."""
    import peft

    file = folder / ADAPTER_CONFIG
    if not is_file(file):
        raise ModelError(f"{folder} holds no adapter: {ADAPTER_CONFIG} is not there.")
    _check_settings(read_json_object(file), str(file))
    with wrap_errors(f"{file}", "Copy it again.", says="cannot be read as an adapter's settings"):
        config = peft.PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, peft.LoraConfig):
        raise ModelError(
            f"{file} describes an adapter of type {config.peft_type}; expected LORA, the only one supported here."
        )
    if config.modules_to_save:
        raise ModelError(
            f"{file} trains whole modules beside the adapter (modules_to_save = {short_repr(config.modules_to_save)}), "
            "which is not read here; merge it with the library that wrote it."
        )
    return config


def _check_settings(values: Mapping[str, Any], where: str) -> None:
    """Raise ModelError that names the key of a setting beyond plain LoRA, or of one that PEFT reads as a pattern."""
    for key in _STRUCTURAL:
        if values.get(key):
            raise ModelError(
                f"{where}: {key} is {short_repr(values[key])}, which is not read here; merge it with the library that "
                "wrote it."
            )
    _check_scales(values, where)
    for key in ("target_modules", "exclude_modules"):
        named = values.get(key)
        if isinstance(named, list) and not all(isinstance(name, str) for name in named):
            raise _unfit(where, key, named, "names of layers")
    base = values.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise _unfit(where, "base_model_name_or_path", base, "a hub id or folder")


def _check_scales(values: Mapping[str, Any], where: str) -> None:
    """Raise ModelError that names the key of implausible ranks and scales."""
    rank, alpha = values.get("r", 8), values.get("lora_alpha", 8)
    if type(rank) is not int or not 0 < rank <= _MAX_RANK:
        raise _unfit(where, "r", rank, f"a rank from 1 to {_MAX_RANK:,}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise _unfit(where, "lora_alpha", alpha, "a number")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = values.get(key) or {}
        plain = isinstance(pattern, dict) and all(_PLAIN_NAME.fullmatch(name) for name in pattern)
        if not plain or not all(type(value) in (int, float) and 0 < value <= _MAX_RANK for value in pattern.values()):
            raise _unfit(where, key, pattern, f"names of layers with numbers up to {_MAX_RANK:,}")


def _check_ranks(config: Any, stored: Mapping[str, StoredTensor], file: Path) -> None:
    """Raise ModelError if the settings declare a larger adapter than the file holds; PEFT would allocate it first."""
    largest = max((max(t.shape[:1], default=0) for name, t in stored.items() if "lora_A" in name.split(".")), default=0)
    declared = max(config.r, *(config.rank_pattern or {}).values(), 0)
    if declared > largest:
        raise ModelError(
            f"{file}: its largest rank is {largest}, but {ADAPTER_CONFIG} says r = {declared}. These are not one "
            "adapter's files: copy both again."
        )


def _with_targets(config: Any, stored: Mapping[str, StoredTensor]) -> Any:
    """Replace a pattern of layers in the settings by the names for which the file has tensors.

    Matching an untrusted pattern may take unbounded time.
    """
    if isinstance(config.target_modules, str) and config.target_modules != _ALL_LINEAR:
        names = (name.partition(".lora_A.")[0] for name in stored if ".lora_A." in name)
        config.target_modules = {name for name in names if not name.startswith(_FOREIGN_PARTS)}
        config.exclude_modules = None
    elif isinstance(config.exclude_modules, str):
        raise ModelError(f"{ADAPTER_CONFIG}: exclude_modules is a pattern, which is not read here; write names.")
    return config


def _unfit(where: str, key: str, value: object, expected: str) -> ModelError:
    return ModelError(f"{where}: {key} is {short_repr(value)}, expected {expected}; copy the file again.")


def _without_foreign_parts(tensors: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Drop untrained adapters of the tower or projector.

    The original wraps a tower that is loaded already, though no gradient reaches it: its B matrices stay zero. Raises
    ModelError if one was trained.
    """
    foreign = {name: tensor for name, tensor in tensors.items() if name.startswith(_FOREIGN_PARTS)}
    trained = sorted(name for name, tensor in foreign.items() if "lora_B" in name.split(".") and tensor.any())
    if trained:
        raise ModelError(
            f"{file} adapts more than the language model: {trained[0]} and {len(trained) - 1} more were trained. Merge "
            "it with the library that wrote it."
        )
    return {name: tensor for name, tensor in tensors.items() if name not in foreign}
