"""float32 copies of half-precision matrices say the same, and go away again."""

import pytest
import torch
from torch import nn

from llava_ray.generate import wide_linear
from llava_ray.generate.wide_linear import WideLinear, find_wide_rows, widen


def make_model(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64, bias=False)).to(dtype)


def test_wide_products_are_those_of_the_narrow_layer() -> None:
    narrow = nn.Linear(64, 96).bfloat16()
    inputs = torch.randn(1, 20, 64).bfloat16()
    wide = WideLinear(narrow, 16)(inputs)
    assert wide.dtype == torch.bfloat16
    torch.testing.assert_close(wide, narrow(inputs), rtol=1e-2, atol=1e-2)
    assert torch.equal(WideLinear(narrow, 21)(inputs), narrow(inputs))


def test_a_model_is_widened_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide_linear, "find_wide_rows", lambda layers: 16)
    model = make_model(torch.bfloat16)
    before = dict(model.named_modules())
    undo = widen([model], max_bytes=4 * 2 * 64 * 96)
    assert [type(layer) for layer in model] == [WideLinear, nn.GELU, WideLinear]
    undo()
    assert dict(model.named_modules()) == before
    widen([model], max_bytes=4 * 2 * 64 * 96 - 1)
    assert dict(model.named_modules()) == before


def test_what_is_wide_already_is_not_measured() -> None:
    assert find_wide_rows([layer for layer in make_model(torch.float32) if isinstance(layer, nn.Linear)]) is None
    assert find_wide_rows([]) is None
    rows = find_wide_rows([layer for layer in make_model(torch.bfloat16) if isinstance(layer, nn.Linear)])
    assert rows is None or rows in wide_linear.TRIED
