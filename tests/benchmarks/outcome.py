"""What a benchmark found: printed, and kept where it is asked for. Importing this sets nothing."""

import json
import os
import platform
from pathlib import Path
from typing import Any


def keep_result(result: dict[str, Any], output: Path | None) -> None:
    """Print a benchmark's result, and write it where it is to be kept."""
    print(json.dumps(result, indent=1))
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")


def describe_processor() -> str:
    """Return the processor's name and the instructions that matter."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), "")
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag}" in text]
    named = f"{name or platform.processor()} ({', '.join(known)})"
    return f"{named}, {os.cpu_count()} CPUs, Python {platform.python_version()}"
