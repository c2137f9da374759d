"""Fifty random batches of pairs, and TRL's losses, gradients and metrics of them, which the golden file holds.

Run in an environment with TRL to write the file again (``make test-trl``). The model and the batches are made here from
seeds, so that our own tests make the same ones; nothing of llava_ray is imported.
"""

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

GOLDEN = Path(__file__).parent / "golden/preference_trl.json"
NUM_BATCHES, VOCABULARY, NUM_PROJECTIONS = 50, 64, 3

# Name, TRL's loss types, and settings: beta, label smoothing, weight of the cross-entropy of chosen answers, gamma.
VARIANTS: dict[str, tuple[str, list[str], dict[str, float]]] = {
    "dpo": ("dpo", ["sigmoid"], {"beta": 0.1}),
    "dpo with sft": ("dpo", ["sigmoid", "sft"], {"beta": 0.3, "rpo_alpha": 0.5}),
    "ipo": ("ipo", ["ipo"], {"beta": 0.1}),
    "hinge": ("hinge", ["hinge"], {"beta": 0.5}),
    "robust": ("robust", ["robust"], {"beta": 0.1, "label_smoothing": 0.15}),
    "dpo_norm": ("dpo_norm", ["sigmoid_norm"], {"beta": 2.0}),
    "dpo_norm with sft": ("dpo_norm", ["sigmoid_norm", "sft"], {"beta": 5.0, "rpo_alpha": 0.2}),
    "simpo": ("simpo", ["simpo"], {"beta": 2.0, "simpo_gamma": 0.5}),
    "simpo smoothed": ("simpo", ["simpo"], {"beta": 2.5, "simpo_gamma": 1.0, "label_smoothing": 0.1}),
    "orpo": ("orpo", ["orpo"], {"beta": 0.1}),
}


def make_model() -> LlamaForCausalLM:
    """Return a small random model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


def make_batches() -> list[list[tuple[list[int], list[int], list[int]]]]:
    """Return batches of pairs: tokens of the prompt, of the chosen and of the rejected answer."""
    draw = torch.Generator().manual_seed(1)

    def tokens(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=draw))
        return torch.randint(1, VOCABULARY, (length,), generator=draw).tolist()

    return [[(tokens(3, 12), tokens(1, 14), tokens(1, 14)) for _ in range(3)] for _ in range(NUM_BATCHES)]


def make_reference(number: int) -> Tensor:
    """Return log-probabilities (3, 2) of a batch by an imagined reference: of other answers than the policy's own."""
    return -40 * torch.rand(3, 2, generator=torch.Generator().manual_seed(100 + number))


def project_gradients(model: torch.nn.Module) -> list[float]:
    """Return the norm of all gradients, and their products with random directions of unit length."""
    gradients = torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None]).double()
    draw = torch.Generator().manual_seed(2)
    found = [gradients.norm().item()]
    for _ in range(NUM_PROJECTIONS):
        direction = torch.randn(len(gradients), generator=draw, dtype=torch.float64)
        found.append((gradients @ direction / direction.norm()).item())
    return found


def pad(batch: list[tuple[list[int], list[int], list[int]]]) -> dict[str, Tensor]:
    """Return TRL's tensors: all chosen conversations, then all rejected ones, padded on the right."""
    rows = [(prompt, answer) for side in (1, 2) for prompt, *sides in batch for answer in [sides[side - 1]]]
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    shape = (len(rows), longest)
    found = {name: torch.zeros(shape, dtype=torch.long) for name in ("input_ids", "attention_mask", "completion_mask")}
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        found["input_ids"][row, :end] = torch.tensor(prompt + answer)
        found["attention_mask"][row, :end] = 1
        found["completion_mask"][row, len(prompt) : end] = 1
    return found


def make_shell(kind: type, **attributes: Any) -> Any:
    """Return one of TRL's trainers with what its loss reads, and no training around it."""
    shell = object.__new__(kind)
    same = lambda value: value  # noqa: E731
    accelerator = type("Alone", (), {"device": torch.device("cpu"), "gather": staticmethod(same)})()
    accelerator.gather_for_metrics = same
    for name, value in attributes.items():
        setattr(shell, name, value)
    shell.accelerator = accelerator
    return shell


def compute_dpo(model: LlamaForCausalLM, batch: Any, reference: Tensor, types: list[str], settings: Any) -> Any:
    """Return loss and metrics of DPOTrainer, which also differentiates."""
    from trl import DPOTrainer

    shell = make_shell(
        DPOTrainer,
        model=model,
        precompute_ref_logps=True,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=types,
        loss_weights=[1.0, settings.get("rpo_alpha", 0.0)][: len(types)],
        beta=settings["beta"],
        label_smoothing=settings.get("label_smoothing", 0.0),
        use_weighting=False,
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = pad(batch) | {"ref_chosen_logps": reference[:, 0], "ref_rejected_logps": reference[:, 1]}
    loss = shell._compute_loss(model, inputs, return_outputs=False)
    metrics = shell._metrics["train"]
    wanted = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen")
    return loss, [metrics[name][0] for name in (*wanted, "logps/rejected")]


def compute_without_reference(model: LlamaForCausalLM, batch: Any, name: str, settings: Any) -> Any:
    """Return the loss of SimPO (CPOTrainer) or ORPO (ORPOTrainer), with their averages over tokens.

    ORPO's cross-entropy is that of the chosen answers, as in its paper; TRL's is of the prompt too.
    """
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    inputs = pad(batch)
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    means = ORPOTrainer.get_batch_logps(logits, labels.clone(), average_log_prob=True)
    chosen, rejected = means.chunk(2)
    if name == "simpo":
        shell = make_shell(
            CPOTrainer,
            alpha=0.0,
            loss_type="simpo",
            beta=settings["beta"],
            simpo_gamma=settings["simpo_gamma"],
            label_smoothing=settings.get("label_smoothing", 0.0),
        )
        return shell.cpo_loss(chosen, rejected)[0].mean(), []
    losses = make_shell(ORPOTrainer, beta=settings["beta"]).odds_ratio_loss(chosen, rejected)[0]
    half = len(labels) // 2
    crossed = torch.nn.functional.cross_entropy(logits[:half, :-1].flatten(0, 1), labels[:half, 1:].flatten())
    return crossed - losses.mean(), []


def main() -> None:
    """Compute everything and write it."""
    import trl
    from trl.trainer.utils import add_fused_lm_head

    model = make_model()
    found: dict[str, Any] = {}
    for name, (ours, types, settings) in VARIANTS.items():
        rows = []
        for number, batch in enumerate(make_batches()):
            model.zero_grad()
            if ours in ("simpo", "orpo"):
                loss, metrics = compute_without_reference(model, batch, ours, settings)
            else:
                if not hasattr(model, "_fused"):
                    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
                    model._fused = True
                loss, metrics = compute_dpo(model, batch, make_reference(number), types, settings)
            loss.backward()
            rows.append([loss.item(), *project_gradients(model), *metrics])
        found[name] = rows
    assert all(len(set(map(len, rows))) == 1 for rows in found.values())
    assert all(one != other for one, other in pairwise(map(str, found.values())))
    text = json.dumps({"trl": trl.__version__, "torch": torch.__version__, "losses": found})
    GOLDEN.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
