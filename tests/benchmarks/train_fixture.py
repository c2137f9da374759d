"""A LLaVA of the size of a benchmark and conversations for it: short questions, chats, descriptions, text alone.

A Llama of 58 M parameters with 32,000 words and a CLIP of 20 M with 256 patches, both random; lengths with a heavy tail
as in LLaVA's mix of 665,000.
"""

import random
from pathlib import Path

import numpy as np
import transformers
from fakes import make_tokenizer
from PIL import Image, ImageFilter

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.data.records import RawRecord
from llava_ray.data.shards import ShardWriter, write_shards_manifest
from llava_ray.data.validation import validate

_WORDS = (
    *("the", "a", "of", "and", "to", "in", "is", "on", "with", "near", "behind", "shows", "image", "two", "three"),
    *("man", "woman", "dog", "cat", "car", "street", "table", "water", "sky", "grass", "building", "people"),
    *("red", "blue", "green", "large", "small", "wooden", "standing", "sitting", "holding"),
)


def make_fixture(folder: Path, num_samples: int) -> None:
    """Write models, and images with conversations as prepared data."""
    import torch

    torch.manual_seed(0)
    tower = transformers.CLIPVisionConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=224,
        patch_size=14,
    )
    transformers.CLIPVisionModel(tower).save_pretrained(folder / "tower")
    transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}
    ).save_pretrained(folder / "tower")
    language = transformers.LlamaConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=32_000,
        max_position_embeddings=2048,
    )
    transformers.LlamaForCausalLM(language).save_pretrained(folder / "language_model")
    make_tokenizer(folder / "language_model", _WORDS)
    (folder / "images").mkdir()
    draw, pixels = random.Random(0), np.random.default_rng(0)
    records = [make_record(number, draw) for number in range(num_samples)]
    for record in records:
        if "image" in record:
            low = pixels.integers(0, 255, (12, 16, 3), dtype=np.uint8)
            image = (
                Image.fromarray(low).resize((640, 480), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(2))
            )
            image.save(folder / "images" / str(record["image"]), quality=90)
    writer = ShardWriter(str(folder / "data"), "shard-00000", max_rows=10**6, max_bytes=10**9)
    for number, record in enumerate(records):
        raw = RawRecord(str(record["id"]), f"data.json:{number}", record)
        writer.append(validate(raw, str(folder / "images"), max_pixels=10**9))
    write_shards_manifest(str(folder / "data"), writer.flush(), {}, {})


def make_record(number: int, draw: random.Random) -> dict[str, object]:
    """Return one conversation in LLaVA's form."""
    kind = draw.random()
    if kind < 0.45:  # short questions, several rounds
        turns = [(float(draw.randint(5, 12)), 1.0)] * draw.randint(1, 8)
    elif kind < 0.75:  # chat
        turns = [(float(draw.randint(6, 20)), draw.lognormvariate(3.4, 0.6)) for _ in range(draw.randint(1, 4))]
    elif kind < 0.9:  # description
        turns = [(10.0, draw.lognormvariate(4.6, 0.4))]
    else:  # text alone
        turns = [(draw.lognormvariate(3, 0.8), draw.lognormvariate(4.8, 0.7)) for _ in range(draw.randint(1, 3))]
    conversation = []
    for index, (asked, answered) in enumerate(turns):
        marker = "<image>\n" if kind < 0.9 and index == 0 else ""
        conversation += [
            {"from": "human", "value": marker + _make_text(asked, draw)},
            {"from": "gpt", "value": _make_text(answered, draw)},
        ]
    record: dict[str, object] = {"id": f"s{number:05d}", "conversations": conversation}
    return record | ({"image": f"{number:05d}.jpg"} if kind < 0.9 else {})


def _make_text(num_words: float, draw: random.Random) -> str:
    """Return a sentence of random words."""
    return " ".join(draw.choice(_WORDS) for _ in range(max(1, int(num_words)))) + "."


def make_config(folder: Path, *, bf16: bool, features: str, num_workers: int, num_steps: int) -> FinetuneConfig:
    """Return the settings of a run on it: batches of 8 in rows of 2,048, everything but the tower trained."""
    return FinetuneConfig.parsed(
        {
            "model": {
                "model_name_or_path": str(folder / "language_model"),
                "vision_tower": str(folder / "tower"),
                "mm_projector_type": "mlp2x_gelu",
            },
            "data": {
                "data_path": str(folder / "data"),
                "cache_dir": str(folder / "cache"),
                "vision_features": features,
            },
            "train": {
                "global_batch_size": 8,
                "max_steps": num_steps,
                "num_train_epochs": 100,
                "model_max_length": 2048,
                "bf16": bf16,
                "gradient_checkpointing": False,
                "zero_stage": 0,
                "save_steps": 1000,
            },
            "run": {"storage_path": str(folder / "runs"), "name": f"{features}-{num_workers}-{bf16}"},
            "tracking": {"log_model": False},
            "cluster": {"num_workers": num_workers},
        }
    )
