"""LoRA and QLoRA on the quickstart's data: stopped at a checkpoint that is a model, gone on with, merged."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import write_recipe
from test_finetune import committed, finish, ledger, started, wait_for_step

from llava_ray.chat.conversation import IMAGE_TOKEN, Turn
from llava_ray.chat.tokens import tokenize_prompt
from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.model import ModelConfig
from llava_ray.config.recipes import load_recipe
from llava_ray.generate.decoding import answer_text, generate_batch
from llava_ray.images.geometry import crop_pixels
from llava_ray.images.processing import normalize_pixels
from llava_ray.images.reading import open_image
from llava_ray.model.assembly import LlavaParts, assemble, merge
from llava_ray.model.loading import load_pretrained_model
from llava_ray.model.lora.adapters import has_adapter
from llava_ray.model.network.quantization import find_quantization
from llava_ray.model.saving import save_bundle
from llava_ray.quickstart import easy_vqa
from llava_ray.quickstart.easy_vqa_records import write_conversations
from llava_ray.quickstart.registry_weights import make_language_model, make_vision_tower

pytestmark = [pytest.mark.ray, pytest.mark.verify, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]
NUM_QUESTIONS = 24


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the quickstart leaves: its data, and a bundle (here with a projector that knows nothing)."""
    folder = tmp_path_factory.mktemp("adapters")
    cache = ROOT / "runs/cache/quickstart"
    parts = {"model_name_or_path": make_language_model(cache).path, "vision_tower": make_vision_tower(cache).path}
    config = ModelConfig.parsed(
        {key: str(path) for key, path in parts.items()} | {"version": "chat_template", "mm_vision_select_layer": -1}
    )
    save_bundle(folder / "tuned", assemble(config, "square", dtype=torch.bfloat16, model_max_length=512))
    write_conversations(folder, seed=0)
    return folder


def make_recipe(start: Path, kind: str) -> Path:
    """Return the shipped recipe with this folder's paths and a few steps."""
    changes: dict[str, Any] = {
        "model.model_name_or_path": str(start / "tuned"),
        "data.data_path": str(start / "conversations.json"),
        "data.image_folder": str(easy_vqa.image_folder("train")),
        "data.cache_dir": str(start / "cache"),
        "data.samples_per_shard": 64,
        "data.max_samples": 128,
        "train.global_batch_size": 16,
        "train.max_steps": 16,
        "train.num_train_epochs": 2,
        "train.save_steps": 2,
        "run.storage_path": str(start / kind / "runs"),
        "tracking.log_model": False,
    }
    shipped = ROOT / f"pipelines/recipes/quickstart/{kind}.toml"
    (start / kind).mkdir(exist_ok=True)
    return write_recipe(start / kind, load_recipe(FinetuneConfig, [str(shipped)]).replaced(changes))


def ask(parts: LlavaParts) -> list[str]:
    """Return what a model says to questions of the test split."""
    asked = easy_vqa.test_questions(NUM_QUESTIONS, seed=0)
    prompts, pixels = [], []
    for question in asked:
        turn = Turn("human", f"{IMAGE_TOKEN}\n{question.question}")
        prompts.append(tokenize_prompt([turn], parts.template, parts.tokenizer))
        image = open_image(Path(question.image).read_bytes(), question.id, max_pixels=10**7)
        pixels.append(normalize_pixels(crop_pixels(image, parts.image_spec)[None], parts.image_spec))
    return [answer_text(parts, ids) for ids in generate_batch(parts, prompts, pixels, max_new_tokens=16)]


def read_losses(run: Path) -> list[float]:
    """Return the loss of every step."""
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("kind", "num_workers"), [("lora", 2), ("qlora", 1)])
def test_stopped_at_a_checkpoint_gone_on_with_and_merged(
    kind: str, num_workers: int, start: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(start, kind)
    finish(recipe, "undisturbed")
    with started(recipe, "stopped") as process:
        wait_for_step(recipe, "stopped", 4)
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 130
    step = committed(recipe, "stopped")
    assert 4 <= step < 16
    runs = recipe.parent / "runs"
    halfway = load_pretrained_model(runs / "stopped" / f"step-{step:08d}" / "model")
    assert has_adapter(halfway.llava.language_model)
    assert halfway.manifest.training["steps"] == step
    assert len(ask(halfway)) == NUM_QUESTIONS

    with started(recipe, "stopped", "--cluster.num_workers", str(num_workers)) as process:
        assert process.wait(timeout=400) == 0, (recipe.parent / "stopped.log").read_text()[-3000:]
    assert ledger(recipe, "stopped") == ledger(recipe, "undisturbed")
    curves = [read_losses(runs / name) for name in ("undisturbed", "stopped")]
    # Another number of workers draws other dropout.
    assert curves[0] == pytest.approx(curves[1], rel=1e-5 if num_workers == 2 else 0.1)

    adapter = load_pretrained_model(runs / "stopped" / "model")
    assert (find_quantization(adapter.llava.language_model) is not None) == (kind == "qlora")
    said = ask(adapter)
    assert said != ask(load_pretrained_model(start / "tuned"))
    save_bundle(tmp_path / "merged", merge(adapter))
    merged = load_pretrained_model(tmp_path / "merged")
    assert not has_adapter(merged.llava.language_model)
    assert ask(merged) == said
