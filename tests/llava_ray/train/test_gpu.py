"""A first look at a GPU, in under four minutes: attention, runs of each kind, resuming, answers, memory."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import engines
import pytest
import ray
import torch
from fakes import make_language_model
from samples import small_run

from llava_ray.data.preparation import prepare_data
from llava_ray.model.network import sample_attention
from llava_ray.model.network.sample_attention import SampleBorders, attend_samples
from llava_ray.model.summary import summarize_model
from llava_ray.runtime import connected
from llava_ray.train.finished_run import FinishedRun
from llava_ray.train.planning.memory import GIB, estimate_memory
from llava_ray.train.planning.sizing import measure_sizes, run_settings
from llava_ray.train.trainer import finetune, train_until

DEVICE = torch.device("cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none here"),
]

LENGTHS = (130, 7, 61, 1, 57)
LORA = {"lora.lora_enable": True, "lora.lora_r": 4, "lora.lora_alpha": 8}
RUNS: dict[str, dict[str, Any]] = {
    **{f"zero{stage}": {"train.zero_stage": stage} for stage in range(4)},
    "lora": LORA,
    "qlora": LORA | {"lora.bits": 4},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Data, models and runs, and one cluster for all of them."""
    config = small_run(tmp_path_factory.mktemp("gpu")).replaced({"cluster.num_workers": 1})
    with connected(config.cluster):
        yield Path(config.run.storage_path).parent
    assert not ray.is_initialized()


def configure(folder: Path, name: str, **changes: Any) -> Any:
    fixed = {
        "run.name": name,
        "tracking.log_model": False,
        "train.bf16": True,
        "train.max_steps": 6,
        "train.gradient_checkpointing": True,
        "cluster.num_workers": 1,
        "cluster.use_gpu": DEVICE.type == "cuda",
    }
    return small_run(folder, **fixed | changes)


def tune(config: Any) -> FinishedRun:
    with connected(config.cluster) as resources:
        return finetune(config, prepare_data(config.data), resources)


def attended(dtype: torch.dtype, **settings: Any) -> list[torch.Tensor]:
    """A packed row's attention, and the gradients of what it is computed from."""
    generator = torch.Generator().manual_seed(0)
    num_tokens = sum(LENGTHS)
    inputs = [
        torch.randn(1, heads, num_tokens, 64, generator=generator).to(DEVICE, dtype).requires_grad_()
        for heads in (8, 2, 2)
    ]
    module = torch.nn.Module()
    output, _ = attend_samples(module, *inputs, None, borders=SampleBorders.of(LENGTHS, DEVICE), **settings)
    output.float().pow(2).sum().backward()
    return [output.detach(), *(one.grad for one in inputs if one.grad is not None)]


@pytest.mark.parametrize("window", [None, 16])
def test_the_kernel_computes_what_samples_alone_have(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = attended(torch.bfloat16, sliding_window=window)
    monkeypatch.setattr(sample_attention, "fits_kernel", lambda *_: False)
    one_by_one = attended(torch.bfloat16, sliding_window=window)
    for found, expected in zip(at_once, one_by_one, strict=True):
        assert (found - expected).float().norm() <= 1e-2 * expected.float().norm()


def test_the_loop_computes_what_a_mask_does() -> None:
    found = attended(torch.float32)
    owner = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).to(DEVICE)
    mask = (owner[:, None] == owner) & torch.ones(len(owner), len(owner), dtype=torch.bool, device=DEVICE).tril()
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, len(owner), 64, generator=generator).to(DEVICE).requires_grad_() for heads in (8, 2, 2)
    )
    masked = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    masked.transpose(1, 2).pow(2).sum().backward()
    for ours, theirs in zip(found, [masked.transpose(1, 2), query.grad, key.grad, value.grad], strict=True):
        assert theirs is not None
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_the_engine_answers_as_transformers_does(tmp_path: Path) -> None:
    parts = engines.make_parts(tmp_path)
    asked = engines.make_requests(16)
    expected = [engines.by_transformers(parts, one) for one in asked]
    on_device = replace(parts, llava=parts.llava.to(DEVICE), tower=parts.tower.to(DEVICE))
    assert engines.count_differing(engines.answer_all(on_device, asked, prefill_chunk=40), expected) == 0


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_each_kind_learns(name: str, folder: Path) -> None:
    losses = tune(configure(folder, name, **RUNS[name])).read_losses()
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    if name.startswith("zero") and name != "zero0":
        assert losses == pytest.approx(tune(configure(folder, "zero0")).read_losses(), rel=0.02)


def test_a_run_goes_on_where_it_stopped(folder: Path) -> None:
    whole = tune(configure(folder, "whole"))
    config = configure(folder, "halved")
    with connected(config.cluster) as resources:
        assert train_until(config, prepare_data(config.data), resources, until=3) is None
    halved = tune(config)
    assert halved.read_losses() == pytest.approx(whole.read_losses(), rel=1e-3)
    ledgers = [Path(run.folder.path, "ledger.jsonl").read_bytes() for run in (whole, halved)]
    assert ledgers[0] == ledgers[1]


def test_the_memory_estimate_is_near_the_measured_peak(folder: Path) -> None:
    shape = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16}
    large = make_language_model(folder / "large", num_key_value_heads=16, vocab_size=32_000, **shape)
    rows = {"train.tokens_per_micro_batch": 4096, "train.global_batch_size": 64, "train.max_steps": 2}
    config = configure(folder, "large", **rows, **{"model.model_name_or_path": str(large)})
    memory = estimate_memory(measure_sizes(summarize_model(config)), run_settings(config))
    measured = tune(config).metrics["memory_gib"]
    estimated = (memory.total - memory.reserved) / GIB  # what torch's allocator does not count
    assert estimated == pytest.approx(measured, rel=0.15)
