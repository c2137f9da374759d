"""Models in the layouts that LLaVAs are published in: the golden ones, and tiny random ones written here."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file

from llava_ray.model.assembly import LlavaParts

GOLDEN = Path(__file__).parent / "golden"


def copy_golden(name: str, folder: Path) -> Path:
    """Copy a checkpoint with its tower and images, and the tokenizer that they share beside the language model."""
    shutil.copytree(GOLDEN / name, folder)
    shutil.copy(GOLDEN / "tokenizer.model", folder / "base" if name == "lora" else folder)
    return folder


def canonical_tensors(parts: LlavaParts) -> dict[str, torch.Tensor]:
    """Return all tensors of a model with a CLIP tower; the tower's as openai/clip has them."""
    tower = {f"vision_tower.vision_model.{name}": tensor for name, tensor in parts.tower.full_state_dict().items()}
    return dict(parts.llava.state_dict()) | tower


def original_name(name: str) -> str:
    """Name a tensor as the original does."""
    part, _, own = name.partition(".")
    prefix = {"projector": "model.mm_projector.", "vision_tower": "model.vision_tower.vision_tower."}
    return prefix.get(part, "") + own


def old_hub_name(name: str) -> str:
    """Name a tensor as transformers 4 does in files, and 5 when it saves."""
    names = {"projector.0.": "multi_modal_projector.linear_1.", "projector.2.": "multi_modal_projector.linear_2."}
    return next((new + name.removeprefix(old) for old, new in names.items() if name.startswith(old)), name)


def new_hub_name(name: str) -> str:
    """Name a tensor as transformers 5 does in memory."""
    name = old_hub_name(name).replace("vision_tower.vision_model.", "vision_tower.")
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    return "model." + name.replace("language_model.model.", "language_model.")


def write_weights(folder: Path, tensors: Mapping[str, torch.Tensor], *, ending: str, num_shards: int = 1) -> None:
    """Write tensors as model.safetensors or pytorch_model.bin, or as shards of them with their index."""
    stem = {"safetensors": "model", "bin": "pytorch_model"}[ending]
    whole = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    names = sorted(whole)
    weight_map = {}
    for number in range(num_shards):
        file = f"{stem}.{ending}" if num_shards == 1 else f"{stem}-{number + 1:05d}-of-{num_shards:05d}.{ending}"
        chosen = {name: whole[name] for name in names[number::num_shards]}
        weight_map |= dict.fromkeys(chosen, file)
        if ending == "safetensors":
            save_file(chosen, folder / file, metadata={"format": "pt"})
        else:
            torch.save(chosen, folder / file)
    if num_shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))


def original_config(parts: LlavaParts) -> dict[str, Any]:
    """Return config.json as the original writes it: the language model's keys and LLaVA's in one."""
    return parts.llava.language_model.config.to_dict() | {
        "architectures": ["LlavaLlamaForCausalLM"],
        "image_aspect_ratio": parts.manifest.image_aspect_ratio,
        "mm_hidden_size": parts.mm_hidden_size,
        "mm_projector_type": parts.config.mm_projector_type,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": parts.config.mm_vision_select_feature,
        "mm_vision_select_layer": parts.config.mm_vision_select_layer,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "model_type": "llava_llama",
        "tokenizer_model_max_length": 512,
        "tokenizer_padding_side": "right",
        "use_mm_proj": True,
    }


def write_original(
    folder: Path, parts: LlavaParts, *, ending: str = "safetensors", num_shards: int = 1, with_tower: bool = False
) -> Path:
    """Write a whole model in the original layout."""
    folder.mkdir(parents=True)
    tensors = {
        original_name(name): tensor
        for name, tensor in canonical_tensors(parts).items()
        if with_tower or not name.startswith("vision_tower.")
    }
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # as older transformers kept it
    write_weights(folder, tensors, ending=ending, num_shards=num_shards)
    (folder / "config.json").write_text(json.dumps(original_config(parts)))
    parts.tokenizer.save_pretrained(folder)
    return folder


