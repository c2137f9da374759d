#!/usr/bin/env python
"""What a grammar costs a token: of its masks alone, for two libraries, and in the built-in engine.

The engine answers the same questions for the same number of tokens with and without a JSON Schema, in turns.
xgrammar is compared where it can be imported; it is no dependency.

python tests/benchmarks/bench_structured.py --output tests/benchmarks/results/structured.json
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import numpy as np
import torch
from outcome import describe_processor, keep_result
from transformers import AutoTokenizer, LlamaTokenizerFast

from llava_ray.chat.conversation import Turn
from llava_ray.generate.builtin.builtin_engine import BuiltinEngine
from llava_ray.generate.constraints.compiling import GrammarCompiler
from llava_ray.generate.engine import Constraint, GenerationRequest, Sampling
from llava_ray.model.loading import load_pretrained_model
from llava_ray.quickstart.registry_weights import make_language_model, make_vision_tower

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizer.model"
NUM_TOKENS = 200
NEW_TOKENS = 48
CLIENTS = (1, 8, 32)
TARGET = {"overhead_share": 0.10}

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 5},
        "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
    },
    "required": ["name", "age", "tags", "next"],
    "additionalProperties": False,
}
SCHEMAS = {"person": PERSON, "any object": {"type": "object"}}
# Never done within a benchmark's tokens.
LONG = {
    "type": "array",
    "minItems": 50,
    "items": {
        "type": "object",
        "properties": {"note": {"type": "string", "minLength": 5}, "size": {"type": "number"}},
        "required": ["note", "size"],
        "additionalProperties": False,
    },
}

# A mask of the next tokens, and how to append one; False where the answer has ended.
Matcher = tuple[Callable[[], np.ndarray], Callable[[int], bool]]


def main() -> None:
    """Measure everything in one run, print and keep it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--weights", type=Path, default=Path("runs/cache/engine"), help="where models are kept")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    language_model = make_language_model(options.weights, num_layers=options.layers).path
    tower = make_vision_tower(options.weights, image_size=112).path
    result = {
        "masks": measure_masks(language_model),
        "engine": asyncio.run(measure_engine(language_model, tower, options.rounds, options.clients)),
    }
    keep_result(
        {
            **result,
            "overhead_share": max(one["overhead_share"] for one in result["engine"].values()),
            "targets": TARGET,
            "processor": describe_processor(),
            "command": " ".join(sys.argv),
            "load": round(os.getloadavg()[0], 1),
        },
        options.output,
    )


