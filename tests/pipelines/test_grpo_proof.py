"""A model whose training was stopped early learns from rewards of its own answers: held out, at least three points."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from evals.statistics import paired_difference
from llava_ray.config.run import ClusterConfig
from llava_ray.generate.answers import Actors, answer_questions
from llava_ray.generate.questions import ModelQuestion
from llava_ray.quickstart import easy_vqa
from llava_ray.runtime import connected
from llava_ray.train.step_file import read_rows

pytestmark = [pytest.mark.ray, pytest.mark.verify, pytest.mark.timeout(3600)]

ROOT = Path(__file__).resolve().parents[2]
EARLY = ROOT / "runs/quickstart/early/model"
RESULT = ROOT / "tests/benchmarks/results/grpo_proof.json"
NUM_QUESTIONS = 1200  # about images that no stage has seen
LEAST_GAIN = 3.0


def score(model: Path, questions: list[easy_vqa.ShapeQuestion]) -> list[float]:
    """Return 1 or 0 for each question, answered greedily."""
    asked = [ModelQuestion(one.id, one.question, str(one.image)) for one in questions]
    given = answer_questions(model, asked, max_new_tokens=8, batch_size=50, actors=Actors(2, 1.0))
    return [
        float(easy_vqa.normalize_answer(answered.answer) == one.answer)
        for one, answered in zip(questions, given, strict=True)
    ]


@pytest.mark.skipif(not EARLY.exists(), reason="needs runs/quickstart/early/model: make improve")
def test_a_model_that_was_stopped_early_gains_three_points_from_rewards(tmp_path: Path) -> None:
    start = time.monotonic()
    command = [sys.executable, "pipelines/finetune.py", "pipelines/recipes/quickstart/grpo.toml"]
    command += ["--model.model_name_or_path", str(EARLY), "--run.storage_path", str(tmp_path / "runs")]
    command += ["--run.name", "rewarded", "--tracking.log_model", "false", "--data.cache_dir", str(tmp_path / "cache")]
    command += ["--data.image_folder", str(easy_vqa.image_folder("train"))]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    learnt = time.monotonic()
    rewarded = tmp_path / "runs/rewarded"
    questions = easy_vqa.test_questions(NUM_QUESTIONS, seed=0)
    with connected(ClusterConfig(num_workers=1), storage_path=str(tmp_path / "runs")):
        before, after = (score(model, questions) for model in (EARLY, rewarded / "model"))
    images = [question.image.name for question in questions]
    gain = paired_difference([100 * one for one in after], [100 * one for one in before], images)
    steps = list(read_rows(str(rewarded / "metrics.jsonl")))
    found: dict[str, Any] = {
        "accuracy_before": sum(before) / len(before),
        "accuracy_after": sum(after) / len(after),
        "gain_points": gain.value,
        "gain_95": [gain.low, gain.high],
        "num_questions": len(before),
        "num_images": gain.num_clusters,
        "by_kind": {
            kind: [
                sum(one for one, this in zip(scores, questions, strict=True) if this.kind == kind)
                / sum(this.kind == kind for this in questions)
                for scores in (before, after)
            ]
            for kind in sorted({question.kind for question in questions})
        },
        "reward_first_5_steps": sum(row["reward"] for row in steps[:5]) / 5,
        "reward_last_5_steps": sum(row["reward"] for row in steps[-5:]) / 5,
        "most_policy_gap": max(row["policy_gap"] for row in steps),
        "num_steps": len(steps),
        "seconds": {"grpo": round(learnt - start), "evaluation": round(time.monotonic() - learnt)},
    }
    sys.path.append(str(RESULT.parents[1]))
    from outcome import describe_processor, keep_result  # of tests/benchmarks

    words = "pytest -m verify tests/pipelines/test_grpo_proof.py"
    keep_result({"command": words, "processor": describe_processor()} | found, RESULT)
    assert 0.70 <= found["accuracy_before"] <= 0.85
    assert gain.value >= LEAST_GAIN
    assert gain.low > 0
    assert found["most_policy_gap"] < 1e-3
