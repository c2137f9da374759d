"""LLaVA's published figures (its model zoo), by benchmark: what a result of a model of that size stands beside."""

from collections.abc import Mapping

MODELS = ("LLaVA-1.5-7B", "LLaVA-1.5-13B", "LLaVA-1.5-7B-LoRA", "LLaVA-1.6-Vicuna-7B")

# In the order of MODELS. MME: perception. SEED-Bench of 1.6: images only. MMBench: dev, circular.
_TABLE: Mapping[str, tuple[float, ...]] = {
    "vqav2": (78.5, 80.0, 79.1, 81.8),
    "gqa": (62.0, 63.3, 63.0, 64.2),
    "vizwiz": (50.0, 53.6, 47.8, 57.6),
    "science_qa": (66.8, 71.6, 68.4, 70.1),
    "textvqa": (58.2, 61.3, 58.2, 64.9),
    "pope": (85.9, 85.9, 86.4, 86.5),
    "mme": (1510.7, 1531.3, 1476.9, 1519.0),
    "mmbench": (64.3, 67.7, 66.1, 67.4),
    "mmbench_cn": (58.3, 63.6, 58.9, 60.6),
    "seed_bench": (58.6, 61.6, 60.1, 70.2),
    "llava_bench": (65.4, 72.5, 67.9, 81.6),
    "mm_vet": (31.1, 36.1, 30.2, 43.9),
}


def published_figures(benchmark: str) -> dict[str, float]:
    """Return the figures of a benchmark by model; empty where none were published."""
    return dict(zip(MODELS, _TABLE.get(benchmark, ()), strict=False))
