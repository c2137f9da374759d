"""The original's LoRA folder over its base gives the original's losses and words, as adapter and merged."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from losses import token_losses

from llava_ray.chat.conversation import Turn, read_turns
from llava_ray.chat.tokens import expand_images, tokenize_conversation, tokenize_prompt
from llava_ray.config.model import ModelConfig
from llava_ray.generate.decoding import Stops, generate_batch
from llava_ray.images.geometry import crop_pixels
from llava_ray.images.processing import normalize_pixels
from llava_ray.images.reading import open_image
from llava_ray.model.assembly import LlavaParts, assemble, merge
from llava_ray.model.loading import load_pretrained_model
from llava_ray.model.lora.adapters import has_adapter, load_adapter
from llava_ray.model.saving import save_bundle

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parents[2] / "golden"
SOURCE = GOLDEN / "lora"
EXPECTED: dict[str, Any] = json.loads((SOURCE / "expected.json").read_text())


@pytest.fixture(scope="module")
def parts_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LlavaParts]:
    """The model as adapter over base, merged, and as bundles of both read again."""
    folder = tmp_path_factory.mktemp("lora")
    shutil.copytree(SOURCE / "base", folder / "base")
    shutil.copy(GOLDEN / "tokenizer.model", folder / "base")
    model = ModelConfig(
        model_name_or_path=str(folder / "base"),
        vision_tower=str(SOURCE / "tower"),
        pretrain_mm_mlp_adapter=str(SOURCE / "lora" / "non_lora_trainables.bin"),
        version="vicuna_v1",
    )
    parts = [assemble(model, "pad") for _ in range(2)]
    for each in parts:
        load_adapter(each.llava.language_model, SOURCE / "lora")
        each.llava.eval()
    merged = merge(parts[1])
    save_bundle(folder / "adapter", parts[0])
    save_bundle(folder / "merged", merged)
    return {
        "adapter": parts[0],
        "merged": merged,
        "adapter bundle": load_pretrained_model(folder / "adapter"),
        "merged bundle": load_pretrained_model(folder / "merged"),
    }


def read_pixels(parts: LlavaParts, image: str | None) -> torch.Tensor | None:
    if image is None:
        return None
    data = (SOURCE / "images" / image).read_bytes()
    return normalize_pixels(
        crop_pixels(open_image(data, image, max_pixels=10**6), parts.image_spec)[None], parts.image_spec
    )


KINDS = pytest.mark.parametrize("kind", ["adapter", "merged", "adapter bundle", "merged bundle"])


@KINDS
@pytest.mark.parametrize("with_image", [False, True])
def test_losses_are_the_originals(kind: str, with_image: bool, parts_of) -> None:
    parts = parts_of[kind]
    assert has_adapter(parts.llava.language_model) == kind.startswith("adapter")
    cases = [case for case in EXPECTED["cases"] if (case["image"] is not None) == with_image]
    assert cases
    for case in cases:
        pixels = read_pixels(parts, case["image"])
        tokens = tokenize_conversation(read_turns(case["conversations"]), parts.template, parts.tokenizer)
        counts = [] if pixels is None else [parts.image_tokens.num_features]
        ids, labels = expand_images(tokens.input_ids, tokens.labels, counts)
        positions = torch.arange(len(ids))[None]
        features = None if pixels is None else parts.tower(pixels)
        with torch.no_grad():
            losses = token_losses(parts.llava, torch.tensor([ids]), positions, torch.tensor([labels]), features)
        assert len(losses) == case["supervised"]
        assert losses.mean().item() == pytest.approx(case["loss"], abs=1e-4)


@KINDS
def test_greedy_words_are_the_originals(kind: str, parts_of) -> None:
    parts, generations = parts_of[kind], EXPECTED["generations"]
    prompts = [
        tokenize_prompt([Turn("human", case["question"])], parts.template, parts.tokenizer) for case in generations
    ]
    pixels = [read_pixels(parts, case["image"]) for case in generations]
    answers = generate_batch(parts, prompts, pixels, max_new_tokens=12, stops=Stops(frozenset()))
    assert answers == [case["new_token_ids"] for case in generations]
