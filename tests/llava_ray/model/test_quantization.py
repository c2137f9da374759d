"""Quantised language models: what is quantised and what never is, trained over, merged, kept out of checkpoints."""

import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from losses import token_losses
from torch import nn

from llava_ray.config.lora import LoraConfig, Quantization
from llava_ray.errors import BundleError, ModelError
from llava_ray.generate.decoding import Stops, generate_batch
from llava_ray.model.adaptation import adapt
from llava_ray.model.assembly import LlavaParts, assemble, merge
from llava_ray.model.formats.manifest import read_manifest
from llava_ray.model.freezing import freeze
from llava_ray.model.loading import load_pretrained_model
from llava_ray.model.lora.adapters import adapter_parameters, has_adapter
from llava_ray.model.network.quantization import (
    bitsandbytes_config,
    choose_quantization,
    count_elements,
    find_quantization,
)
from llava_ray.model.saving import save_bundle

pytestmark = pytest.mark.slow

bitsandbytes = pytest.importorskip("bitsandbytes")

QLORA = LoraConfig(lora_enable=True, lora_r=4, lora_alpha=8, bits=4)
KINDS = {
    "nf4": QLORA,
    "fp4": QLORA.replaced({"quant_type": "fp4", "double_quant": False}),
    "dora": QLORA.replaced({"use_dora": True}),
    "int8": QLORA.replaced({"bits": 8}),
}


def quantised(folders, lora: LoraConfig = QLORA, **settings: object) -> LlavaParts:
    """Tiny parts over a quantised language model, with an adapter as after training."""
    parts = assemble(folders.config(**settings), "pad", seed=3, quantization=lora.quantization)
    adapt(parts, lora, seed=3)
    freeze(parts.llava, parts.tower, parts.config)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in parts.llava.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    parts.llava.eval()
    return parts


def losses(parts: LlavaParts, samples, pack) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = token_losses(parts.llava, *pack(parts, samples(parts.image_tokens.num_features)).inputs)
    return result


@pytest.mark.parametrize("bits", [4, 8])
def test_only_the_language_models_matrices_are_quantised(bits: Literal[4, 8], folders) -> None:
    parts = assemble(folders.config(), "pad", quantization=Quantization(bits=bits))
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    model = parts.llava.language_model
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = {name for name, module in model.named_modules() if isinstance(module, kinds)}
    assert found == linears - {"lm_head"}
    for part in (parts.llava.projector, parts.tower):
        assert not any(isinstance(module, kinds) for module in part.modules())
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}
    assert model.get_input_embeddings().weight.dtype == torch.float32


def test_parameters_count_whole(folders) -> None:
    plain, packed = folders.assemble(), assemble(folders.config(), "pad", quantization=Quantization(bits=4))
    counts = [sum(map(count_elements, parts.llava.parameters())) for parts in (plain, packed)]
    assert counts[0] == counts[1]
    adapt(packed, QLORA, seed=0)
    report = {row.part: row for row in freeze(packed.llava, packed.tower, packed.config)}
    assert report["language_model"].num_trainable == 0
    assert report["language_model"].num_total == sum(p.numel() for p in plain.llava.language_model.parameters())
    assert report["adapter"].num_trainable == report["adapter"].num_total > 0
    assert str(report["adapter"]).startswith("adapter ")


