"""The original's tiny checkpoints, loaded as they are."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from originals import copy_golden

from llava_ray.images.anyres import Size
from llava_ray.images.geometry import crop_views
from llava_ray.images.processing import normalize_pixels
from llava_ray.images.reading import open_image
from llava_ray.model.assembly import LlavaParts, merge
from llava_ray.model.loading import load_pretrained_model


@dataclass(frozen=True)
class GoldenModel:
    """A checkpoint of the original's, and what the original computed with it."""

    parts: LlavaParts
    folder: Path
    expected: dict[str, Any]

    def pixels(self, image: str | None) -> torch.Tensor | None:
        """The views of an image of its folder."""
        return None if image is None else self.views(image)[0]

    def views(self, image: str) -> tuple[torch.Tensor, Size]:
        """The same, and the image's size."""
        opened = open_image((self.folder / "images" / image).read_bytes(), image, max_pixels=10**6)
        return normalize_pixels(crop_views(opened, self.parts.image_spec), self.parts.image_spec), opened.size


@pytest.fixture(scope="session")
def golden_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GoldenModel:
    name = request.param.partition(",")[0]
    folder = copy_golden(name, tmp_path_factory.mktemp("golden") / name)
    tower = folder / "tower"
    # Stored in fp16, measured in fp32 on the stored values.
    if name == "lora":
        parts = load_pretrained_model(folder / "lora", folder / "base", vision_tower=tower)
        parts = merge(parts) if "merged" in request.param else parts
    else:
        parts = load_pretrained_model(folder, vision_tower=tower)
    return GoldenModel(parts, folder, json.loads((folder / "expected.json").read_text()))
