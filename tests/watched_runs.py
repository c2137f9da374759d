"""Runs of the fine-tuning command as tests watch them from outside: what is committed, and the ledger."""

import json
from pathlib import Path

from llava_ray.train.runs import SNAPSHOT, SNAPSHOT_COPY


def committed(recipe: Path, name: str) -> int:
    """Return the step of the run's committed checkpoint."""
    for file in (SNAPSHOT, SNAPSHOT_COPY):  # Ray rewrites its own in place: a kill, or a look just then, finds it torn
        try:
            snapshot = json.loads((recipe.parent / "runs" / name / file).read_text())
            return max(int(row["checkpoint_dir_name"].removeprefix("step-")) for row in snapshot["checkpoint_results"])
        except (OSError, ValueError):
            continue
    return 0


def ledger(recipe: Path, name: str) -> bytes:
    """Return the run's ledger."""
    return (recipe.parent / "runs" / name / "ledger.jsonl").read_bytes()
