"""Random steps of sampled answers, and TRL's loss and gradients of them, which the golden file holds.

Run in an environment with TRL to write the file again: python tests/grpo_vectors.py
"""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "golden/grpo_trl.json"
NUM_STEPS, NUM_PROMPTS, VOCABULARY, LONGEST = 50, 3, 7, 6


def make_step(number: int) -> dict[str, Any]:
    """Return step ``number``: settings, and answers of different lengths with logits and probabilities."""
    rng = np.random.default_rng([22, number])
    group_size = int(rng.integers(2, 5))
    num = NUM_PROMPTS * group_size
    rewards = rng.integers(0, 3, (NUM_PROMPTS, group_size)) / 2.0
    rewards[0] = 1.0  # a group without spread
    return {
        "loss_type": ("grpo", "dapo", "dr_grpo")[number % 3],
        "scale_rewards": ("group", "none")[number % 2],
        "epsilon": float(rng.uniform(0.05, 0.3)),
        "epsilon_high": float(rng.uniform(0.05, 0.4)),
        "beta": (0.0, 0.04, 0.5)[number // 3 % 3],
        "temperature": (1.0, 0.7, 1.3)[number // 9 % 3],
        "group_size": group_size,
        "rewards": rewards,
        "lengths": rng.integers(1, LONGEST + 1, num),
        "logits": rng.standard_normal((num, LONGEST, VOCABULARY)) * 2,
        "targets": rng.integers(0, VOCABULARY, (num, LONGEST)),
        "old_gap": rng.normal(0, 0.3, (num, LONGEST)),
        "reference_gap": rng.normal(0, 0.5, (num, LONGEST)),
    }


def compute_by_trl(step: dict[str, Any]) -> dict[str, Any]:
    """Compute a step's loss, its gradient in the answers' log-probabilities, and the metrics, by TRL, in float64."""
    import torch
    from trl import GRPOTrainer

    logits, targets = torch.from_numpy(step["logits"]), torch.from_numpy(step["targets"])
    logps = (logits / step["temperature"]).log_softmax(-1).gather(-1, targets[..., None])[..., 0].requires_grad_()
    rewards = torch.from_numpy(step["rewards"])
    advantages = rewards - rewards.mean(1, keepdim=True)
    if step["scale_rewards"] == "group":
        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-4)
    mask = (torch.arange(LONGEST) < torch.from_numpy(step["lengths"])[:, None]).long()
    metrics: dict[str, list[float]] = defaultdict(list)
    same = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1)
    arguments = SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logps, torch.zeros_like(logps), None),
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level="token",
        beta=step["beta"], epsilon_low=step["epsilon"], epsilon_high=step["epsilon_high"], args=arguments,
        loss_type=step["loss_type"], use_vllm=False, vllm_importance_sampling_correction=False,
        model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1, accelerator=same,
        max_completion_length=LONGEST, _entropy_bonus_enabled=False, aux_loss_enabled=False,
        _metrics={"train": metrics},
    )  # fmt: skip
    inputs = {
        "prompt_ids": torch.zeros(len(targets), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(targets), 1, dtype=torch.long),
        "completion_ids": targets,
        "completion_mask": mask,
        "advantages": advantages.flatten(),
        "old_per_token_logps": logps.detach() + torch.from_numpy(step["old_gap"]),
        "ref_per_token_logps": logps.detach() + torch.from_numpy(step["reference_gap"]),
        "num_items_in_batch": mask.sum(),
    }
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    assert logps.grad is not None
    named = {"kl": "kl", "clip_ratio/low_mean": "clipped_low_share", "clip_ratio/high_mean": "clipped_high_share"}
    return {
        "loss": loss.item(),
        "gradient": [row[:length].tolist() for row, length in zip(logps.grad, step["lengths"], strict=True)],
        "metrics": {ours: metrics[theirs][0] for theirs, ours in named.items() if metrics[theirs]},
    }


if __name__ == "__main__":
    rows = [compute_by_trl(make_step(number)) for number in range(NUM_STEPS)]
    GOLDEN.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
