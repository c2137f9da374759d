"""The KV cache gets what was set, or a share of what is free, and says so."""

import logging

import pytest
import torch

from llava_ray.errors import ModelError
from llava_ray.free_memory import FreeMemory
from llava_ray.generate.builtin.kv_memory import KvMemory, choose_kv_memory
from llava_ray.generate.settings import EngineSettings

GIB = 2**30
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def choose(
    *,
    free: float | None = 8,
    device: torch.device = CPU,
    token_bytes: int = 2**19,
    wanted_len: int = 4096,
    **settings: object,
) -> KvMemory:
    found = None if free is None else FreeMemory(int(free * GIB), "of this machine")
    made = EngineSettings(**settings)  # type: ignore[arg-type]
    return choose_kv_memory(made, token_bytes=token_bytes, wanted_len=wanted_len, device=device, free=found)


def test_by_default_it_is_a_share_of_what_is_free() -> None:
    assert choose().num_bytes == 2 * GIB
    assert choose().capacity == 4096
    assert choose(device=CUDA, free=60).num_bytes == 48 * GIB
    assert choose(device=CUDA, free=60).capacity == 48 * 2048
    assert "25 % of the 8.00 GiB free of this machine" in choose().reason
    assert choose(memory_share=0.5).num_bytes == 4 * GIB
    assert choose(free=None).num_bytes == 2 * GIB


def test_what_is_set_counts() -> None:
    assert choose(kv_cache_bytes=GIB).capacity == 2048
    assert choose(kv_cache_bytes=GIB, kv_cache_tokens=300).capacity == 300
    assert choose(kv_cache_bytes=GIB, free=0.1).num_bytes == GIB


def test_a_small_model_takes_no_more_than_its_requests_can_use() -> None:
    found = choose(token_bytes=64, wanted_len=2048, max_running=8)
    assert found.capacity == 2 * 8 * 2048  # as much again for known text
    assert "all that 8 requests can use" in found.reason
    assert choose(token_bytes=64, wanted_len=2048, max_running=8, prefix_cache_share=0.0).capacity == 8 * 2048


def test_too_little_is_said_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert choose().limit_reason == ""
    assert "2.00 GiB for 4,096 tokens" in caplog.text
    assert "one request of 4,096 tokens takes 100.0 % of it" in caplog.text
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    small = choose(free=1, wanted_len=8192)
    assert (small.capacity, small.max_model_len) == (512, 512)
    assert small.limit_reason == " (its KV cache has 512 tokens, the model 8,192)"
    [warning] = [record for record in caplog.records if record.levelno > logging.INFO]
    assert "8,192 tokens would need 4.00 GiB; requests of more than 512 tokens are refused" in warning.getMessage()
    with pytest.raises(ModelError, match=r"holds 512 tokens .*max_model_len is 1,000, which needs 0.49 GiB"):
        choose(free=1, wanted_len=1000, max_model_len=1000)
    with pytest.raises(ModelError, match="less than one slot"):
        choose(free=0.01)
