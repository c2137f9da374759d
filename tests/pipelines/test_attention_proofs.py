"""The quickstart's three stages lose the same with attention by sample as with a mask over whole rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from watched_runs import ledger

from llava_ray.quickstart import easy_vqa

pytestmark = pytest.mark.verify

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "runs/quickstart"
RESULT = ROOT / "tests/benchmarks/results/attention_losses.json"
NUM_STEPS = 8
CLOSE = 1e-5  # of a loss, which begins at 18.6


def train(folder: Path, stage: str, attention: str) -> tuple[list[float], bytes]:
    """Train the first steps of a stage in fp32; return their losses and the ledger."""
    recipe, name = folder / "recipe.toml", f"{stage}-{attention}"
    command = [sys.executable, "pipelines/finetune.py", f"pipelines/recipes/quickstart/{stage}.toml"]
    command += ["--run.storage_path", str(folder / "runs"), "--run.name", name, "--train.max_steps", str(NUM_STEPS)]
    command += ["--model.attn_implementation", attention, "--tracking.log_model", "false"]
    if stage != "words":
        command += ["--data.image_folder", str(easy_vqa.image_folder("train"))]
    if stage == "tune":
        aligned = max(QUICKSTART.glob("align-*/model"), key=lambda folder: folder.stat().st_mtime)
        command += ["--model.pretrain_mm_mlp_adapter", str(aligned)]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines], ledger(recipe, name)


@pytest.mark.skipif(not (QUICKSTART / "words").exists(), reason="needs runs/quickstart: make quickstart")
def test_first_losses_and_the_ledger_are_those_of_masked_attention(tmp_path: Path) -> None:
    found = {}
    for stage in ("words", "align", "tune"):
        (by_sample, one), (masked, other) = (train(tmp_path, stage, how) for how in ("sdpa", "masked_sdpa"))
        assert one == other
        assert by_sample == pytest.approx(masked, rel=CLOSE, abs=0)
        assert len(by_sample) == NUM_STEPS
        found[stage] = {"by_sample": by_sample, "masked": masked}
    sys.path.append(str(RESULT.parents[1]))
    from outcome import describe_processor, keep_result  # of tests/benchmarks

    command = "pytest -m verify tests/pipelines/test_attention_proofs.py"
    keep_result({"command": command, "processor": describe_processor(), "losses": found}, RESULT)
