"""Three language models, three towers, three projectors, each with each other: one training step, one answer."""

from itertools import product
from pathlib import Path

import fakes
import numpy as np
import pytest
import torch
from losses import token_losses
from PIL import Image

from llava_ray.chat.conversation import Turn
from llava_ray.chat.tokens import tokenize_prompt
from llava_ray.config.finetune import FinetuneConfig
from llava_ray.data.examples import Encoder
from llava_ray.generate.decoding import Stops, generate_batch
from llava_ray.images.geometry import crop_views
from llava_ray.images.processing import normalize_pixels
from llava_ray.model.assembly import LlavaParts, assemble
from llava_ray.model.freezing import freeze
from llava_ray.train.groups import parameter_groups

pytestmark = pytest.mark.slow

LANGUAGE_MODELS = ("llama", "qwen3", "gemma2")
TOWERS = ("clip", "siglip2", "dinov2_with_registers")
PROJECTORS = ("linear", "mlp2x_gelu", "identity")
SIZES = [(64, 48), (20, 50)]
TURNS = [Turn("human", "<image>\nwhat is it?"), Turn("gpt", "red"), Turn("human", "and <image>?"), Turn("gpt", "blue")]

# What else a model may be told, with one combination of parts.
VARIANTS = {
    "square": ("square", {}),
    "pad": ("pad", {}),
    "spatial": ("anyres", {"mm_patch_merge_type": "spatial"}),
    "cls_patch": ("anyres", {"mm_vision_select_feature": "cls_patch"}),
    "layers": ("anyres", {"mm_vision_select_layer": (-2, 0), "mm_patch_merge_type": "spatial_unpad"}),
    "s2": ("pad", {"s2": True}),
    "tokens": ("pad", {"mm_use_im_start_end": True, "mm_use_im_patch_token": True}),
    "tower": ("anyres", {"unfreeze_mm_vision_tower": True, "mm_patch_merge_type": "spatial_unpad"}),
    "all": (
        "anyres",
        {
            "s2": True,
            "s2_scales": (32, 64),
            "mm_vision_select_layer": (-1, -2),
            "mm_patch_merge_type": "spatial_unpad",
            "mm_use_im_start_end": True,
            "unfreeze_mm_vision_tower": True,
        },
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models, each made once; towers are as wide as the language models, for the identity projector."""
    root = tmp_path_factory.mktemp("breadth")
    for kind in LANGUAGE_MODELS:
        fakes.make_language_model(root / kind, kind)
    for kind in TOWERS:
        fakes.make_vision_tower(root / kind, kind, hidden_size=fakes.WIDTH)
    return root


def configure(root: Path, language_model: str, tower: str, projector: str, **settings: object) -> FinetuneConfig:
    model = {
        "model_name_or_path": str(root / language_model),
        "vision_tower": str(root / tower),
        "mm_projector_type": projector,
    }
    return FinetuneConfig.parsed(
        {
            "model": model | settings,
            "data": {"data_path": "unused"},
            "train": {"learning_rate": 1e-2, "weight_decay": 0.1},
        }
    )


def prepare(parts: LlavaParts) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Return the views of two images, and their sizes."""
    draw = np.random.default_rng(0)
    pictures = [Image.fromarray(draw.integers(0, 255, (height, width, 3), np.uint8)) for width, height in SIZES]
    views = np.concatenate([crop_views(picture, parts.image_spec) for picture in pictures])
    return normalize_pixels(views, parts.image_spec), SIZES


def step_and_answer(config: FinetuneConfig, image_aspect_ratio: str) -> None:
    parts = assemble(config.model, image_aspect_ratio, seed=1)
    freeze(parts.llava, parts.tower, config.model, parts.new_token_ids)
    views, sizes = prepare(parts)
    encoder = Encoder(parts.tokenizer, parts.template, parts.image_tokens, 2048)
    (example,) = encoder.encode(TURNS, sizes)
    input_ids, labels = (torch.tensor(values[None].astype(np.int64)) for values in (example.input_ids, example.labels))
    inputs = {"input_ids": input_ids, "position_ids": torch.arange(input_ids.shape[1])[None], "labels": labels}
    inputs["image_sizes"] = sizes
    if config.model.unfreeze_mm_vision_tower:
        inputs["pixels"] = views
    else:
        inputs["features"] = parts.tower.extract(views)
    optimizer = torch.optim.AdamW(parameter_groups(parts.llava, config.train))
    before = token_losses(parts.llava, **inputs).mean()
    before.backward()
    optimizer.step()
    with torch.no_grad():
        after = token_losses(parts.llava, **inputs).mean()
    assert torch.isfinite(before)
    assert after < before - 0.01
    parts.llava.eval()
    prompts = [tokenize_prompt(TURNS[:1], parts.template, parts.tokenizer)]
    prompts.append(tokenize_prompt(TURNS[:3], parts.template, parts.tokenizer))
    first = parts.image_tokens.num_views(*sizes[0])
    answers = generate_batch(
        parts,
        prompts,
        [views[:first], views],
        image_sizes=[sizes[:1], sizes],
        max_new_tokens=3,
        stops=Stops(frozenset()),
    )
    assert [len(answer) for answer in answers] == [3, 3]


@pytest.mark.parametrize(("language_model", "tower", "projector"), product(LANGUAGE_MODELS, TOWERS, PROJECTORS))
def test_every_combination_learns_and_answers(language_model: str, tower: str, projector: str, root: Path) -> None:
    config = configure(root, language_model, tower, projector, mm_patch_merge_type="spatial_unpad")
    step_and_answer(config, "anyres")


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_learns_and_answers(variant: str, root: Path) -> None:
    image_aspect_ratio, settings = VARIANTS[variant]
    step_and_answer(configure(root, "llama", "clip", "mlp2x_gelu", **settings), image_aspect_ratio)
