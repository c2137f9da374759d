"""Adapters added to and removed from a language model between its steps."""

import fakes
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from llava_ray.errors import ModelError
from llava_ray.generate.row_adapters import RowAdapters
from llava_ray.model.lora.adapter_terms import LayerTerm


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    folder = fakes.make_language_model(tmp_path_factory.mktemp("model") / "llama", "llama")
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def make_terms(model: PreTrainedModel, seed: int, *, rank: int = 3, extreme: bool = False) -> dict[str, LayerTerm]:
    draw = torch.Generator().manual_seed(seed)
    terms = {}
    for name, layer in model.named_modules():
        if (
            isinstance(layer, nn.Linear)
            and name.rpartition(".")[2] in (("q_proj", "down_proj"), ("v_proj", "down_proj"))[seed % 2]
        ):
            down = torch.randn(rank, layer.in_features, generator=draw)
            up = 0.1 * torch.randn(rank, layer.out_features, generator=draw)
            gain = 1 + 0.1 * torch.randn(layer.out_features, generator=draw) if seed % 3 == 0 else None
            shift = 0.1 * torch.randn(layer.out_features, generator=draw) if seed % 3 == 1 else None
            terms[name] = LayerTerm(down * 1e38 if extreme else down, up, gain, shift)
    return terms


@torch.inference_mode()
def logits(model: PreTrainedModel, rows: RowAdapters, name: str | None, beside: str | None = None) -> torch.Tensor:
    """The logits of a text with one adapter; the other's text, in the same step, stands after it."""
    ids = torch.tensor([[3, 17, 91, 4]])
    names, counts = ([name], [4]) if beside is None else ([name, beside], [4, 2])
    if beside is not None:
        ids = torch.cat([ids, torch.tensor([[9, 8]])], 1)
    rows.choose(names, counts, torch.arange(ids.shape[1]))
    return model(input_ids=ids, use_cache=False).logits[0, :4]


def test_each_is_what_it_is_alone_whatever_came_and_went_before(model: PreTrainedModel) -> None:
    known = {f"{seed}": make_terms(model, seed, rank=1 + seed % 4) for seed in range(12)}
    modules = dict(model.named_modules())
    alone = {}
    for name, terms in known.items():
        rows = RowAdapters(model, {name: terms})
        alone[name] = logits(model, rows, name)
        rows.remove()
    rows = RowAdapters(model, {})
    base = logits(model, rows, None)
    present: list[str] = []
    order = torch.Generator().manual_seed(1)
    for _ in range(30):
        name = f"{int(torch.randint(12, (), generator=order))}"
        if name in present:
            rows.discard(name)
            present.remove(name)
        else:
            rows.add(name, known[name])
            present.append(name)
        assert torch.equal(logits(model, rows, None), base)
        for other in present[-1:]:
            torch.testing.assert_close(logits(model, rows, other), alone[other], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(logits(model, rows, other, present[0]), alone[other], rtol=1e-4, atol=1e-4)
            assert torch.equal(logits(model, rows, None, other), logits(model, rows, None, present[0]))
    assert rows.foreign.shape[0] <= 18
    for name in present:
        rows.discard(name)
    assert dict(model.named_modules()) == modules


@torch.inference_mode()
def test_an_overflow_in_one_is_no_others(model: PreTrainedModel) -> None:
    """In one layer: attention over one text would carry it on, which requests in a batch do not share."""
    rows = RowAdapters(model, {"good": make_terms(model, 2), "bad": make_terms(model, 4, extreme=True)})
    try:
        layer = next(iter(rows.layers.values()))
        inputs = 100 * torch.randn(1, 6, layer.down.shape[1], generator=torch.Generator().manual_seed(1))
        rows.choose([None, "good", "bad"], [2, 2, 2], torch.arange(6))
        together = layer(inputs)[0]
        assert not together[4:].isfinite().all()
        rows.choose([None, "good"], [2, 4], torch.arange(6))
        torch.testing.assert_close(together[:4], layer(inputs)[0, :4], rtol=1e-4, atol=1e-3)
        assert together[:4].isfinite().all()
    finally:
        rows.remove()


def test_a_removed_one_is_not_answered_by_the_base(model: PreTrainedModel) -> None:
    rows = RowAdapters(model, {"one": make_terms(model, 0)})
    rows.discard("one")
    with pytest.raises(ModelError, match="'one' was removed"):
        rows.choose_one("one", 3)
    rows.remove()