def measure_masks(language_model: Path) -> dict[str, Any]:
    """Return the time of compilation and of a mask, by library, vocabulary and schema."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.model").write_bytes(GOLDEN.read_bytes())
        tokenizers = {"smollm2": AutoTokenizer.from_pretrained(language_model)}
        tokenizers["llama"] = LlamaTokenizerFast.from_pretrained(folder)
    found: dict[str, Any] = {}
    for name, tokenizer in tokenizers.items():
        for library, make in {"llguidance": with_llguidance, "xgrammar": with_xgrammar}.items():
            try:
                begun = time.perf_counter()
                compiler = make(tokenizer)
                tables = time.perf_counter() - begun
            except ImportError:
                continue
            for title, schema in SCHEMAS.items():
                found[f"{library}, {name} ({len(tokenizer):,}), {title}"] = {
                    "tables_seconds": round(tables, 2),
                    **time_masks(lambda compiler=compiler, schema=schema: compiler(schema), len(tokenizer)),
                }
    return found


def time_masks(compile_schema: Callable[[], Matcher], size: int) -> dict[str, float]:
    """Draw random answers; return the times of the first compilation and of masks."""
    draw, seconds, begun = np.random.default_rng(0), [], time.perf_counter()
    mask, append = compile_schema()
    compiled = time.perf_counter() - begun
    for _ in range(NUM_TOKENS):
        start = time.perf_counter()
        bits = mask()
        seconds.append(time.perf_counter() - start)
        allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little")[:size])
        if not append(int(draw.choice(allowed))):
            mask, append = compile_schema()
    return {
        "compile_ms": round(1000 * compiled, 2),
        "mean_us": round(1e6 * statistics.mean(seconds), 1),
        "median_us": round(1e6 * statistics.median(seconds), 1),
        "p99_us": round(1e6 * float(np.percentile(seconds, 99)), 1),
    }


def with_llguidance(tokenizer: Any) -> Callable[[Any], Matcher]:
    """Return a compiler of schemas as the engine has it."""
    compiler = GrammarCompiler(tokenizer, [tokenizer.eos_token_id])
    compiler.tables()

    def compile_schema(schema: Any) -> Matcher:
        matcher = compiler.matcher(compiler.grammar(Constraint("json", json.dumps(schema), "schema")))

        def append(token: int) -> bool:
            return token != tokenizer.eos_token_id and matcher.consume_token(token) and not matcher.is_stopped()

        return lambda: np.frombuffer(matcher.compute_bitmask(), np.uint8), append

    return compile_schema


def with_xgrammar(tokenizer: Any) -> Callable[[Any], Matcher]:
    """Return a compiler of schemas with xgrammar's defaults. Raises ImportError without it."""
    import xgrammar

    known = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=len(tokenizer))
    compiler = xgrammar.GrammarCompiler(known, max_threads=1)

    def compile_schema(schema: Any) -> Matcher:
        matcher = xgrammar.GrammarMatcher(compiler.compile_json_schema(json.dumps(schema)))
        words = xgrammar.allocate_token_bitmask(1, len(tokenizer))

        def mask() -> np.ndarray:
            matcher.fill_next_token_bitmask(words)
            return words.numpy().view(np.uint8)[0]

        return mask, lambda token: matcher.accept_token(token) and not matcher.is_terminated()

    return compile_schema


async def measure_engine(language_model: Path, tower: Path, rounds: int, numbers: Sequence[int]) -> dict[str, Any]:
    """Return tokens a second with and without a schema, measured in turns, by the number of clients."""
    parts = load_pretrained_model(language_model, vision_tower=tower, version="chat_template", dtype=torch.bfloat16)
    engine = BuiltinEngine(lambda: parts)
    await engine.start()
    await run_clients(engine, 2, constrained=True)
    await run_clients(engine, 2, constrained=False)
    found = {}
    for clients in numbers:
        rates: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(rounds):
            for constrained in (False, True):
                rates[constrained].append(await run_clients(engine, clients, constrained=constrained))
        free, held = statistics.median(rates[False]), statistics.median(rates[True])
        found[str(clients)] = {
            "tokens_per_second": round(free, 1),
            "constrained_tokens_per_second": round(held, 1),
            # Of neighbouring rounds, since the machine's speed changes.
            "overhead_share": round(
                statistics.median(one / other for one, other in zip(rates[False], rates[True], strict=True)) - 1, 3
            ),
            "all": {str(key): [round(rate, 1) for rate in value] for key, value in rates.items()},
        }
    await engine.stop()
    return found


async def run_clients(engine: BuiltinEngine, clients: int, *, constrained: bool) -> float:
    """Answer one question of each client at once; return tokens a second."""
    constraint = Constraint("json", json.dumps(LONG), "schema") if constrained else None

    async def one(number: int) -> int:
        turns = (Turn("human", f"Describe {number} things as JSON, at length."),)
        sampling = Sampling(max_tokens=NEW_TOKENS, ignore_eos=True, constraint=constraint)
        request = GenerationRequest(f"{number}-{constrained}", turns, sampling=sampling)
        return sum([len(chunk.token_ids) async for chunk in engine.generate(request)])

    start = time.perf_counter()
    num_tokens = sum(await asyncio.gather(*map(one, range(clients))))
    return num_tokens / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
