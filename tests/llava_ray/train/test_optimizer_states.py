"""The optimiser's state: of before it was fused, and gradients that are added up in fp32."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from llava_ray.config.train import TrainConfig
from llava_ray.train.zero import zero_config


def make_optimizer(values: list[torch.Tensor], **how: Any) -> torch.optim.AdamW:
    groups = [{"params": values[:1], "weight_decay": 0.1}, {"params": values[1:], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2, **how)


def take_steps(optimizer: torch.optim.AdamW, values: list[torch.Tensor], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for value in values:
            value.grad = torch.randn(value.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"foreach": False}])
@pytest.mark.parametrize("before_fused_existed", [False, True])
def test_a_checkpoint_of_before_the_optimizer_was_fused_goes_on(
    how: dict[str, bool], before_fused_existed: bool
) -> None:
    start = [torch.randn(8, 4, generator=torch.Generator().manual_seed(1)), torch.zeros(5)]
    undisturbed = [value.clone() for value in start]
    plain = make_optimizer(undisturbed, **how)
    take_steps(plain, undisturbed, range(3))
    saved, weights = copy.deepcopy(plain.state_dict()), [value.clone() for value in undisturbed]
    if before_fused_existed:
        for group in saved["param_groups"]:
            del group["fused"]
    take_steps(plain, undisturbed, range(3, 6))
    resumed = make_optimizer(weights, fused=True)
    resumed.load_state_dict(saved)
    take_steps(resumed, weights, range(3, 6))
    assert [float(state["step"]) for state in resumed.state.values()] == [6.0, 6.0]
    assert [group["weight_decay"] for group in resumed.param_groups] == [0.1, 0.0]
    for found, expected in zip(weights, undisturbed, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def summed(train: TrainConfig, *, gpu: bool) -> object:
    return zero_config(train, gpu=gpu)["data_types"]["grad_accum_dtype"]


def test_bf16_gradients_are_added_up_in_fp32_on_gpus() -> None:
    for stage in (2, 3):
        train = TrainConfig.parsed({"zero_stage": stage, "bf16": True})
        assert (summed(train, gpu=True), summed(train, gpu=False)) == ("fp32", None)
        assert summed(TrainConfig.parsed({"zero_stage": stage, "bf16": False}), gpu=True) is None


@pytest.mark.slow
def test_what_bf16_would_lose_is_in_deepspeeds_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient of 1 and 64 of 2^-9: added up in bf16, each of the small ones is lost."""
    monkeypatch.setenv("DS_ACCELERATOR", os.environ.get("DS_ACCELERATOR", "cpu"))
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    from llava_ray.train.deepspeed_import import import_deepspeed

    deepspeed = import_deepspeed()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend="gloo")
    sums = [sum_gradients(deepspeed, stage, gpu=gpu) for stage in (2, 3) for gpu in (True, False)]
    dist.destroy_process_group()
    assert sums == [pytest.approx(total, rel=1e-3) for total in (1.125, 1.0, 1.125, 1.0)]


def sum_gradients(deepspeed: Any, stage: int, *, gpu: bool) -> float:
    """Return each weight's gradient after rows of very different sizes, with a GPU's settings or a CPU's."""
    train = TrainConfig.parsed({"zero_stage": stage, "bf16": True, "max_grad_norm": 0.0})
    model = torch.nn.Linear(4, 1, bias=False).to(torch.bfloat16)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.0),
        config=zero_config(train, gpu=gpu),
        dist_init_required=False,
    )
    for size in [1.0, *[2.0**-9] * 64]:
        engine.backward(engine(torch.full((1, 4), size, dtype=torch.bfloat16)).sum(), scale_wrt_gas=False)
    engine.step()
    return float(engine.get_global_grad_norm()) / 2
