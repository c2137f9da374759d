#!/usr/bin/env python
"""A step over pairs whose answers share their prompt, beside one that reads prompt and image for each answer by itself.

python tests/benchmarks/bench_preference.py --output tests/benchmarks/results/preference.json

A random Llama of 8 layers, 8 pairs with a prompt of --prompt tokens (576 are an image of LLaVA-1.5) and answers of
--answer tokens, forward and backward of DPO, in turns. Also without a reference in memory: what a live one would add
is a forward pass and its weights.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from outcome import describe_processor, keep_result
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from llava_ray.chat.conversation import IGNORE_INDEX
from llava_ray.config.preference import PreferenceConfig
from llava_ray.data.pair_lengths import PairLengths
from llava_ray.model.network.llava import Llava
from llava_ray.objectives.cross_entropy import compute_row_losses
from llava_ray.objectives.objective import PackedRow
from llava_ray.objectives.preference import PairObjective, PairScores, dpo_losses, sum_by_answer

CPU = torch.device("cpu")
VOCABULARY, NUM_PAIRS = 8_000, 8


def make_model() -> Llava:
    """Return a language model of about 30 million weights, beside a projector that is not used."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    llava = Llava(nn.Linear(4, 512), LlamaForCausalLM(config), 4)
    llava.attend_by_sample()
    return llava


def make_row(prompts: torch.Tensor, answers: torch.Tensor, *, shared: bool) -> PackedRow:
    """Pack pairs into one row, or their sides as conversations one behind the other."""
    ids, labels, positions, branches = [], [], [], []
    length = answers.shape[-1]
    quiet = torch.full_like(prompts[0], IGNORE_INDEX)
    for prompt, (chosen, rejected) in zip(prompts, answers, strict=True):
        if shared:
            lengths = PairLengths(len(prompt) - 1, length + 1, length + 1)
            ids += [prompt, chosen, prompt[-1:], rejected]
            labels += [quiet, chosen, quiet[-1:], rejected]
            positions.append(torch.from_numpy(lengths.position_ids))
            branches.append((lengths.shared, lengths.shared + lengths.chosen))
        else:
            for answer in (chosen, rejected):
                ids += [prompt, answer]
                labels += [quiet, answer]
                positions.append(torch.arange(len(prompt) + length))
    row = (torch.cat(parts)[None] for parts in (ids, positions, labels))
    reference = torch.zeros(len(prompts), 2) if shared else None
    return PackedRow.on_device(*row, CPU, branches=branches, reference=reference)


def step_shared(llava: Llava, row: PackedRow) -> float:
    """Take a step's gradients as training does."""
    output = PairObjective("dpo", PreferenceConfig()).compute(llava, row)
    loss = output.loss_sum / NUM_PAIRS
    loss.backward()
    return loss.item()


def step_apart(llava: Llava, row: PackedRow) -> float:
    """Take the same gradients from sides that stand by themselves."""
    _, losses = compute_row_losses(llava, row)
    log_probs = -losses.view(NUM_PAIRS, 2, -1).sum(-1)
    counts = torch.full((NUM_PAIRS, 2), losses.numel() / NUM_PAIRS / 2)
    loss = dpo_losses(PairScores(log_probs, counts, torch.zeros(NUM_PAIRS, 2)), PreferenceConfig()).mean()
    loss.backward()
    return loss.item()


def main() -> None:
    """Measure in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=640)
    parser.add_argument("--answer", type=int, default=64)
    options = parser.parse_args()
    llava = make_model()
    draw = torch.Generator().manual_seed(1)
    prompts = torch.randint(1, VOCABULARY, (NUM_PAIRS, options.prompt), generator=draw)
    answers = torch.randint(1, VOCABULARY, (NUM_PAIRS, 2, options.answer), generator=draw)
    rows = {"shared": make_row(prompts, answers, shared=True), "apart": make_row(prompts, answers, shared=False)}

    def reference(model: Llava, row: PackedRow) -> float:
        with torch.no_grad():
            return float(sum_by_answer(compute_row_losses(model, row)[1], row.pairs).sum())

    steps: dict[str, Callable[[], float]] = {
        "shared": lambda: step_shared(llava, rows["shared"]),
        "apart": lambda: step_apart(llava, rows["apart"]),
        "live reference": lambda: reference(llava, rows["shared"]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, float] = {}
    for turn in range(options.rounds + 1):
        for name, step in steps.items():
            llava.zero_grad()
            start = time.perf_counter()
            losses[name] = step()
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    result: dict[str, Any] = {
        "seconds": seconds,
        "median_seconds": medians,
        "apart_over_shared": medians["apart"] / medians["shared"],
        "live_reference_share": medians["live reference"] / medians["shared"],
        "tokens": {name: row.input_ids.shape[1] for name, row in rows.items()},
        "loss_difference": abs(losses["shared"] - losses["apart"]),
        "pairs": NUM_PAIRS,
        "prompt_tokens": options.prompt,
        "answer_tokens": options.answer,
        "command": " ".join(["python", *sys.argv]),
        "processor": describe_processor(),
    }
    keep_result(result, options.output)


if __name__ == "__main__":
    main()
