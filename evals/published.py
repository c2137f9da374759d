"""LLaVA's published scores (its model zoo) by benchmark, and the sizes of whole sets.

Scores of a part of the questions, or of another split, are not compared with published ones.
"""

from collections.abc import Mapping

_MODELS = ("LLaVA-1.5-7B", "LLaVA-1.5-13B", "LLaVA-1.5-7B-LoRA", "LLaVA-1.6-Vicuna-7B")

# In the order of MODELS. MME: perception. MMBench: dev, circular. SEED-Bench of 1.6 (70.2) is of images only.
_TABLE: Mapping[str, tuple[float | None, ...]] = {
    "vqav2": (78.5, 80.0, 79.1, 81.8),
    "gqa": (62.0, 63.3, 63.0, 64.2),
    "vizwiz": (50.0, 53.6, 47.8, 57.6),
    "science_qa": (66.8, 71.6, 68.4, 70.1),
    "textvqa": (58.2, 61.3, 58.2, 64.9),
    "pope": (85.9, 85.9, 86.4, 86.5),
    "mme": (1510.7, 1531.3, 1476.9, 1519.0),
    "mmbench": (64.3, 67.7, 66.1, 67.4),
    "mmbench_cn": (58.3, 63.6, 58.9, 60.6),
    "seed_bench": (58.6, 61.6, 60.1, None),
    "llava_bench": (65.4, 72.5, 67.9, 81.6),
    "mm_vet": (31.1, 36.1, 30.2, 43.9),
}

# Rows of the set that is scored here; two where it was released with another number (POPE's first random split had
# 2,910).
WHOLE_SETS: Mapping[str, tuple[int, ...]] = {
    "vqav2": (214_354,),
    "gqa": (12_578,),
    "vizwiz": (4_319,),
    "science_qa": (4_241,),
    "textvqa": (5_000,),
    "pope": (9_000, 8_910),
    "mme": (2_374,),
    "mmbench": (4_377,),
    "mmbench_cn": (4_329,),
    "seed_bench": (19_242,),
    "llava_bench": (60,),
    "mm_vet": (218,),
    "mmmu": (900,),
    "chartqa": (2_500,),
    "docvqa": (5_349,),
    "ai2d": (3_088,),
    "realworldqa": (765,),
    "mmstar": (1_500,),
    "mmmu_pro": (1_730,),
    "mmmu_pro_4": (1_730,),
    "mmmu_pro_vision": (1_730,),
    "mathvista": (1_000,),
    "ocrbench": (1_000,),
    "blink": (1_901,),
    "amber_generative": (1_004,),
    "amber_discriminative": (14_216,),
    "mmhal_bench": (96,),
    "object_halbench": (300,),
}
ELSEWHERE: Mapping[str, str] = {"vqav2": "test-dev2015", "vizwiz": "the test split"}
"""Benchmarks whose published scores only a server can compute, with their split."""


def published_scores(benchmark: str, num_questions: int) -> dict[str, float]:
    """Return the published scores of a benchmark by model; empty if none are of exactly these questions."""
    if benchmark in ELSEWHERE or num_questions not in WHOLE_SETS.get(benchmark, ()):
        return {}
    scores = zip(_MODELS, _TABLE.get(benchmark, ()), strict=False)
    return {model: score for model, score in scores if score is not None}


def whole_set(benchmark: str, num_questions: int) -> int | None:
    """Return the number of questions of the whole set, None if unknown."""
    sizes = WHOLE_SETS.get(benchmark, ())
    return num_questions if num_questions in sizes else max(sizes, default=None)


def format_count(benchmark: str, num: int, num_questions: int) -> str:
    """Format a number of questions with the size of the set: "12 of 12,578"."""
    return f"{num:,} of {whole_set(benchmark, num_questions) or num_questions:,}"


def comparison_note(benchmark: str, num_questions: int) -> str | None:
    """Explain why a result is not compared with published scores, if there are any."""
    if benchmark not in _TABLE or published_scores(benchmark, num_questions):
        return None
    if num_questions not in WHOLE_SETS[benchmark]:
        counts = format_count(benchmark, num_questions, num_questions)
        return f"{counts} questions: LLaVA's scores are of the whole set, and are not compared with this one"
    return f"LLaVA's scores are of {ELSEWHERE[benchmark]}, which only its server can score"
