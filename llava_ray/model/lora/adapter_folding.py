"""Merging of projector and tower adapters on saving: a bundle holds those parts whole anyway."""

from collections.abc import Mapping

import torch
from torch import Tensor

from llava_ray.model.lora.adapters import ADAPTER, OTHER_PARTS, adapter_layers
from llava_ray.model.network.llava import Llava


def fold_other_parts(llava: Llava, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``tensors`` (under Llava's names) with the adapters of other parts than the language model merged."""
    folded = dict(tensors)
    for name, layer in adapter_layers(llava).items():
        if name.partition(".")[0] not in OTHER_PARTS or f"{name}.base_layer.weight" not in folded:
            continue
        inside = {key.removeprefix(f"{name}."): key for key in tensors if key.startswith(f"{name}.")}
        own = {key: folded.pop(whole) for key, whole in inside.items()}
        folded[f"{name}.weight"] = _merged_weight(own, layer.scaling[ADAPTER])
        if "base_layer.bias" in own:
            folded[f"{name}.bias"] = own["base_layer.bias"]
    return folded


def _merged_weight(layer: Mapping[str, Tensor], scaling: float) -> Tensor:
    """Merge one layer's adapter: W + scaling * B A; with DoRA its rows are then scaled to the trained magnitudes."""
    weight = layer["base_layer.weight"]
    down, up = layer[f"lora_A.{ADAPTER}.weight"].float(), layer[f"lora_B.{ADAPTER}.weight"].float()
    merged = weight.float() + scaling * (up @ down)
    magnitude = layer.get(f"lora_magnitude_vector.{ADAPTER}.weight")
    if magnitude is not None:
        merged *= (magnitude.float() / torch.linalg.vector_norm(merged, dim=1))[:, None]
    return merged.to(weight.dtype)
