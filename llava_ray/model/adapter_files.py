"""A PEFT adapter's files, read and checked: ours, or the LoRA folder of the original LLaVA."""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llava_ray.errors import ModelError
from llava_ray.model.layout import ADAPTER_CONFIG, ADAPTER_FILE, OLD_ADAPTER_FILE
from llava_ray.model.published_names import PEFT_PREFIX

# Where the original wrapped parts that are no part of the language model.
FOREIGN_PARTS = ("model.vision_tower.", "model.mm_projector.", "model.vision_resampler.")


@dataclass(frozen=True)
class AdapterFiles:
    """What an adapter's folder holds. ``tensors`` are named as in the language model, without the adapter's name.

    ``base`` and ``base_fingerprint`` are those of the model it was trained over, where the folder says so.
    """

    folder: Path
    config: Any
    tensors: dict[str, Tensor]
    base: str | None
    base_fingerprint: str | None


def read_adapter(folder: Path) -> AdapterFiles:
    """Read an adapter. Raises ModelError that names the file that is missing, damaged or not a plain LoRA's."""
    config = read_adapter_config(folder)
    metadata: Mapping[str, str] = {}
    file = folder / ADAPTER_FILE
    try:
        if file.is_file():
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
        else:
            file = folder / OLD_ADAPTER_FILE
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ModelError(
            f"{folder} holds no adapter: neither {ADAPTER_FILE} nor {OLD_ADAPTER_FILE} is there."
        ) from error
    except (OSError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise ModelError(f"{file} cannot be read as an adapter's weights ({error}); copy it again.") from error
    return AdapterFiles(
        folder=folder,
        config=config,
        tensors=without_foreign_parts({n.removeprefix(PEFT_PREFIX): t for n, t in tensors.items()}, file),
        base=metadata.get("base_model") or config.base_model_name_or_path or None,
        base_fingerprint=metadata.get("base_model_fingerprint"),
    )


def read_adapter_config(folder: Path) -> Any:
    """Read adapter_config.json as PEFT's LoraConfig. Raises ModelError."""
    import peft

    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        raise ModelError(f"{folder} holds no adapter: {ADAPTER_CONFIG} is not there.")
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{file} cannot be read as an adapter's settings ({error}); copy it again.") from error
    if not isinstance(config, peft.LoraConfig):
        raise ModelError(
            f"{file} describes an adapter of type {config.peft_type}; expected LORA, the only one read here."
        )
    if config.modules_to_save:
        raise ModelError(
            f"{file} trains whole modules beside the adapter (modules_to_save = {config.modules_to_save}), which is "
            "not read here; merge it with the library that wrote it."
        )
    return config


def without_foreign_parts(tensors: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Leave out adapters over the tower or projector that never learnt.

    The original wraps a tower that is loaded already, though no gradient reaches it: its B stay zero. Raises ModelError
    if one did learn.
    """
    foreign = {name: tensor for name, tensor in tensors.items() if name.startswith(FOREIGN_PARTS)}
    learnt = sorted(name for name, tensor in foreign.items() if "lora_B" in name.split(".") and tensor.any())
    if learnt:
        raise ModelError(
            f"{file} adapts more than the language model: {learnt[0]} and {len(learnt) - 1} more have learnt. Merge it "
            "with the library that wrote it."
        )
    return {name: tensor for name, tensor in tensors.items() if name not in foreign}
