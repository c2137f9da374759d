"""The original's tiny checkpoints in tests/golden, as folders that lack nothing."""

import shutil
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"


def copy_golden(name: str, folder: Path) -> Path:
    """Copy a checkpoint with its tower and images, and the tokenizer that they share beside the language model."""
    shutil.copytree(GOLDEN / name, folder)
    shutil.copy(GOLDEN / "tokenizer.model", folder / "base" if name == "lora" else folder)
    return folder
