"""Frozen-tower features computed ahead of training, in actors that each hold a tower."""

import numpy as np
import pyarrow as pa
import torch

from llava_ray.data.blocks import pack_block, unpack_block
from llava_ray.data.settings import StreamSettings
from llava_ray.images.processing import normalize_pixels
from llava_ray.model.assembly import load_tower


class FeatureActor:
    """An actor that turns pixels into tower features, on a GPU if it was assigned one."""

    def __init__(self, settings: StreamSettings) -> None:
        """Load the tower, once per actor."""
        self.spec = settings.image_spec
        self.device = "cuda" if settings.vision_gpus else "cpu"
        self.tower = load_tower(settings.model, dtype=_feature_dtype(bf16=settings.bf16)).to(self.device)

    def __call__(self, block: pa.Table) -> pa.Table:
        """Replace the pixels of a block's micro-batches by tower features."""
        return pack_block(self.replace_pixels(unpack_block(block)))

    def replace_pixels(self, table: pa.Table) -> pa.Table:
        """Replace the column "pixels" by "features": bytes of (n, p, v) in the tower's dtype."""
        counts = []
        tensors = []
        for cell in table["pixels"].to_pylist():
            pixels = torch.from_numpy(unpacked_pixels(cell, self.spec.height, self.spec.width))
            counts.append(len(pixels))
            tensors.append(pixels)
        features = self.extract(torch.cat(tensors)).split(counts)
        cells = [part.contiguous().view(torch.uint8).numpy().tobytes() if len(part) else b"" for part in features]
        position = table.column_names.index("pixels")
        return table.set_column(position, "features", pa.array(cells, pa.large_binary()))

    def extract(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the features (n, p, v) of uint8 pixels (n, 3, h, w)."""
        if not len(pixels):
            return torch.empty(0)
        return self.tower.extract(pixels, lambda views: normalize_pixels(views, self.spec)).cpu()


def _feature_dtype(*, bf16: bool) -> torch.dtype:
    """Return the compute dtype of a frozen tower."""
    return torch.bfloat16 if bf16 else torch.float32


def unpacked_features(cell: bytes, settings: StreamSettings) -> torch.Tensor:
    """Return the (n, p, v) features of one cell, which is not empty."""
    flat = torch.frombuffer(bytearray(cell), dtype=_feature_dtype(bf16=settings.bf16))
    return flat.view(-1, settings.image_tokens.num_features, settings.mm_hidden_size)


def unpacked_pixels(cell: bytes, height: int, width: int) -> np.ndarray:
    """Return the (n, 3, h, w) uint8 pixels of one micro-batch's cell; n may be 0."""
    # A copy, because a view of shared memory is read-only and torch wants none such.
    return np.frombuffer(cell, np.uint8).reshape(-1, 3, height, width).copy()