def write_projector_only(folder: Path, parts: LlavaParts) -> Path:
    """Write what the original's alignment stage leaves."""
    folder.mkdir(parents=True)
    tensors = {f"model.mm_projector.{name}": t for name, t in parts.llava.projector.state_dict().items()}
    torch.save(tensors, folder / "mm_projector.bin")
    (folder / "config.json").write_text(json.dumps(original_config(parts)))
    return folder


def write_lora(folder: Path, parts: LlavaParts, *, ending: str = "safetensors") -> Path:
    """Write the original's LoRA folder with an adapter of zeros, which changes nothing."""
    folder.mkdir(parents=True)
    model = parts.llava.language_model
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    tensors = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "up_proj")):
            prefix = f"base_model.model.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(2, module.in_features)
            tensors[f"{prefix}.lora_B.weight"] = torch.zeros(module.out_features, 2)
    if ending == "safetensors":
        save_file(tensors, folder / "adapter_model.safetensors")
    else:
        torch.save(tensors, folder / "adapter_model.bin")
    config.save_pretrained(folder)
    projector = parts.llava.projector.state_dict()
    torch.save(
        {f"base_model.model.model.mm_projector.{name}": t for name, t in projector.items()},
        folder / "non_lora_trainables.bin",
    )
    (folder / "config.json").write_text(json.dumps(original_config(parts)))
    return folder


def write_hub(
    folder: Path, parts: LlavaParts, *, rename: Callable[[str], str] = old_hub_name, num_shards: int = 1
) -> Path:
    """Write a whole model in the layout of transformers' LLaVA classes."""
    folder.mkdir(parents=True)
    tensors = {rename(name): tensor for name, tensor in canonical_tensors(parts).items()}
    write_weights(folder, tensors, ending="safetensors", num_shards=num_shards)
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": parts.language_config.vocab_size - 1,
        "model_type": "llava",
        "projector_hidden_act": "gelu",
        "text_config": parts.llava.language_model.config.to_dict(),
        "vision_config": parts.tower_config.to_dict(),
        "vision_feature_layer": parts.config.mm_vision_select_layer,
        "vision_feature_select_strategy": "default",
    }
    (folder / "config.json").write_text(json.dumps(config))
    parts.tokenizer.save_pretrained(folder)
    parts.image_processor.save_pretrained(folder)
    return folder


def write_7b(folder: Path) -> Path:
    """Write the headers of LLaVA-1.5-7B's shards; the files have their full size and take no room."""
    folder.mkdir()
    names: dict[str, list[int]] = {"model.embed_tokens.weight": [32000, 4096], "lm_head.weight": [32000, 4096]}
    for layer in range(32):
        names |= {f"model.layers.{layer}.self_attn.{x}_proj.weight": [4096, 4096] for x in "qkvo"}
        names |= {f"model.layers.{layer}.mlp.{x}_proj.weight": [11008, 4096] for x in ("gate", "up")}
        names |= {f"model.layers.{layer}.mlp.down_proj.weight": [4096, 11008]}
        names |= {f"model.layers.{layer}.{x}_layernorm.weight": [4096] for x in ("input", "post_attention")}
    names |= {"model.norm.weight": [4096], "model.mm_projector.0.weight": [4096, 1024]}
    names |= {"model.mm_projector.0.bias": [4096], "model.mm_projector.2.weight": [4096, 4096]}
    names |= {"model.mm_projector.2.bias": [4096]}
    weight_map = {}
    for shard in range(3):
        file = f"model-{shard + 1:05d}-of-00003.safetensors"
        header, end = {}, 0
        for name in sorted(names)[shard::3]:
            size = 2
            for side in names[name]:
                size *= side
            header[name] = {"dtype": "F16", "shape": names[name], "data_offsets": [end, end + size]}
            weight_map[name], end = file, end + size
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {"model_type": "llava", "hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 32000}
    config |= {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_projector_type": "mlp2x_gelu"}
    config |= {"mm_vision_select_layer": -2, "image_aspect_ratio": "pad", "max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").touch()
    return folder
