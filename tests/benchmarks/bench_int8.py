#!/usr/bin/env python
"""The built-in engine with int8 weights beside its float32 and bfloat16 ones, on a trained model.

Of each: resident memory once the engine has started (and the peak until then), the answers to held-out questions of
easy-vqa, their agreement with float32's, the log-likelihood of the right answers, and tokens a second at 1 and 8
clients. Each runs in a process of its own.

python tests/benchmarks/bench_int8.py --model runs/quickstart/model --output tests/benchmarks/results/int8.json
"""

import argparse
import asyncio
import json
import math
import os
import random
import resource
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
from outcome import describe_processor, keep_result

from llava_ray.chat.conversation import Turn
from llava_ray.chat.tokens import tokenize_conversation
from llava_ray.config.data import MAX_IMAGE_PIXELS
from llava_ray.generate.builtin.builtin_engine import BuiltinEngine
from llava_ray.generate.engine import GenerationRequest, Sampling
from llava_ray.generate.likelihoods import compute_log_likelihoods
from llava_ray.generate.settings import EngineSettings
from llava_ray.images.geometry import crop_views
from llava_ray.images.processing import normalize_pixels
from llava_ray.images.reading import open_image
from llava_ray.model.assembly import LlavaParts
from llava_ray.model.loading import load_pretrained_model
from llava_ray.model.network.int8_linear import round_to_int8
from llava_ray.quickstart.easy_vqa import ShapeQuestion, score_shape_answers, test_questions

WAYS = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "int8_float32": ("float32", "int8"),
    "int8_bfloat16": ("bfloat16", "int8"),
}
CLIENTS = (1, 8)
NEW_TOKENS = 64
ROUNDS = 4
AT_ONCE = 16
_MIB = 2**20


