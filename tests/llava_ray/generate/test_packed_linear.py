"""Matrices in another layout and precision say the same, and go away again."""

import pytest
import torch
from torch import nn

from llava_ray.generate.builtin import packed_linear
from llava_ray.generate.builtin.packed_linear import (
    NOWHERE,
    PackedLinear,
    can_pack,
    join_linears,
    measure_wide_rows,
    num_packed_bytes,
    pack_linears,
)


def make_model(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64, bias=False)).to(dtype)


pytestmark = pytest.mark.skipif(not can_pack(make_model(torch.bfloat16)[0]), reason="no oneDNN here")


@pytest.mark.parametrize("num_rows", [1, 20, 40])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float32, 1e-5)])
def test_products_are_those_of_the_plain_layer(num_rows: int, bias: bool, dtype: torch.dtype, tolerance: float) -> None:
    plain = nn.Linear(64, 96, bias=bias).to(dtype)
    inputs = torch.randn(1, num_rows, 64).to(dtype)
    with torch.inference_mode():
        packed = PackedLinear(plain, 30)(inputs)
    assert packed.dtype == dtype
    torch.testing.assert_close(packed, plain(inputs), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_is_packed_within_its_memory(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(packed_linear, "measure_wide_rows", lambda layers: 16)
    model = make_model(dtype)
    before = dict(model.named_modules())
    most = sum(num_packed_bytes(layer) for layer in model if isinstance(layer, nn.Linear))
    undo = pack_linears([model], max_bytes=most)
    assert [type(layer) for layer in model] == [PackedLinear, nn.GELU, PackedLinear]
    assert {layer.num_wide_rows for layer in model if isinstance(layer, PackedLinear)} == {16}
    undo()
    assert dict(model.named_modules()) == before
    pack_linears([model], max_bytes=most - 1)
    pack_linears([model.double()], max_bytes=10**9)
    assert dict(model.named_modules()) == before


def test_the_faster_precision_is_measured() -> None:
    rows = measure_wide_rows([nn.Linear(64, 96).bfloat16() for _ in range(3)])
    assert rows in (*packed_linear.TRIED, NOWHERE)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "num_wide_rows"), [(torch.bfloat16, NOWHERE), (torch.float32, 1)])
def test_joined_layers_are_each_of_them(dtype: torch.dtype, num_wide_rows: int, bias: bool) -> None:
    plain = [nn.Linear(64, size, bias=bias).to(dtype) for size in (96, 32, 32)]
    layers = [PackedLinear(layer, num_wide_rows) for layer in plain]
    if layers[0].narrow is None and dtype == torch.bfloat16:
        pytest.skip("this processor has no bfloat16 instructions")
    inputs = torch.randn(1, 5, 64).to(dtype)
    with torch.inference_mode():
        before = [layer(inputs) for layer in layers]
        joined = join_linears(layers)
        assert joined is not None
        assert [layer.narrow is None and layer.wide is None for layer in layers] == [True] * 3
        for found, expected, layer in zip(joined(inputs), before, layers, strict=True):
            torch.testing.assert_close(found, expected)
            torch.testing.assert_close(layer(inputs), expected)


def test_what_is_not_packed_alike_is_not_joined() -> None:
    plain = [nn.Linear(64, 32), nn.Linear(64, 32)]
    assert join_linears(plain) is None
    assert join_linears([PackedLinear(plain[0], 1), plain[1]]) is None
    assert join_linears([PackedLinear(plain[0], 1), PackedLinear(plain[1], NOWHERE)]) is None
    assert join_linears([PackedLinear(plain[0], 1), PackedLinear(nn.Linear(64, 32, bias=False), 1)]) is None
