#!/usr/bin/env python
"""Training steps of a LLaVA-1.5 7B's shapes on one GPU, with random weights: LoRA, and the projector alone.

python tests/benchmarks/bench_gpu.py --output tests/benchmarks/results/gpu.json

Each row of 16,384 tokens holds samples as LLaVA's mix has them, of 576 image positions and a few hundred tokens; the
image features are given, as a cache gives them. Reported are tokens a second, MFU of useful operations, and the peak of
memory, with attention by sample and with a mask. On a machine without a GPU ``--tiny`` runs the same steps of a model
with two layers on short rows, which says that it works, and nothing about speed.
"""

import argparse
import importlib.util
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from outcome import keep_result
from transformers import AutoModelForCausalLM, LlamaConfig

from llava_ray.chat.conversation import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_ray.config.lora import LoraConfig
from llava_ray.model.lora.adapters import add_adapter
from llava_ray.model.network.kernels import use_kernels
from llava_ray.model.network.llava import Llava
from llava_ray.model.network.projector import build_projector
from llava_ray.objectives.cross_entropy import CrossEntropy
from llava_ray.objectives.objective import PackedRow
from llava_ray.train.flops import StepWork, UsefulFlops
from llava_ray.train.planning.peaks import find_peak

IMAGE_POSITIONS = 576
LENGTHS = (860, 1240, 730, 2048, 910, 1530, 1100, 680, 990, 1370, 820, 1750, 1060, 1296)  # 16,384 together
SHAPES = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
VOCABULARY, TINY_VOCABULARY = 32_000, 1_000
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def build(kind: str, *, tiny: bool, device: torch.device, by_sample: bool) -> Llava:
    """Build the model with random weights on the device; ``kind`` is "lora" or "projector"."""
    config = LlamaConfig(
        vocab_size=TINY_VOCABULARY if tiny else VOCABULARY, max_position_embeddings=4096, **(TINY if tiny else SHAPES)
    )
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        projector = build_projector("mlp2x_gelu", 1024, config.hidden_size).to(torch.bfloat16)
    llava = Llava(projector.to(device), model, 1024).requires_grad_(False)
    if kind == "lora":
        add_adapter(model, LoraConfig(lora_enable=True, lora_r=128, lora_alpha=256, lora_dropout=0.0), seed=0)
        llava.to(device)
    llava.projector.requires_grad_(True)
    use_kernels(model, "auto", device)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if by_sample:
        llava.attend_by_sample()
    return llava.train()


def make_row(lengths: Sequence[int], image_positions: int, vocabulary: int, device: torch.device) -> PackedRow:
    """Return a row of samples, each with an image, half of its text supervised."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (1, sum(lengths)), generator=generator)
    labels, start = torch.full_like(ids, IGNORE_INDEX), 0
    for length in lengths:
        ids[0, start + 35 : start + 35 + image_positions] = IMAGE_TOKEN_INDEX
        answer = slice(start + (35 + image_positions + length) // 2, start + length)
        labels[0, answer] = ids[0, answer]
        start += length
    labels[ids == IMAGE_TOKEN_INDEX] = IGNORE_INDEX
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    features = torch.randn(len(lengths), image_positions, 1024, generator=generator).to(device, torch.bfloat16)
    return PackedRow.on_device(ids, positions, labels, device, features=features)


def time_steps(kind: str, *, tiny: bool, device: torch.device, by_sample: bool, num_steps: int) -> dict[str, Any]:
    """Return the speed, the share of the device's peak and the memory of training steps of one row."""
    lengths = [length // 4 for length in LENGTHS[:4]] if tiny else LENGTHS
    image_positions = IMAGE_POSITIONS // 8 if tiny else IMAGE_POSITIONS
    llava = build(kind, tiny=tiny, device=device, by_sample=by_sample)
    row = make_row(lengths, image_positions, TINY_VOCABULARY if tiny else VOCABULARY, device)
    learns = [parameter for parameter in llava.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learns, lr=1e-4, fused=device.type == "cuda")
    num_supervised = len(row.find_supervised()[1])
    work = StepWork(lengths, num_supervised, num_features=len(lengths) * image_positions)
    flops = UsefulFlops.measure(llava, None).count(work)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(num_steps + 2):
        start = time.perf_counter()
        CrossEntropy().compute(llava, row).loss_sum.div(num_supervised).backward()
        torch.nn.utils.clip_grad_norm_(learns, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[2:])
    peak = find_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return {
        "kind": kind,
        "row": sum(lengths),
        "attention": "by sample" if by_sample else "masked",
        "seconds_a_step": median,
        "tokens_per_second": sum(lengths) / median,
        "useful_tflops": flops / median / 1e12,
        "mfu": flops / median / peak if peak else None,
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
    }


def main() -> None:
    """Time each kind of tuning with both kinds of attention."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    if not given.tiny and not torch.cuda.is_available():
        raise SystemExit("bench_gpu.py needs a CUDA device, and there is none here; --tiny tries its code on the CPU")
    device = torch.device("cpu" if given.tiny else "cuda")
    rows = []
    for kind in ("projector", "lora"):
        for by_sample in (True, False):
            rows.append(time_steps(kind, tiny=given.tiny, device=device, by_sample=by_sample, num_steps=given.steps))
            if device.type == "cuda":
                torch.cuda.empty_cache()
    keep_result(
        {
            "command": " ".join(sys.argv),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor(),
            "torch": torch.__version__,
            "steps": given.steps,
            "liger_kernels": device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None,
            "rows": rows,
        },
        given.output,
    )


if __name__ == "__main__":
    main()
