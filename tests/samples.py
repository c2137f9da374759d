"""A small data set in LLaVA's format, and the settings of small runs on it."""

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from fakes import make_language_model, make_vision_tower
from PIL import Image

from llava_ray.config.finetune import FinetuneConfig


def write_samples(folder: Path, count: int, *, seed: int = 0) -> Path:
    """Write ``count`` conversations, one in five of them text-only, with JPEGs; return the JSON's path."""
    draw = random.Random(seed)
    pixels = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    for index in range(count):
        turns = []
        for turn in range(draw.randint(1, 3)):
            words = " ".join(
                draw.choices(["red", "blue", "circle", "square", "is", "there", "any"], k=draw.randint(2, 9))
            )
            marker = "<image>\n" if turn == 0 and index % 5 else ""
            turns += [
                {"from": "human", "value": f"{marker}{words}?"},
                {"from": "gpt", "value": draw.choice(["yes", "no"])},
            ]
        record: dict[str, Any] = {"id": f"s{index:04d}", "conversations": turns}
        if index % 5:
            record["image"] = f"{index:04d}.jpg"
            write_image(folder / "images" / record["image"], pixels)
        records.append(record)
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path


def write_preferences(folder: Path, count: int, *, seed: int = 0) -> Path:
    """Write preferences in our own form, one in five of them text-only, with JPEGs; return the JSONL's path."""
    draw = random.Random(seed)
    pixels = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    words = ["red", "blue", "circle", "square", "is", "there", "any"]
    lines = []
    for index in range(count):
        marker = "<image>\n" if index % 5 else ""
        asked = [{"role": "user", "content": f"{marker}{' '.join(draw.choices(words, k=draw.randint(2, 9)))}?"}]
        if index % 3 == 0:  # a conversation before the question
            asked = [*asked, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "are you sure?"}]
        sides = [" ".join(draw.choices(words, k=draw.randint(1, 12))) for _ in range(2)]
        answers = [
            [{"role": "assistant", "content": f"{answer} {'yes' if good else 'no'}"}]
            for answer, good in zip(sides, (1, 0), strict=True)
        ]
        record: dict[str, Any] = {"id": f"p{index:04d}", "prompt": asked, "chosen": answers[0], "rejected": answers[1]}
        if index % 5:
            record["images"] = [f"{index:04d}.jpg"]
            write_image(folder / "images" / record["images"][0], pixels)
        lines.append(json.dumps(record | {"provenance": {"question": index}}))
    path = folder / "preferences.jsonl"
    path.write_text("\n".join(lines))
    return path


# (width, height): landscape, portrait, a strip, square, smaller than a tower's view.
SHAPES = [(64, 48), (40, 70), (96, 20), (64, 64), (24, 16)]


def write_mixed_samples(folder: Path, count: int, *, seed: int = 0) -> Path:
    """Write conversations about no, one, two or three images of different shapes, between the words and turns."""
    draw = random.Random(seed)
    pixels = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    for index in range(count):
        names = [f"{index:04d}-{number}.jpg" for number in range(index % 4)]
        for name in names:
            write_image(folder / "images" / name, pixels, draw.choice(SHAPES))
        questions = ["what is it?", f"is it {draw.choice(['red', 'blue'])}?"]
        for number in range(len(names)):
            questions[number % 2] = f"{'<image>' if draw.random() < 0.5 else 'and <image>'} {questions[number % 2]}"
        turns = [
            turn
            for question in questions
            for turn in ({"from": "human", "value": question}, {"from": "gpt", "value": draw.choice(["yes", "no"])})
        ]
        records.append({"id": f"m{index:04d}", "conversations": turns} | ({"images": names} if names else {}))
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path


def write_image(path: Path, draw: np.random.Generator, size: tuple[int, int] = (48, 40)) -> None:
    """Write a smooth random JPEG."""
    coarse = Image.fromarray(draw.integers(0, 255, (4, 5, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    path.write_bytes(buffer.getvalue())


def small_run(folder: Path, *, num_samples: int = 64, **changes: Any) -> FinetuneConfig:
    """Return the config of an fp32 run of a tiny random model on ``num_samples`` samples, all written to ``folder``."""
    if not (folder / "data.json").exists():
        write_samples(folder, num_samples)
    if not (folder / "language_model").exists():
        make_language_model(folder / "language_model")
        make_vision_tower(folder / "vision_tower")
    config = FinetuneConfig.parsed(
        {
            "model": {
                "model_name_or_path": str(folder / "language_model"),
                "vision_tower": str(folder / "vision_tower"),
                "mm_projector_type": "mlp2x_gelu",
            },
            "data": {
                "data_path": str(folder / "data.json"),
                "image_folder": str(folder / "images"),
                "cache_dir": str(folder / "cache"),
                "samples_per_shard": 16,
                "shuffle_window": 2,
            },
            "train": {
                "global_batch_size": 8,
                "model_max_length": 512,
                "learning_rate": 1e-2,
                "weight_decay": 0.1,
                "bf16": False,
                "save_steps": 3,
                "gradient_checkpointing": False,
            },
            "run": {"storage_path": str(folder / "runs"), "name": "small"},
            "cluster": {"num_workers": 2},
        }
    )
    return config.replaced(changes)


def write_recipe(folder: Path, config: FinetuneConfig) -> Path:
    """Write a config as a recipe, without its run's name."""
    lines = []
    for section, values in config.model_dump(mode="json").items():
        lines.append(f"[{section}]")
        lines += [
            f"{key} = {json.dumps(value)}" for key, value in values.items() if value is not None and key != "name"
        ]
    path = folder / "small.toml"
    path.write_text("\n".join(lines))
    return path
