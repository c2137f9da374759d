"""The built-in engine over 8-bit weights: answers do not depend on the batch, adapters work as over the plain model."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engines import answer_all, ask, make_parts, make_requests, request, started, write_adapter
from torch import nn

from llava_ray.errors import ModelError
from llava_ray.model.network.int8_linear import Int8Linear, has_int8_weights, round_to_int8

pytestmark = pytest.mark.slow


def test_answers_are_the_same_alone_and_in_a_batch(tmp_path: Path) -> None:
    parts = make_parts(tmp_path)
    asked = make_requests(12)
    together = answer_all(parts, asked, quantization="int8", max_running=12)
    assert has_int8_weights(parts.llava.language_model)
    alone = [answer_all(make_parts(tmp_path), [one], quantization="int8")[0] for one in asked[:4]]
    assert [one.ids for one in alone] == [one.ids for one in together[:4]]


def test_the_head_and_the_embeddings_stay_as_they_are(tmp_path: Path) -> None:
    model = make_parts(tmp_path).llava.language_model
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    num_linear = sum(type(module) is nn.Linear for module in model.modules())
    round_to_int8(model)
    assert sum(isinstance(module, Int8Linear) for module in model.modules()) == num_linear - 1
    assert model.get_output_embeddings() is head
    assert type(head) is nn.Linear
    assert model.get_input_embeddings() is embeddings
    with pytest.raises(ModelError, match="no plain linear layers"):
        round_to_int8(model)


@pytest.mark.parametrize("kind", ["plain", "dora"])
def test_adapters_are_served_over_it_from_the_start_and_later(tmp_path: Path, kind: str) -> None:
    folder = write_adapter(tmp_path / kind, make_parts(tmp_path), seed=1, use_dora=kind == "dora")
    base_ids = answer_all(make_parts(tmp_path), [request("what?")], quantization="int8")[0].ids

    async def run(at_start: bool) -> list[list[int]]:
        engine = await started(
            make_parts(tmp_path),
            {"it": folder} if at_start else {},
            quantization="int8",
            max_lora_rank=None if at_start else 8,
        )
        try:
            if not at_start:
                await engine.load_adapter("it", folder)
            asked = [request("what?", "a"), replace(request("what?", "b"), model="it")]
            return [one.ids for one in await asyncio.gather(*(ask(engine, one) for one in asked))]
        finally:
            await engine.stop()

    early, late = asyncio.run(run(at_start=True)), asyncio.run(run(at_start=False))
    assert early == late
    assert early[0] == base_ids
    assert early[1] != base_ids


def test_a_model_with_an_adapter_of_its_own_keeps_that_as_it_is(tmp_path: Path) -> None:
    from llava_ray.model.loading import load_pretrained_model

    folder = write_adapter(tmp_path / "own", make_parts(tmp_path), seed=1)
    parts = load_pretrained_model(folder)
    answer_all(parts, [request("what?")], quantization="int8")
    kinds = {name: type(module) for name, module in parts.llava.language_model.named_modules()}
    assert {kind for name, kind in kinds.items() if name.endswith("base_layer")} == {Int8Linear}
    assert {kind for name, kind in kinds.items() if "lora_A.default" in name} == {nn.Linear}


def test_a_weight_that_is_not_finite_is_named_as_the_models_fault(tmp_path: Path) -> None:
    parts = make_parts(tmp_path)
    with torch.no_grad():
        next(module for module in parts.llava.language_model.modules() if type(module) is nn.Linear).weight[0, 0] = (
            torch.nan
        )
    with pytest.raises(ModelError, match="not finite"):
        answer_all(parts, [request("what?")], quantization="int8")
