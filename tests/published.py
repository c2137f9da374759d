"""Small models in the published layouts, and what is compared of two models that have not been loaded."""

import json
from pathlib import Path

import torch
from fakes import make_tokenizer
from safetensors.torch import load_file, save_file
from torch import nn

from llava_ray.model.formats.model_files import ModelFiles
from llava_ray.model.network.projector import build_projector


def make_original(folder: Path, language_model: Path, tower: Path, projector_type: str = "mlp2x_gelu") -> Path:
    """Write a model in the original layout: a plain Llama's folder with LLaVA's keys and a projector."""
    folder.mkdir(parents=True)
    config = json.loads((language_model / "config.json").read_text())
    vision = json.loads((tower / "config.json").read_text())
    width = config["hidden_size"]
    config |= {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": "square",
        "mm_hidden_size": vision["hidden_size"],
        "mm_projector_lr": 2e-5,
        "mm_projector_type": projector_type,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "tokenizer_model_max_length": 2048,
        "tokenizer_padding_side": "right",
        "use_mm_proj": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(5)
    projector: nn.Module = build_projector(projector_type, vision["hidden_size"], width)
    tensors = {f"model.mm_projector.{name}": tensor for name, tensor in projector.state_dict().items()}
    save_file(tensors | load_file(language_model / "model.safetensors"), folder / "model.safetensors")
    make_tokenizer(folder)
    return folder


def assert_same_weights(found: ModelFiles, expected: ModelFiles) -> None:
    """Compare every tensor: names, dtypes, bits."""
    assert found.tensors.keys() == expected.tensors.keys()
    for name, stored in expected.tensors.items():
        before, after = stored.load(), found.tensors[name].load()
        assert (after.dtype, after.shape) == (before.dtype, before.shape), name
        assert torch.equal(after, before), name


def read(file: Path) -> dict:
    """Read a JSON file."""
    return json.loads(file.read_text())
