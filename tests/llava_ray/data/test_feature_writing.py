"""Entries of the feature cache, written by Ray."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_stream_images import prepare_here, stream_here

from llava_ray.data.feature_cache import estimate_bytes
from llava_ray.data.feature_writing import cache_features
from llava_ray.data.stages import decode_block_images, load_features
from llava_ray.images.processing import normalize_pixels
from llava_ray.model.blueprint import read_blueprint


@pytest.mark.ray
def test_an_entry_written_by_ray_holds_what_the_tower_says_of_every_image(tmp_path, ray_cluster):
    there = stream_here(tmp_path)
    config = there.config.replaced({"data.vision_features": "cached"})
    prepared = prepare_here(config, tmp_path / "prepared")
    blueprint = read_blueprint(config.model, config.data.image_aspect_ratio)
    settings = replace(there.settings, data=config.data)
    entry = cache_features(prepared, blueprint, settings)
    noted = json.loads(Path(entry, "features.json").read_text())
    width = settings.mm_hidden_size * 4
    assert noted["num_bytes"] > 0
    assert estimate_bytes(prepared, settings.image_tokens, width) >= Path(entry, "00000-000000.bin").stat().st_size

    pixels = decode_block_images(there.table, settings)
    expected = [
        there.parts.tower.extract(batch.pixels, lambda views: normalize_pixels(views, settings.image_spec))
        for batch in there.batches(pixels)
        if batch.pixels is not None
    ]
    cached = there.batches(load_features(there.table, replace(settings, features=entry)))
    found = [batch.features for batch in cached if batch.features is not None]
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)

    before = Path(entry, "features.json").stat().st_mtime_ns
    assert cache_features(prepared, blueprint, settings) == entry
    assert Path(entry, "features.json").stat().st_mtime_ns == before
    # Interrupted: without the block's own account it is computed again.
    Path(entry, "features.json").unlink()
    Path(entry, "00000-000000.json").unlink()
    Path(entry, "00000-000000.bin").unlink()
    assert cache_features(prepared, blueprint, settings) == entry
    assert Path(entry, "00000-000000.bin").exists()
    other_layer = replace(settings, model=config.model.replaced({"mm_vision_select_layer": -1}))
    deeper = read_blueprint(other_layer.model, config.data.image_aspect_ratio)
    assert cache_features(prepared, deeper, other_layer) != entry
