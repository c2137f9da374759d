"""Blocks compiled by torch: equal losses, no compiling for a new length, and no silent no-op."""

import os

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from llava_ray.config.train import TrainConfig
from llava_ray.errors import ConfigError
from llava_ray.model.network.llava import Llava
from llava_ray.model.network.projector import build_projector
from llava_ray.objectives.cross_entropy import CrossEntropy
from llava_ray.objectives.objective import PackedRow
from llava_ray.train.compiling import compile_blocks

ROWS = [(20, 30), (7,), (64, 10, 3), (33, 12), (90,), (5, 5, 5, 5), (101, 3)]


def make_model() -> Llava:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=300, num_hidden_layers=3, **shape))
    llava = Llava(build_projector("mlp2x_gelu", 32, 64), model, 32)
    llava.attend_by_sample()
    return llava.train()


def train(llava: Llava) -> tuple[list[float], list[int]]:
    """Return the losses of a step on each row, and how many graphs have been compiled after it."""
    from torch._dynamo.utils import counters

    optimizer = torch.optim.AdamW(llava.parameters(), lr=1e-3)
    losses, graphs = [], []
    for lengths in ROWS:
        ids = torch.randint(3, 300, (1, sum(lengths)), generator=torch.Generator().manual_seed(sum(lengths)))
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        row = PackedRow.on_device(ids, positions, ids.clone(), torch.device("cpu"))
        loss = CrossEntropy().compute(llava, row).losses.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        graphs.append(counters["stats"]["unique_graphs"])
    return losses, graphs


# The compiler of C++ takes a minute; without it the same graphs are found, differentiated and run.
@pytest.mark.parametrize(
    "backend", [pytest.param("aot_eager", marks=pytest.mark.slow), pytest.param("inductor", marks=pytest.mark.verify)]
)
def test_a_compiled_model_has_the_same_losses_and_no_length_is_compiled_anew(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # as in a worker
    torch._dynamo.reset()
    plain, none = train(make_model())
    llava = make_model()
    assert compile_blocks(llava.language_model, backend) == 3
    assert "TORCHDYNAMO_DISABLE" not in os.environ
    compiled, graphs = train(llava)
    assert compiled == pytest.approx(plain, abs=1e-5)
    assert graphs[0] > none[-1], "something is compiled"
    assert graphs[1:] == graphs[:1] * (len(ROWS) - 1), "once, for all lengths"


def test_nothing_is_compiled_without_a_word() -> None:
    assert TrainConfig.parsed({"torch_compile": True, "gradient_checkpointing": False}).torch_compile
    with pytest.raises(ConfigError, match=r"nothing inside a checkpoint; set one of them to false"):
        TrainConfig.parsed({"torch_compile": True})
    with pytest.raises(ConfigError, match=r"zero_stage = 3.*set zero_stage = 2 or torch_compile = false"):
        TrainConfig.parsed({"torch_compile": True, "gradient_checkpointing": False, "zero_stage": 3})
