"""Frozen-tower features computed ahead of training, in actors that each hold a tower."""

import pyarrow as pa
import torch

from llava_ray.data.packing import pack_block, pack_features, replace_cells, unpack_block, unpack_pixels
from llava_ray.data.settings import StreamSettings
from llava_ray.images.processing import normalize_pixels
from llava_ray.model.assembly import load_tower


class FeatureActor:
    """An actor that turns pixels into tower features, on a GPU if it was assigned one."""

    def __init__(self, settings: StreamSettings) -> None:
        """Load the tower, once per actor."""
        self.spec = settings.image_spec
        self.device = "cuda" if settings.vision_gpus else "cpu"
        self.tower = load_tower(settings.model, dtype=torch.bfloat16 if settings.bf16 else torch.float32).to(
            self.device
        )

    def __call__(self, block: pa.Table) -> pa.Table:
        """Replace the pixels of a block's micro-batches by tower features."""
        return pack_block(self.replace_pixels(unpack_block(block)))

    def replace_pixels(self, table: pa.Table) -> pa.Table:
        """Replace the column "pixels" by "features": bytes of (n, p, v) in the tower's dtype."""
        counts = []
        tensors = []
        for cell in table["pixels"].to_pylist():
            pixels = torch.from_numpy(unpack_pixels(cell, self.spec.height, self.spec.width))
            counts.append(len(pixels))
            tensors.append(pixels)
        features = self.extract(torch.cat(tensors)).split(counts)
        return replace_cells(table, "pixels", "features", [pack_features(part) for part in features])

    def extract(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the features (n, p, v) of uint8 pixels (n, 3, h, w)."""
        if not len(pixels):
            return torch.empty(0)
        return self.tower.extract(pixels, lambda views: normalize_pixels(views, self.spec)).cpu()
