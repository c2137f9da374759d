"""LoRA adapters: laid over a language model, merged into it. peft is imported inside the functions: it is slow."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel

from llava_ray.errors import ModelError

if TYPE_CHECKING:
    from llava_ray.model.bundle import LlavaParts

PEFT_PREFIX = "base_model.model."


def has_adapter(language_model: nn.Module) -> bool:
    """Tell whether an adapter lies over the model."""
    return "peft_config" in vars(language_model)


def load_adapter(
    language_model: PreTrainedModel, folder: str | Path, *, base_fingerprint: str | None = None, learns: bool = False
) -> None:
    """Lay the adapter in a PEFT folder over the model it was trained over. Raises ModelError if it does not fit."""
    del base_fingerprint
    import peft
    from peft.utils.save_and_load import load_peft_weights

    config = peft.PeftConfig.from_pretrained(str(folder))
    config.inference_mode = not learns
    try:
        peft.LoraModel(language_model, config, "default")
        found = {
            name.removeprefix(PEFT_PREFIX): tensor for name, tensor in load_peft_weights(str(folder), "cpu").items()
        }
        own = {name: tensor for name, tensor in found.items() if not name.startswith("model.vision_tower.")}
        result = peft.set_peft_model_state_dict(language_model, own)
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"the adapter in {folder} is one of another language model: {error}") from error
    lost = [name for name in result.missing_keys if "lora_" in name]
    if lost or result.unexpected_keys:
        raise ModelError(f"the adapter in {folder} does not fit: {(lost + result.unexpected_keys)[0]}")


@torch.no_grad()
def merge(parts: "LlavaParts") -> "LlavaParts":
    """Merge the adapter into the language model, in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = parts.llava.language_model
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    for name, layer in layers.items():
        layer.merge(safe_merge=True)
        model.set_submodule(name, layer.get_base_layer())
    del model.peft_config
    return replace(parts)
