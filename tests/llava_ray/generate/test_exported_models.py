"""A model exported to any layout and loaded again writes the original's words."""

import json
from pathlib import Path

import pytest
from originals import GOLDEN, copy_golden

from llava_ray.chat.conversation import Turn
from llava_ray.chat.tokens import tokenize_prompt
from llava_ray.generate.decoding import Stops, generate_batch
from llava_ray.images.geometry import crop_views
from llava_ray.images.processing import normalize_pixels
from llava_ray.images.reading import open_image
from llava_ray.model.formats.bundle.write import export_bundle
from llava_ray.model.formats.hub.write import export_hub
from llava_ray.model.formats.model_opening import open_model
from llava_ray.model.formats.original.write import export_original
from llava_ray.model.loading import load_pretrained_model

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["v15_mlp_pad", "v16_anyres"])
@pytest.mark.parametrize("export", [export_bundle, export_original, export_hub])
def test_exported_and_loaded_again_it_answers_the_same(name: str, export, tmp_path: Path) -> None:
    source = copy_golden(name, tmp_path / "source")
    export(open_model(source, vision_tower=str(source / "tower"), version="vicuna_v1"), tmp_path / "exported")
    parts = load_pretrained_model(tmp_path / "exported")
    assert parts.template.name == "vicuna_v1"
    for case in json.loads((GOLDEN / name / "expected.json").read_text())["generations"][:3]:
        image = open_image((GOLDEN / name / "images" / case["image"]).read_bytes(), case["image"], max_pixels=10**6)
        views = normalize_pixels(crop_views(image, parts.image_spec), parts.image_spec)
        prompt = tokenize_prompt([Turn("human", case["question"])], parts.template, parts.tokenizer)
        answer = generate_batch(
            parts, [prompt], [views], image_sizes=[[image.size]], max_new_tokens=12, stops=Stops(frozenset())
        )
        assert answer == [case["new_token_ids"]]
