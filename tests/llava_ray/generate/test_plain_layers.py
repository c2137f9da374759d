"""The layers of known models, run without transformers around them, compute the same bits."""

from pathlib import Path

import fakes
import pytest
import torch
from transformers import AutoModelForCausalLM

from llava_ray.generate.builtin.batching import RowModel, SequenceInput
from llava_ray.generate.builtin.kv_cache import KvCache
from llava_ray.generate.builtin.packed_linear import pack_linears
from llava_ray.generate.builtin.plain_layers import has_plain_layers
from llava_ray.generate.row_adapters import RowAdapters
from llava_ray.model.lora.adapter_terms import LayerTerm

PLAIN = {"llama", "llama_tied", "mistral", "qwen2"}


@torch.inference_mode()
def run_steps(rows: RowModel) -> torch.Tensor:
    """Prompts in chunks, beside answers, over rows with gaps between them."""
    cache = KvCache(4096)
    slots = [cache.reserve(200) for _ in range(5)]
    ids = [list(range(number, 40 + 7 * number)) for number in range(5)]
    found = []
    for start, end in ((0, 11), (11, 100)):
        chunks = [(slot, start, own[start:end]) for slot, own in zip(slots, ids, strict=True)]
        found.append(rows.run([SequenceInput(*chunk, is_prompt=True) for chunk in chunks])[1])
    answers = [SequenceInput(slots[number], len(ids[number]), [7]) for number in (0, 2, 4)]
    drafts = [SequenceInput(slots[1], len(ids[1]), [5, 6, 7], 3, is_prompt=True)]
    found.append(rows.run([*answers, *drafts])[1])
    return torch.cat(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", fakes.LANGUAGE_MODELS)
def test_the_same_bits(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(fakes.make_language_model(tmp_path, kind), dtype=dtype).eval()
    assert has_plain_layers(model) == (kind in PLAIN)
    if kind not in PLAIN:
        return
    undo = pack_linears([model], 2**30)
    rows = RowModel(model)
    ours = run_steps(rows)
    rows.plain_layers = None
    assert torch.equal(ours, run_steps(rows))
    assert float(ours.std()) > 0
    rows.restore()
    undo()


@torch.inference_mode()
def test_adapters_come_and_go_over_joined_projections(tmp_path: Path) -> None:
    folder = fakes.make_language_model(tmp_path, "qwen2")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    undo = pack_linears([model], 2**30)
    adapters = RowAdapters(model, {})
    rows = RowModel(model, adapters)
    base = run_steps(rows)
    names = [f"model.layers.1.{name}" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")]
    layers = {name: model.get_submodule(name).weight for name in names}
    draw = torch.Generator().manual_seed(3)
    adapters.add(
        "mine",
        {
            name: LayerTerm(*(torch.randn(shape, generator=draw).bfloat16() for shape in ((2, size), (2, out))))
            for name, (out, size) in ((name, weight.shape) for name, weight in layers.items())
        },
    )
    assert torch.equal(run_steps(rows), base)
    slot = KvCache(4096).reserve(50)
    assert slot is not None
    inputs = [SequenceInput(slot, 0, list(range(40)), is_prompt=True, adapter="mine")]
    ours = rows.run(inputs)[1]
    plain, rows.plain_layers = rows.plain_layers, None
    torch.testing.assert_close(rows.run(inputs)[1], ours)
    rows.plain_layers = plain
    adapters.discard("mine")
    assert torch.equal(run_steps(rows), base)
    rows.restore()
    undo()


def test_a_changed_model_is_run_by_itself(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(fakes.make_language_model(tmp_path))
    assert has_plain_layers(model)
    layer = model.model.layers[1]
    layer.self_attn.q_norm = torch.nn.Identity()
    assert not has_plain_layers(model)
    del layer.self_attn.q_norm
    norm, layer.input_layernorm = layer.input_layernorm, torch.nn.LayerNorm(fakes.WIDTH)
    assert not has_plain_layers(model)
    layer.input_layernorm = norm
    assert has_plain_layers(model)

    class Changed(type(model)):  # type: ignore[misc]
        pass

    model.__class__ = Changed
    assert not has_plain_layers(model)
