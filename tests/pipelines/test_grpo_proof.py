"""A model whose training was stopped early learns from rewards of its own answers: held out, at least three points."""

import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from evals.statistics import paired_difference
from llava_ray.config.sections import ClusterConfig
from llava_ray.generate.answers import answer_questions
from llava_ray.generate.questions import ModelQuestion
from llava_ray.quickstart import easy_vqa
from llava_ray.runtime import connected
from llava_ray.train.step_file import read_rows

pytestmark = [pytest.mark.ray, pytest.mark.verify, pytest.mark.timeout(3600)]

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "runs/quickstart"
RESULT = ROOT / "tests/benchmarks/results/grpo_proof.json"
EARLY_STEPS = 60  # of the alignment's 300; no tuning
NUM_CONVERSATIONS = 400  # of three questions each, about images that no stage has seen
LEAST_GAIN = 3.0


def tune(folder: Path, recipe: str, name: str, *flags: str) -> Path:
    """Run a recipe of the quickstart in this folder; return the run's."""
    command = [sys.executable, "pipelines/finetune.py", f"pipelines/recipes/quickstart/{recipe}.toml"]
    command += ["--run.storage_path", str(folder / "runs"), "--run.name", name, "--tracking.log_model", "false"]
    command += ["--data.cache_dir", str(folder / "cache"), "--data.image_folder", str(easy_vqa.image_folder("train"))]
    subprocess.run([*command, *flags], check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return folder / "runs" / name


def score(model: Path, conversations: list[tuple[easy_vqa.ShapeQuestion, ...]]) -> list[float]:
    """Return 1 or 0 for each question, greedily answered with the model's own earlier answers before it."""
    asked = [
        ModelQuestion(first.id, first.question, str(first.image), follow_ups=[one.question for one in later])
        for first, *later in conversations
    ]
    given = answer_questions(model, asked, max_new_tokens=8, batch_size=50)
    return [
        float(easy_vqa.normalize_answer(text) == question.answer)
        for conversation, answered in zip(conversations, given, strict=True)
        for question, text in zip(conversation, (answered.answer, *answered.later_answers), strict=True)
    ]


@pytest.mark.skipif(not (QUICKSTART / "words").exists(), reason="needs runs/quickstart: make quickstart")
def test_a_model_that_was_stopped_early_gains_three_points_from_rewards(tmp_path: Path) -> None:
    start = time.monotonic()
    early = tune(tmp_path, "align", "early", "--train.max_steps", str(EARLY_STEPS))
    trained = time.monotonic()
    rewarded = tune(tmp_path, "grpo", "rewarded", "--model.model_name_or_path", str(early / "model"))
    learnt = time.monotonic()
    conversations = easy_vqa.test_conversations(NUM_CONVERSATIONS, seed=0)
    with connected(ClusterConfig(num_workers=1), storage_path=str(tmp_path / "runs")):
        before, after = (score(run / "model", conversations) for run in (early, rewarded))
    images = [question.image.name for conversation in conversations for question in conversation]
    gain = paired_difference([100 * one for one in after], [100 * one for one in before], images)
    steps = list(read_rows(str(rewarded / "metrics.jsonl")))
    kinds = [question.kind for conversation in conversations for question in conversation]
    found: dict[str, Any] = {
        "accuracy_before": sum(before) / len(before),
        "accuracy_after": sum(after) / len(after),
        "gain_points": gain.value,
        "gain_95": [gain.low, gain.high],
        "num_questions": len(before),
        "num_images": gain.num_clusters,
        "by_kind": {
            kind: [
                sum(one for one, this in zip(scores, kinds, strict=True) if this == kind) / kinds.count(kind)
                for scores in (before, after)
            ]
            for kind in sorted(set(kinds))
        },
        "reward_first_5_steps": sum(row["reward"] for row in steps[:5]) / 5,
        "reward_last_5_steps": sum(row["reward"] for row in steps[-5:]) / 5,
        "most_policy_gap": max(row["policy_gap"] for row in steps),
        "num_steps": len(steps),
        "seconds": {
            "alignment": round(trained - start),
            "grpo": round(learnt - trained),
            "evaluation": round(time.monotonic() - learnt),
        },
    }
    sys.path.append(str(RESULT.parents[1]))
    from outcome import describe_processor, keep_result  # of tests/benchmarks

    command = "pytest -m verify tests/pipelines/test_grpo_proof.py"
    keep_result({"command": command, "processor": describe_processor()} | found, RESULT)
    assert 0.70 <= found["accuracy_before"] <= 0.85
    assert gain.value >= LEAST_GAIN
    assert gain.low > 0
    assert math.isfinite(found["most_policy_gap"])
    assert found["most_policy_gap"] < 1e-3
