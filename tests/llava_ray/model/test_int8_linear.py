"""Layers with 8-bit weights: close to the plain ones, the same for a token in any batch, smaller in memory."""

import copy

import pytest
import torch
from torch import Tensor, nn

from llava_ray.errors import ModelError
from llava_ray.model.network import int8_linear
from llava_ray.model.network.int8_linear import Int8Linear, round_weights

KERNELS = [
    pytest.param(True, marks=pytest.mark.skipif(not int8_linear.has_packed_kernel(), reason="no FBGEMM here")),
    False,
]


def make_layers(
    monkeypatch: pytest.MonkeyPatch, packed: bool, *, bias: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[nn.Linear, Int8Linear]:
    monkeypatch.setattr(int8_linear, "has_packed_kernel", lambda: packed)
    torch.manual_seed(0)
    plain = nn.Linear(64, 96, bias=bias).to(dtype)
    return plain, Int8Linear(plain)


def find_distance(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@torch.inference_mode()
@pytest.mark.parametrize("packed", KERNELS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_are_near_those_of_the_plain_layer(
    monkeypatch: pytest.MonkeyPatch, packed: bool, bias: bool, dtype: torch.dtype
) -> None:
    plain, rounded = make_layers(monkeypatch, packed, bias=bias, dtype=dtype)
    inputs = torch.randn(2, 5, 64).to(dtype) * torch.tensor([1e-3, 1, 50, 0, 1e3])[:, None].to(dtype)
    expected, found = plain(inputs), rounded(inputs)
    for place in (1, 2, 4):
        assert find_distance(found[:, place], expected[:, place]) < 0.02
    assert found.dtype == dtype
    assert found.shape == expected.shape
    zeros = torch.zeros(96, dtype=dtype) if plain.bias is None else plain.bias
    assert torch.equal(found[:, 3], zeros.expand(2, 96))
    assert rounded(inputs[:, :0]).shape == (2, 0, 96)


@torch.inference_mode()
@pytest.mark.parametrize("packed", KERNELS)
def test_a_token_has_the_same_result_in_any_batch(monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    _, rounded = make_layers(monkeypatch, packed)
    alone = torch.randn(1, 64)
    beside = torch.cat([1e4 * torch.randn(9, 64), alone, 1e-4 * torch.randn(30, 64)])
    assert torch.equal(rounded(beside)[9], rounded(alone)[0])


@torch.inference_mode()
@pytest.mark.parametrize("packed", KERNELS)
def test_extreme_integers_do_not_saturate(monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    plain, _ = make_layers(monkeypatch, packed, bias=False)
    plain.weight.fill_(1.0)
    rounded = Int8Linear(plain)
    for sign in (1.0, -1.0):
        torch.testing.assert_close(rounded(sign * torch.ones(3, 64)), torch.full((3, 96), sign * 64))


@torch.inference_mode()
@pytest.mark.parametrize("packed", KERNELS)
@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(monkeypatch: pytest.MonkeyPatch, packed: bool, odd: float) -> None:
    _, rounded = make_layers(monkeypatch, packed)
    inputs = torch.randn(2, 64)
    inputs[1, 7] = odd
    found = rounded(inputs)
    assert found[0].isfinite().all()
    assert not found[1].isfinite().any()


def test_weights_that_are_not_finite_are_refused() -> None:
    weight = torch.randn(4, 4)
    weight[2, 2] = float("inf")
    with pytest.raises(ModelError, match="not finite"):
        round_weights(weight)


@torch.inference_mode()
@pytest.mark.parametrize("packed", KERNELS)
def test_the_weights_can_be_read_again(monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    plain, rounded = make_layers(monkeypatch, packed, dtype=torch.bfloat16)
    assert rounded.weight.dtype == torch.bfloat16
    largest = plain.weight.abs().amax(1, keepdim=True)
    assert ((rounded.weight - plain.weight).abs() <= largest / 127).all()
    assert list(dict(rounded.named_parameters())) == ["bias"]


@pytest.mark.parametrize("packed", KERNELS)
def test_a_copy_shares_the_weights_but_not_the_bias(monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    _, rounded = make_layers(monkeypatch, packed)
    copied = copy.deepcopy(nn.Sequential(rounded))[0]
    assert isinstance(copied, Int8Linear)
    assert copied.packed is rounded.packed
    assert copied.rounded is rounded.rounded
    inputs = torch.randn(3, 64)
    assert torch.equal(copied(inputs), rounded(inputs))
    copied.bias.data += 1
    assert not torch.equal(copied(inputs), rounded(inputs))
