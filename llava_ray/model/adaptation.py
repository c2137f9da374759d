"""Adapters of a run: on the language model, and on layers of other parts where these are named."""

from typing import Any

from torch import nn

from llava_ray.config.lora import LoraConfig
from llava_ray.errors import ModelError
from llava_ray.invocation import command
from llava_ray.model.assembly import LlavaParts
from llava_ray.model.lora.adapters import (
    OTHER_PARTS,
    adapter_tensors,
    add_adapter,
    find_target_modules,
    has_adapter,
    inject_adapter,
    peft_config,
    peft_settings,
    remove_adapter,
)

# Our settings → PEFT's, which must be equal to continue an adapter. Dropout may change from run to run.
_SAME = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_bias": "bias",
    "use_dora": "use_dora",
    "use_rslora": "use_rslora",
}


def adapt(parts: LlavaParts, lora: LoraConfig, seed: int) -> None:
    """Add trainable adapters as ``lora`` configures: new ones, which depend on ``seed`` alone, or the bundle's own.

    Raises ModelError where the bundle's adapter is not the configured one, or a named layer does not exist.
    """
    language_model = parts.llava.language_model
    if not has_adapter(language_model):
        if lora.lora_enable:
            add_adapter(language_model, lora, seed)
            _adapt_other_parts(parts, lora, seed)
        return
    import peft

    trained = peft_config(language_model)
    weights = adapter_tensors(language_model, language_model.state_dict())
    remove_adapter(language_model)
    _check_same(parts, lora, trained)
    add_adapter(language_model, lora, seed)
    peft.set_peft_model_state_dict(language_model, weights)
    _adapt_other_parts(parts, lora, seed)


def _check_same(parts: LlavaParts, lora: LoraConfig, trained: Any) -> None:
    """Raise ModelError if the bundle's adapter was ``trained`` (PEFT's config) with other settings than configured."""
    if not lora.lora_enable:
        raise ModelError(
            f"{parts.bundle} holds an adapter over {parts.manifest.language_model.base}; set lora.lora_enable = true "
            f"to continue it, or merge it first ({command('export', 'merge')})."
        )
    quantization = parts.manifest.quantization
    found = {key: getattr(trained, name) for key, name in _SAME.items()}
    found |= {"bits": quantization.bits if quantization else 16, "lora_target_modules": sorted(trained.target_modules)}
    targets = find_target_modules(parts.llava.language_model, lora.lora_target_modules)
    wanted = {key: getattr(lora, key) for key in _SAME} | {"bits": lora.bits, "lora_target_modules": sorted(targets)}
    for key, value in wanted.items():
        if value != found[key]:
            raise ModelError(
                f"lora.{key} is {value!r}, but the adapter in {parts.bundle} was trained with {found[key]!r}; set "
                "the same, or merge that adapter first and start a new one."
            )


def _adapt_other_parts(parts: LlavaParts, lora: LoraConfig, seed: int) -> None:
    """Add adapters to the layers outside the language model that are named with their part: ``projector.0``.

    Those of a tower need a trainable one (``unfreeze_mm_vision_tower``). Raises ModelError for a layer that does not
    exist.
    """
    llava = parts.llava
    if parts.config.unfreeze_mm_vision_tower:
        llava.adopt_tower(parts.tower)
    named = [name for name in lora.lora_target_modules or () if name.partition(".")[0] in OTHER_PARTS]
    linears = {
        name
        for name, module in llava.named_modules()
        if isinstance(module, nn.Linear) and name.partition(".")[0] in OTHER_PARTS
    }
    for name in named:
        if name not in linears:
            raise ModelError(
                f"lora.lora_target_modules names {name!r}, but the trainable parts beside the language model "
                f"have only {', '.join(sorted(linears)) or 'no Linear'}. A tower is trainable with "
                "model.unfreeze_mm_vision_tower."
            )
    for part in {name.partition(".")[0] for name in named}:
        llava.get_submodule(part).requires_grad_(False)
    if named:
        inject_adapter(llava, peft_settings(lora, named), seed)
