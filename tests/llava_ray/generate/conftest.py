"""The original's tiny checkpoints taken apart into the three parts that ours is made of."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_ray.config.sections import ModelConfig
from llava_ray.images.anyres import Size
from llava_ray.images.geometry import crop_views
from llava_ray.images.processing import normalise
from llava_ray.images.reading import open_image
from llava_ray.model.bundle import LlavaParts, assemble

GOLDEN = Path(__file__).parents[2] / "golden"
BESIDE = ("mm_projector", "image_newline")


@dataclass(frozen=True)
class GoldenModel:
    """Our parts with the original's weights, and what the original computed with them."""

    source: Path
    parts: LlavaParts
    expected: dict[str, Any]

    def pixels(self, image: str | None) -> torch.Tensor | None:
        """The views of an image of its folder."""
        return None if image is None else self.views(image)[0]

    def views(self, image: str) -> tuple[torch.Tensor, Size]:
        """The same, and the image's size."""
        opened = open_image((self.source / "images" / image).read_bytes(), image, max_pixels=10**6)
        return normalise(crop_views(opened, self.parts.image_spec), self.parts.image_spec), opened.size


def load_golden(source: Path, folder: Path, image_aspect_ratio: str, **settings: object) -> GoldenModel:
    # Stored in fp16, measured in fp32 on the stored values.
    tensors = {name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()}
    projector = {name: tensor for name, tensor in tensors.items() if any(part in name for part in BESIDE)}
    torch.save(projector, folder / "mm_projector.bin")
    save_file({name: tensor for name, tensor in tensors.items() if name not in projector}, folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    for file in (GOLDEN / "tokenizer.model", source / "tokenizer_config.json", source / "special_tokens_map.json"):
        shutil.copy(file, folder)
    model = ModelConfig.parsed(
        {
            "model_name_or_path": str(folder),
            "vision_tower": str(source / "tower"),
            "pretrain_mm_mlp_adapter": str(folder / "mm_projector.bin"),
            "version": "vicuna_v1",
            **settings,
        }
    )
    parts = assemble(model, image_aspect_ratio)
    parts.llava.eval()
    return GoldenModel(source, parts, json.loads((source / "expected.json").read_text()))


@pytest.fixture(scope="session")
def golden_model(tmp_path_factory: pytest.TempPathFactory) -> GoldenModel:
    return load_golden(GOLDEN / "v15_mlp_pad", tmp_path_factory.mktemp("golden"), "pad")


@pytest.fixture(scope="session")
def golden_anyres_model(tmp_path_factory: pytest.TempPathFactory) -> GoldenModel:
    source = GOLDEN / "v16_anyres"
    config = json.loads((source / "config.json").read_text())
    settings = {key: config[key] for key in ("mm_patch_merge_type", "image_grid_pinpoints")}
    return load_golden(source, tmp_path_factory.mktemp("golden"), config["image_aspect_ratio"], **settings)