def test_computing_changes_nothing_of_what_was_quantised(folders, samples, pack) -> None:
    """bitsandbytes would repack matrices at the first pass without gradients on some CPUs, and round to bfloat16."""
    parts = quantised(folders)
    parts.llava.train()
    for layer in parts.llava.language_model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    row = pack(parts, samples(parts.image_tokens.num_features))
    trained: torch.Tensor = token_losses(parts.llava, *row.inputs).detach()
    parts.llava.eval()
    for _ in range(2):
        assert torch.allclose(losses(parts, samples, pack), trained, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_as_adapter_and_merged(kind: str, folders, samples, pack, tmp_path: Path) -> None:
    parts = quantised(folders, KINDS[kind])
    expected = losses(parts, samples, pack)
    save_bundle(tmp_path / "adapter", parts)
    assert read_manifest(tmp_path / "adapter").quantization == KINDS[kind].quantization
    loaded = load_pretrained_model(tmp_path / "adapter")
    assert find_quantization(loaded.llava.language_model) == KINDS[kind].quantization
    assert torch.equal(losses(loaded, samples, pack), expected)
    merged = merge(loaded)
    assert find_quantization(merged.llava.language_model) is None
    assert {parameter.dtype for parameter in merged.llava.parameters()} == {torch.float32}
    save_bundle(tmp_path / "merged", merged)
    whole = load_pretrained_model(tmp_path / "merged")
    # LLM.int8 rounds activations as well, which a merged matrix cannot.
    tolerance = 0.3 if kind == "int8" else 1e-4
    torch.testing.assert_close(losses(whole, samples, pack), expected, atol=tolerance, rtol=0)


def test_adapter_and_merged_model_say_the_same(folders, tmp_path: Path) -> None:
    parts = quantised(folders)
    save_bundle(tmp_path / "adapter", parts)
    save_bundle(tmp_path / "merged", merge(load_pretrained_model(tmp_path / "adapter")))
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prompts = [[1, -200, 20 + i, 21] for i in range(3)]
    pixels = [image[None] for image in images]
    said = [
        generate_batch(
            load_pretrained_model(tmp_path / kind), prompts, pixels, max_new_tokens=24, stops=Stops(frozenset())
        )
        for kind in ("adapter", "merged")
    ]
    assert said[0] == said[1]


def test_a_bundle_is_loaded_in_other_bits_when_asked(folders, samples, pack, tmp_path: Path) -> None:
    save_bundle(tmp_path / "qlora", quantised(folders))
    save_bundle(tmp_path / "whole", folders.assemble())
    plain = load_pretrained_model(tmp_path / "qlora", bits=16)
    assert has_adapter(plain.llava.language_model)
    assert find_quantization(plain.llava.language_model) is None
    exact, packed = (losses(load_pretrained_model(tmp_path / "whole", bits=b), samples, pack) for b in (None, 4))
    assert not torch.equal(exact, packed)
    assert find_quantization(load_pretrained_model(tmp_path / "whole", bits=8).llava.language_model) == Quantization(
        bits=8
    )


def test_bits_as_trained_unless_they_are_given() -> None:
    trained = Quantization(bits=4, quant_type="fp4", double_quant=False)
    assert choose_quantization(None, trained) == choose_quantization(4, trained) == trained
    assert choose_quantization(16, trained) is None
    assert choose_quantization(8, trained) == Quantization(bits=8)
    assert choose_quantization(4, None) == Quantization(bits=4)
    assert choose_quantization(None, None) is None


@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_learns_over_a_quantised_base(bits: Literal[4, 8], folders, samples, pack) -> None:
    parts = quantised(folders, QLORA.replaced({"bits": bits, "lora_dropout": 0.0}))
    parts.llava.train()
    parts.llava.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    row = pack(parts, samples(parts.image_tokens.num_features))
    learning = [parameter for parameter in parts.llava.parameters() if parameter.requires_grad]
    assert len(learning) == len(adapter_parameters(parts.llava.language_model)) + 4
    optimizer = torch.optim.AdamW(learning, lr=1e-2)
    curve = []
    for _ in range(8):
        loss = token_losses(parts.llava, *row.inputs).mean()
        loss.backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in learning)
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    assert curve[-1] < 0.5 * curve[0]


def test_a_quantised_model_is_not_written_as_a_whole(folders, tmp_path: Path) -> None:
    parts = assemble(folders.config(), "pad", quantization=Quantization(bits=4))
    with pytest.raises(BundleError, match="is quantised, and a bundle holds unquantised weights"):
        save_bundle(tmp_path / "bundle", parts, include="all")
    save_bundle(tmp_path / "bundle", parts, include="projector")
    assert load_pretrained_model(tmp_path / "bundle").manifest.quantization == Quantization(bits=4)


def test_a_missing_bitsandbytes_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match=r"lora.bits = 4 needs bitsandbytes.*pip install 'llava_ray\[qlora\]'"):
        bitsandbytes_config(Quantization(bits=4), torch.float32)