def main() -> None:
    """Measure each way in its own process, print and keep the whole."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a trained quickstart model")
    parser.add_argument("--large", action="store_true", help="random weights of a 1.1 B model: memory and speed alone")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--num-questions", type=int, default=600)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--way", choices=WAYS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.way:
        print(json.dumps(measure(options.model, options.way, options.num_questions)))
        return
    found = {way: run_apart(way, options.model, options.num_questions, options.threads) for way in WAYS}
    answers = {way: result.pop("answers") for way, result in found.items()}
    for way, result in found.items():
        same = sum(answers[way][key] == text for key, text in answers["float32"].items())
        result["answers_as_float32"] = round(same / len(answers["float32"]), 4)
    large = {}
    if options.large:
        with tempfile.TemporaryDirectory() as folder:
            model = write_large_model(Path(folder), options.model)
            large = {way: run_apart(way, model, 0, options.threads) for way in ("bfloat16", "int8_bfloat16")}
    keep_result(
        {
            "num_questions": options.num_questions,
            "new_tokens": NEW_TOKENS,
            "threads": options.threads,
            "trained": found,
            "random_1.1b": large,
            "machine": f"{describe_processor()}, torch {torch.__version__}",
        },
        options.output,
    )


def run_apart(way: str, model: Path, num_questions: int, threads: int) -> dict[str, Any]:
    """Measure one way in a new process."""
    command = [sys.executable, __file__, "--way", way, "--model", str(model)]
    command += ["--num-questions", str(num_questions), "--threads", str(threads)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=3000).stdout
    result: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return result


def measure(model: Path, way: str, num_questions: int) -> dict[str, Any]:
    """Return all that is measured of one way."""
    dtype, quantization = WAYS[way]
    before = read_resident()
    engine = BuiltinEngine(
        lambda: load_pretrained_model(model, dtype=getattr(torch, dtype)),
        settings=EngineSettings(quantization=quantization, kv_cache_tokens=8192, image_cache_bytes=0),
    )
    result = asyncio.run(run_engine(engine, num_questions, before))
    if num_questions:
        parts = load_pretrained_model(model, dtype=getattr(torch, dtype))
        if quantization:
            round_to_int8(parts.llava.language_model)
        result["mean_log_likelihood"] = round(find_likelihood(parts, test_questions(num_questions, seed=1)), 5)
        result["perplexity"] = round(math.exp(-result["mean_log_likelihood"]), 5)
    return result


async def run_engine(engine: BuiltinEngine, num_questions: int, before: int) -> dict[str, Any]:
    """Start an engine; measure its memory, its answers and its speed."""
    await engine.start()
    result: dict[str, Any] = {
        "resident_mib": round((read_resident() - before) / _MIB, 1),
        "peak_mib": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / _MIB, 1),
    }
    answers: dict[str, str] = {}
    if num_questions:
        questions = test_questions(num_questions, seed=1)
        for start in range(0, len(questions), AT_ONCE):
            some = questions[start : start + AT_ONCE]
            answers |= dict(zip((one.id for one in some), await ask_all(engine, some), strict=True))
        result["held_out_accuracy"] = round(score_shape_answers(answers, questions).total.accuracy, 4)
    result["answers"] = answers
    result["tokens_per_second"] = {str(count): await run_clients(engine, count) for count in CLIENTS}
    await engine.stop()
    return result


async def ask_all(engine: BuiltinEngine, questions: Sequence[ShapeQuestion]) -> list[str]:
    """Return the greedy answers to questions that are asked together."""

    async def ask(question: ShapeQuestion) -> str:
        turns = (Turn("human", f"<image>\n{question.question}"),)
        images = (question.image.read_bytes(),)
        request = GenerationRequest(question.id, turns, images=images, sampling=Sampling(max_tokens=16))
        return "".join([chunk.text async for chunk in engine.generate(request)])

    return await asyncio.gather(*map(ask, questions))


async def run_clients(engine: BuiltinEngine, count: int) -> float:
    """Return the new tokens a second of clients that ask one question after another; the best of three runs."""
    draw, number = random.Random(count), iter(range(10**6))

    async def client() -> None:
        for _ in range(ROUNDS):
            text = " ".join("".join(draw.choices(string.ascii_lowercase, k=5)) for _ in range(8))
            sampling = Sampling(max_tokens=NEW_TOKENS, ignore_eos=True, temperature=1.0, seed=1)
            request = GenerationRequest(f"{count}-{next(number)}", (Turn("human", text),), sampling=sampling)
            async for _ in engine.generate(request):
                pass

    rates = []
    for _ in range(3):
        start = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(count)))
        rates.append(count * ROUNDS * NEW_TOKENS / (time.perf_counter() - start))
    return round(max(rates), 1)


def find_likelihood(parts: LlavaParts, questions: Sequence[ShapeQuestion]) -> float:
    """Return the mean log-likelihood of a token of the right answers."""
    total, num_tokens = 0.0, 0
    for start in range(0, len(questions), AT_ONCE):
        some = questions[start : start + AT_ONCE]
        answered, pixels, sizes = [], [], []
        for question in some:
            turns = [Turn("human", f"<image>\n{question.question}"), Turn("gpt", question.answer)]
            answered.append([tokenize_conversation(turns, parts.template, parts.tokenizer)])
            image = open_image(question.image.read_bytes(), question.id, max_pixels=MAX_IMAGE_PIXELS)
            pixels.append(normalize_pixels(crop_views(image, parts.image_spec), parts.image_spec))
            sizes.append([image.size])
        for [(likelihood, count)] in compute_log_likelihoods(parts, answered, pixels, sizes):
            total, num_tokens = total + likelihood, num_tokens + count
    return total / num_tokens


def write_large_model(folder: Path, like: Path) -> Path:
    """Write a bundle of a trained model's tokenizer and tower with a random language model of TinyLlama's size."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from llava_ray.model.saving import save_bundle

    parts = load_pretrained_model(like)
    own = parts.llava.language_model.config
    config = LlamaConfig(
        vocab_size=own.vocab_size,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
    )
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder / "language_model")
    torch.set_default_dtype(torch.float32)
    parts.tokenizer.save_pretrained(folder / "language_model")
    tower = like / "vision_tower"
    whole = load_pretrained_model(
        folder / "language_model", vision_tower=tower, version="chat_template", dtype=torch.bfloat16
    )
    save_bundle(folder / "model", whole, include="all")
    return folder / "model"


def read_resident() -> int:
    """Return the bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
