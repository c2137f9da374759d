"""The forms of weights in memory that each engine has."""

from llava_ray.generate.settings import BUILTIN_QUANTIZATIONS, VLLM_QUANTIZATIONS

_OF_ENGINE = {"builtin": BUILTIN_QUANTIZATIONS, "vllm": VLLM_QUANTIZATIONS}


def check_quantization(engine: str, quantization: str | None, *, on_gpu: bool) -> None:
    """Check that an engine of ours has the quantization. Raises ValueError that names the one that has it."""
    known = _OF_ENGINE.get(engine)
    if quantization is None or known is None:  # an engine of someone else's knows its own
        return
    if quantization not in known:
        other = next((name for name, names in _OF_ENGINE.items() if quantization in names), None)
        remedy = f"engine={other} has it; " if other else ""
        raise ValueError(
            f"engine.quantization {quantization[:100]!r} is none of engine={engine}'s ({', '.join(known)}); {remedy}"
            "choose one of these, or leave it out"
        )
    if engine == "builtin" and on_gpu:
        raise ValueError(
            f"engine.quantization {quantization!r} of engine=builtin is for CPUs, and num_gpus is set; leave one of "
            "them out, or use engine=vllm with one of its own"
        )
