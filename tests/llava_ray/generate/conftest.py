"""The original's tiny checkpoint taken apart into the three parts that ours is made of."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_ray.config.sections import ModelConfig
from llava_ray.images.geometry import crop_pixels
from llava_ray.images.processing import normalise
from llava_ray.images.reading import open_image
from llava_ray.model.bundle import LlavaParts, assemble

GOLDEN = Path(__file__).parents[2] / "golden"


@dataclass(frozen=True)
class GoldenModel:
    """Our parts with the original's weights, and what the original computed with them."""

    parts: LlavaParts
    expected: dict[str, Any]

    def pixels(self, image: str | None) -> torch.Tensor | None:
        if image is None:
            return None
        data = (GOLDEN / "v15_mlp_pad" / "images" / image).read_bytes()
        cropped = crop_pixels(open_image(data, image, max_pixels=10**6), self.parts.image_spec)
        return normalise(cropped[None], self.parts.image_spec)


@pytest.fixture(scope="session")
def golden_model(tmp_path_factory: pytest.TempPathFactory) -> GoldenModel:
    source, folder = GOLDEN / "v15_mlp_pad", tmp_path_factory.mktemp("golden")
    # Stored in fp16, measured in fp32 on the stored values.
    tensors = {name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()}
    projector = {name: tensor for name, tensor in tensors.items() if "mm_projector" in name}
    torch.save(projector, folder / "mm_projector.bin")
    save_file({name: tensor for name, tensor in tensors.items() if name not in projector}, folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    for file in (GOLDEN / "tokenizer.model", source / "tokenizer_config.json", source / "special_tokens_map.json"):
        shutil.copy(file, folder)
    model = ModelConfig(
        model_name_or_path=str(folder),
        vision_tower=str(source / "tower"),
        pretrain_mm_mlp_adapter=str(folder / "mm_projector.bin"),
        version="vicuna_v1",
    )
    parts = assemble(model, "pad")
    parts.llava.eval()
    return GoldenModel(parts, json.loads((source / "expected.json").read_text()))
