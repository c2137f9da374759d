"""What a benchmark found: printed, and kept where it is asked for. Importing this sets nothing."""

import json
from pathlib import Path
from typing import Any


def keep_result(result: dict[str, Any], output: Path | None) -> None:
    """Print a benchmark's result, and write it where it is to be kept."""
    print(json.dumps(result, indent=1))
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")
