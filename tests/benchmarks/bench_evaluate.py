#!/usr/bin/env python
"""Questions per second of batched evaluation beside a loop that asks one at a time, as the original does.

python tests/benchmarks/bench_evaluate.py --model runs/quickstart/model --output tests/benchmarks/results/evaluate.json

The loop and the actor pool answer the same easy-vqa questions with the same model on the same cores. Beside that: how
many batched answers differ from those of the loop and how close the two best tokens were there; seconds and memory for
few and for ten times as many questions.
"""

import argparse
import os
import platform
import time
from pathlib import Path
from typing import Any

os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1")

import psutil
import ray
import torch
from outcome import keep_result
from PIL import Image

from llava_ray.chat.conversation import Turn, with_markers
from llava_ray.chat.tokens import tokenize_prompt
from llava_ray.generate.answers import Actors, Decoding, locate_model, stream_answers
from llava_ray.generate.decoding import answer_text, generate_batch
from llava_ray.generate.questions import ModelQuestion
from llava_ray.images.geometry import crop_views
from llava_ray.images.processing import normalize_pixels
from llava_ray.model.assembly import LlavaParts
from llava_ray.model.loading import load_pretrained_model
from llava_ray.quickstart import easy_vqa

NUM_CORES = 2
TARGET = 5.0


def main() -> None:
    """Time the loop, the pool, and the pool on more questions; print and keep the figures."""
    options = parse_options()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:NUM_CORES])
    asked = [ModelQuestion(q.id, q.question, str(q.image)) for q in easy_vqa.test_questions(options.num_many, seed=0)]
    parity = asked[:: max(1, len(asked) // options.num_loop)][: options.num_loop]
    torch.set_num_threads(NUM_CORES)
    parts = load_pretrained_model(options.model)
    start = time.perf_counter()
    alone = {question.id: answer_alone(parts, question, options.max_new_tokens) for question in parity}
    loop = len(parity) / (time.perf_counter() - start)
    del parts
    ray.init(address="local", num_cpus=NUM_CORES + 1, include_dashboard=False, log_to_driver=False)
    pooled, _, answers = time_pool(options, parity)
    few = asked[: options.num_few]
    seconds_few, memory_few, _ = time_pool(options, few)
    seconds_many, memory_many, _ = time_pool(options, asked)
    ray.shutdown()
    result = {
        "loop_questions_per_second": round(loop, 2),
        "questions_per_second": round(len(asked) / seconds_many, 2),
        "questions_per_second_with_start": round(len(parity) / pooled, 2),
        "ratio": round(len(asked) / seconds_many / loop, 2),
        "target": TARGET,
        "num_compared": len(parity),
        "num_differing": sum(answers[name] != text for name, text in alone.items()),
        "few": {"questions": len(few), "seconds": round(seconds_few, 1), "peak_mb": round(memory_few)},
        "many": {"questions": len(asked), "seconds": round(seconds_many, 1), "peak_mb": round(memory_many)},
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
    }
    keep_result(result, options.output)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("runs/quickstart/model"))
    parser.add_argument("--num-loop", type=int, default=300)
    parser.add_argument("--num-few", type=int, default=500)
    parser.add_argument("--num-many", type=int, default=5_000)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--max-new-tokens", type=int, default=8)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def answer_alone(parts: LlavaParts, question: ModelQuestion, max_new_tokens: int) -> str:
    """Answer one question the way a plain loop does: open, preprocess, generate, decode."""
    image = Image.open(str(question.image)).convert("RGB")
    pixels = normalize_pixels(crop_views(image, parts.image_spec), parts.image_spec)
    turns = [Turn("human", with_markers(question.question, 1))]
    prompt = tokenize_prompt(turns, parts.template, parts.tokenizer)
    ids = generate_batch(parts, [prompt], [pixels], image_sizes=[[image.size]], max_new_tokens=max_new_tokens)[0]
    return answer_text(parts, ids)


def time_pool(options: argparse.Namespace, asked: list[ModelQuestion]) -> tuple[float, float, dict[str, str]]:
    """Return seconds, peak memory in MB of this process and its children, and the answers."""
    model = locate_model(options.model, None, None, None)
    decoding = Decoding(options.max_new_tokens, 0.0, options.batch_size)
    start, peak, answers = time.perf_counter(), 0.0, dict[str, str]()
    for batch in stream_answers(model, asked, decoding, Actors(NUM_CORES, 1.0)):
        answers |= {answer.id: answer.answer for answer in batch}
        peak = max(peak, used_memory())
    return time.perf_counter() - start, peak, answers


def used_memory() -> float:
    """Return MB that this process and its children hold, without what they share."""
    total = 0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            info: Any = process.memory_info()
            total += info.rss - info.shared
        except psutil.Error:  # ended meanwhile
            continue
    return total / 2**20


if __name__ == "__main__":
    main()
