#!/usr/bin/env python
"""What known text and guessed tokens save: a chat of eight turns, and answers that repeat their prompt.

The chat has images in turns 1 and 5; the first token of each turn is timed with the prefix cache and without it. The
second part asks for a text to be continued that the prompt holds twice; it is timed with guesses and without.

    python tests/benchmarks/bench_prefix.py --output tests/benchmarks/results/prefix.json
"""

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
from bench_engine import hear, load_whole, make_request
from outcome import describe_processor, keep_result

from llava_ray.chat.conversation import Turn
from llava_ray.generate.builtin.builtin_engine import BuiltinEngine
from llava_ray.generate.engine import GenerationRequest, Sampling
from llava_ray.generate.settings import EngineSettings
from llava_ray.model.assembly import LlavaParts

NUM_TURNS = 8
IMAGES_IN = (0, 4)
QUESTION = "Describe in a few words what you can see there, and say which colours it has and why. " * 2
REPEATED = "[info] GET /images/cat.png 200 OK, 12 ms\n"
TARGETS = {"turn_8_first_token_over_uncached": 0.5}


def main() -> None:
    """Measure both parts, print and keep them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--weights", type=Path, default=Path("runs/cache/engine"), help="where models are kept")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    parts = load_whole(options.weights)
    known, unknown = (asyncio.run(chat(parts, share)) for share in (0.5, 0.0))
    guessed, plain = (asyncio.run(repeat(parts, count)) for count in (8, 0))
    last = [one[-1]["first_token_seconds"] for one in (known, unknown)]
    keep_result(
        {
            "chat": known,
            "chat_without_cache": unknown,
            "turn_8_first_token_over_uncached": round(last[0] / last[1], 3),
            "tokens_before_first_difference": count_common(guessed["ids"], plain["ids"]),
            "repeated": {key: value for key, value in guessed.items() if key != "ids"},
            "repeated_without_guesses": {key: value for key, value in plain.items() if key != "ids"},
            "guesses_speedup": round(guessed["tokens_per_second"] / plain["tokens_per_second"], 2),
            "targets": TARGETS,
            "processor": describe_processor(),
            "command": " ".join(sys.argv),
        },
        options.output,
    )


def count_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two answers share: all in float32; in bfloat16 rounding depends on a step's tokens."""
    return next((place for place, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), len(one))


async def chat(parts: LlavaParts, share: float) -> list[dict[str, Any]]:
    """Hold a chat; return for each turn its prompt's tokens, those that were known, and the time to its first token."""
    engine = BuiltinEngine(lambda: parts, settings=EngineSettings(prefix_cache_share=share))
    await engine.start()
    await hear(engine, make_request("warm", 1, 4))
    turns: list[Turn] = []
    images: list[bytes] = []
    measured = []
    for number in range(NUM_TURNS):
        images += make_request("", number).images if number in IMAGES_IN else ()
        turns.append(Turn("human", f"{'<image>' if number in IMAGES_IN else ''}\n{number}. {QUESTION}"))
        asked = GenerationRequest(str(number), tuple(turns), images=tuple(images), sampling=Sampling(max_tokens=48))
        start, text, first, chunk = time.perf_counter(), "", 0.0, None
        async for chunk in engine.generate(asked):
            first = first or time.perf_counter() - start
            text += chunk.text
        assert chunk is not None
        turns.append(Turn("gpt", text))
        measured.append(
            {
                "prompt_tokens": chunk.num_prompt_tokens,
                "cached_tokens": chunk.num_cached_tokens,
                "first_token_seconds": round(first, 3),
            }
        )
    await engine.stop()
    return measured


async def repeat(parts: LlavaParts, num_guessed: int) -> dict[str, Any]:
    """Let the model continue a text that repeats itself; return the rate, the ids and how many guesses were right."""
    engine = BuiltinEngine(lambda: parts, settings=EngineSettings(speculative_tokens=num_guessed))
    await engine.start()
    await hear(engine, make_request("warm", 1, 4))
    asked = GenerationRequest("repeat", prompt=(REPEATED * 16)[:-9], sampling=Sampling(max_tokens=192, ignore_eos=True))
    start = time.perf_counter()
    heard = await hear(engine, asked)
    seconds = time.perf_counter() - start
    stats = engine.stats()
    await engine.stop()
    return {
        "ids": heard.ids,
        "tokens_per_second": round(len(heard.ids) / seconds, 2),
        "guessed_tokens": stats.draft_tokens,
        "right_tokens": stats.accepted_tokens,
    }


if __name__ == "__main__":
    main()
