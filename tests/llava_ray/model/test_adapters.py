"""Adapters: laid over, kept, loaded, merged, or refused; over the tower or the projector only where they are named."""

import json
import shutil
from pathlib import Path

import fakes
import pytest
import torch
from losses import token_losses
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from llava_ray.config.lora import LoraConfig
from llava_ray.config.model import ModelConfig
from llava_ray.errors import BundleError, ModelError
from llava_ray.model.adaptation import adapt
from llava_ray.model.assembly import LlavaParts, assemble, merge
from llava_ray.model.formats.manifest import read_manifest
from llava_ray.model.freezing import freeze
from llava_ray.model.loading import load_pretrained_model
from llava_ray.model.lora import adapters
from llava_ray.model.lora.adapters import (
    adapter_parameters,
    add_adapter,
    compute_probe_logits,
    find_target_modules,
    has_adapter,
    load_adapter,
    remove_adapter,
    save_adapter,
)
from llava_ray.model.saving import save_bundle

pytestmark = pytest.mark.slow

LORA = LoraConfig(lora_enable=True, lora_r=4, lora_alpha=8)
KINDS = {
    "lora": LORA,
    "dora": LORA.replaced({"use_dora": True}),
    "rslora": LORA.replaced({"use_rslora": True}),
    "biases": LORA.replaced({"lora_bias": "all"}),
    "few": LORA.replaced({"lora_target_modules": ("q_proj", "layers.1.mlp.up_proj")}),
}


def adapted(folders, lora: LoraConfig = LORA, language_model: str = "llama", **settings: object) -> LlavaParts:
    """Tiny parts with an adapter as after training: everything that learns has moved."""
    parts: LlavaParts = folders.assemble(language_model, **settings)
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


def test_a_new_adapter_changes_nothing_and_depends_on_the_seed_alone(folders, samples, pack) -> None:
    plain = folders.assemble()
    before = losses(plain, samples, pack)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    add_adapter(plain.llava.language_model, LORA, seed=3)
    plain.llava.eval()
    assert torch.equal(losses(plain, samples, pack), before)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    again, other = folders.assemble(), folders.assemble()
    add_adapter(again.llava.language_model, LORA, seed=3)
    add_adapter(other.llava.language_model, LORA, seed=4)
    values = [adapter_parameters(parts.llava.language_model) for parts in (plain, again, other)]
    name = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert torch.equal(values[0][name], values[1][name])
    assert not torch.equal(values[0][name], values[2][name])


@pytest.mark.parametrize("kind", fakes.LANGUAGE_MODELS)
def test_every_linear_of_the_language_model_but_its_head_and_nothing_else(kind: str, folders) -> None:
    parts = folders.assemble(kind)
    model = parts.llava.language_model
    head = model.get_output_embeddings()
    wanted = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    add_adapter(model, LORA, seed=0)
    assert set(adapters.adapter_layers(parts.llava.language_model)) == wanted
    assert not any("lora" in name for name, _ in parts.llava.projector.named_parameters())
    assert not any("lora" in name for name, _ in parts.tower.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_as_adapter_and_merged(kind: str, folders, samples, pack, tmp_path: Path) -> None:
    language_model = "phi3" if kind == "biases" else "llama"
    parts = adapted(folders, KINDS[kind], language_model)
    expected = losses(parts, samples, pack)
    save_bundle(tmp_path / "adapter", parts, training={"steps": 7})
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {
        "adapter",
        "projector.safetensors",
        "llava.json",
    }
    assert not (tmp_path / "adapter" / "language_model").exists()
    loaded = load_pretrained_model(tmp_path / "adapter")
    assert torch.equal(losses(loaded, samples, pack), expected)
    merged = merge(loaded)
    assert not has_adapter(merged.llava.language_model)
    save_bundle(tmp_path / "merged", merged)
    whole = load_pretrained_model(tmp_path / "merged")
    manifest = read_manifest(tmp_path / "merged")
    assert (manifest.adapter, manifest.language_model.inside) == (None, True)
    torch.testing.assert_close(losses(whole, samples, pack), expected, atol=1e-4, rtol=0)


def test_peft_itself_reads_the_adapter(folders, tmp_path: Path) -> None:
    import peft

    parts = adapted(folders)
    save_bundle(tmp_path / "bundle", parts)
    plain = AutoModelForCausalLM.from_pretrained(folders.language_model())
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "bundle" / "adapter").eval()
    ids = torch.arange(20)[None]
    assert torch.equal(theirs(input_ids=ids).logits, parts.llava.language_model(input_ids=ids).logits)


def test_the_adapter_names_its_base_by_id_and_fingerprint(folders, tmp_path: Path) -> None:
    parts = adapted(folders)
    save_bundle(tmp_path / "bundle", parts)
    manifest = read_manifest(tmp_path / "bundle")
    assert manifest.language_model.base == str(folders.language_model())
    settings = json.loads((tmp_path / "bundle/adapter/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == manifest.language_model.base
    with safe_open(tmp_path / "bundle/adapter/adapter_model.safetensors", "pt") as file:
        assert file.metadata()["base_model_fingerprint"] == manifest.language_model.fingerprint


def test_a_wrong_base_is_refused(folders, tmp_path: Path) -> None:
    base = fakes.make_language_model(tmp_path / "base", seed=0)
    parts = assemble(ModelConfig(model_name_or_path=str(base), vision_tower=str(folders.tower())), "pad")
    adapt(parts, LORA, seed=0)
    save_bundle(tmp_path / "bundle", parts)
    other = fakes.make_language_model(tmp_path / "other", seed=1)
    with pytest.raises(BundleError, match=r"language model in .*other is not the one that the bundle was made with"):
        load_pretrained_model(tmp_path / "bundle", model_base=other)
    with pytest.raises(BundleError, match=r"was trained over .*base \(fingerprint \w+\), not over this language model"):
        model = AutoModelForCausalLM.from_pretrained(other)
        load_adapter(model, tmp_path / "bundle/adapter", base_fingerprint="0" * 64)
    base.rename(tmp_path / "moved")
    assert has_adapter(load_pretrained_model(tmp_path / "bundle", model_base=tmp_path / "moved").llava.language_model)


def test_an_adapter_of_another_model_leaves_the_model_as_it_was(folders, tmp_path: Path) -> None:
    save_bundle(tmp_path / "bundle", adapted(folders))
    save_bundle(tmp_path / "few", adapted(folders, LORA.replaced({"lora_target_modules": ("q_proj",)})))
    shallow = AutoModelForCausalLM.from_pretrained(folders.language_model())
    del shallow.model.layers[1]
    phi3 = AutoModelForCausalLM.from_pretrained(folders.language_model("phi3"))
    for bundle, model, message in (
        ("bundle", shallow, r"14 tensors in .* do not fit .* the first is model.layers.1.mlp"),
        ("bundle", phi3, r"20 tensors in .* do not fit .* the first is model.layers.0.mlp.gate_proj"),
        ("few", phi3, "is an adapter of another language model"),
    ):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ModelError, match=message):
            load_adapter(model, tmp_path / bundle / "adapter")
        assert not has_adapter(model)
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def damage(folder: Path, kind: str) -> None:
    weights, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    config = json.loads(settings.read_text())
    if kind == "no settings":
        settings.unlink()
    elif kind == "no weights":
        weights.unlink()
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "a tensor missing":
        tensors = load_file(weights)
        tensors.popitem()
        save_file(tensors, weights)
    elif kind == "whole modules":
        settings.write_text(json.dumps(config | {"modules_to_save": ["embed_tokens"]}))
    elif kind == "prompts":
        settings.write_text(json.dumps({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}))
    else:
        settings.write_text("{")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no settings", r"adapter_config.json is not there"),
        ("no weights", r"neither adapter_model.safetensors nor adapter_model.bin is there"),
        ("truncated", r"adapter_model.safetensors is (cut off|not a whole safetensors)"),
        ("a tensor missing", r"1 tensors in .* do not fit .*, the first is model\..*: found none"),
        ("whole modules", r"adapter_config.json trains whole modules .*\['embed_tokens'\]"),
        ("prompts", r"adapter_config.json describes an adapter of type .*PROMPT_TUNING; expected LORA"),
        ("no json", r"adapter_config.json is not JSON"),
    ],
)
def test_damaged_adapters_are_refused_by_name(kind: str, message: str, folders, tmp_path: Path) -> None:
    parts = adapted(folders)
    save_adapter(tmp_path / "adapter", parts.llava.language_model, parts.manifest.language_model)
    damage(tmp_path / "adapter", kind)
    model = AutoModelForCausalLM.from_pretrained(folders.language_model())
    with pytest.raises(ModelError, match=message):
        load_adapter(model, tmp_path / "adapter")
    assert not has_adapter(model)


class Bomb:
    """Touches a file when it is unpickled without care."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.target,))


def test_a_pickle_with_code_in_it_is_not_run(folders, tmp_path: Path) -> None:
    parts = adapted(folders)
    save_adapter(tmp_path / "adapter", parts.llava.language_model, parts.manifest.language_model)
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    torch.save({"lora_A": Bomb(tmp_path / "went off")}, tmp_path / "adapter/adapter_model.bin")
    with pytest.raises(ModelError, match=r"adapter_model.bin holds more than tensors"):
        load_adapter(folders.assemble().llava.language_model, tmp_path / "adapter")
    assert not (tmp_path / "went off").exists()


def test_exchanged_adapter_in_a_bundle_is_refused(folders, tmp_path: Path) -> None:
    save_bundle(tmp_path / "one", adapted(folders))
    save_bundle(tmp_path / "two", adapted(folders, LORA.replaced({"lora_r": 5})))
    shutil.rmtree(tmp_path / "one/adapter")
    shutil.copytree(tmp_path / "two/adapter", tmp_path / "one/adapter")
    with pytest.raises(BundleError, match=r"the adapter in .* is not the one that the bundle was made with"):
        load_pretrained_model(tmp_path / "one")


def test_a_merge_that_changes_the_logits_is_refused(folders, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora.layer import Linear

    delta = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda layer, adapter: 1.1 * delta(layer, adapter))
    with pytest.raises(ModelError, match=r"merging changed the logits of a fixed text by .* of their spread"):
        merge(adapted(folders))


def test_an_adapter_over_a_tied_head_cannot_be_merged_unseen(folders) -> None:
    parts = adapted(folders, LORA.replaced({"lora_target_modules": ("lm_head",)}), "llama_tied")
    with pytest.raises(ModelError, match=r"merging changed the logits .*or affects a tied head"):
        merge(parts)


def test_merging_in_bfloat16_differs_by_rounding_only(folders, tmp_path: Path) -> None:
    save_bundle(tmp_path / "bundle", adapted(folders))
    parts = load_pretrained_model(tmp_path / "bundle", dtype=torch.bfloat16)
    assert {p.dtype for p in parts.llava.parameters()} == {torch.bfloat16}
    assert not has_adapter(merge(parts).llava.language_model)


def test_nothing_to_merge_is_said_so(folders) -> None:
    with pytest.raises(ModelError, match="has no adapter"):
        merge(folders.assemble())


def test_bundles_that_would_lose_the_adapter_are_refused(folders, tmp_path: Path) -> None:
    parts = adapted(folders)
    for include in ("all", "projector"):
        with pytest.raises(BundleError, match="merge it first"):
            save_bundle(tmp_path / "bundle", parts, include=include)
    with pytest.raises(BundleError, match="no adapter to write"):
        save_bundle(tmp_path / "bundle", folders.assemble(), include="adapter")


def test_taking_an_adapter_off_gives_the_base_back(folders) -> None:
    parts, plain = adapted(folders), folders.assemble()
    remove_adapter(parts.llava.language_model)
    assert torch.equal(
        compute_probe_logits(parts.llava.language_model), compute_probe_logits(plain.llava.language_model)
    )


@pytest.mark.parametrize("target", ["k_proj2", "mm_projector.0", "encoder.layers.0.mlp.fc1", "norm"])
def test_targets_that_are_not_there_are_refused(target: str, folders) -> None:
    with pytest.raises(
        ModelError, match=rf"names '{target}', which is not a Linear of the language model; it has down_pr"
    ):
        find_target_modules(folders.assemble().llava.language_model, ("q_proj", target))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_projector_has_an_adapter_only_when_it_is_named(kind: str, folders, samples, pack, tmp_path: Path) -> None:
    parts = adapted(folders, KINDS[kind].replaced({"lora_target_modules": ("q_proj", "projector.0", "projector.2")}))
    learning = {name for name, parameter in parts.llava.projector.named_parameters() if parameter.requires_grad}
    assert learning
    assert all("lora_" in name for name in learning)
    save_bundle(tmp_path / "bundle", parts)
    assert set(load_file(tmp_path / "bundle/projector.safetensors")) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    torch.testing.assert_close(
        losses(load_pretrained_model(tmp_path / "bundle"), samples, pack),
        losses(parts, samples, pack),
        atol=1e-5,
        rtol=0,
    )


def test_a_tower_that_does_not_learn_has_no_layers_to_adapt(folders) -> None:
    named = LORA.replaced({"lora_target_modules": ("q_proj", "vision_tower.encoder.layers.0.mlp.fc1")})
    with pytest.raises(
        ModelError, match=r"names 'vision_tower.*have only projector.0, projector.2. A tower is trainable with"
    ):
        adapt(folders.assemble(), named, seed=0)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_tower_that_learns_has_an_adapter_where_it_is_named(kind: str, folders, tmp_path: Path) -> None:
    tower = ("vision_tower.encoder.layers.0.mlp.fc1", "vision_tower.encoder.layers.1.self_attn.q_proj")
    lora = KINDS[kind].replaced({"lora_target_modules": ("q_proj", *tower)})
    parts = adapted(folders, lora, unfreeze_mm_vision_tower=True)
    learning = {name for name, parameter in parts.llava.named_parameters() if parameter.requires_grad}
    of_tower = {name for name in learning if name.startswith("vision_tower.")}
    assert of_tower
    assert all("lora_" in name and name.startswith(tower) for name in of_tower)
    assert "projector.0.weight" in learning
    save_bundle(tmp_path / "bundle", parts)
    loaded = load_pretrained_model(tmp_path / "bundle")
    assert loaded.manifest.vision_tower.fingerprint == read_manifest(tmp_path / "bundle").vision_tower.fingerprint
    pixels = torch.randn(2, 3, fakes.IMAGE_SIZE, fakes.IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after, plain = (each.tower.eval()(pixels) for each in (parts, loaded, folders.assemble()))
    torch.testing.assert_close(after, before, atol=1e-4, rtol=0)
    assert not torch.allclose(after, plain, atol=1e-2)


def test_going_on_with_a_bundles_adapter(folders, samples, pack, tmp_path: Path) -> None:
    parts = adapted(folders)
    save_bundle(tmp_path / "bundle", parts)
    config = ModelConfig(model_name_or_path=str(tmp_path / "bundle"))
    later = assemble(config, "pad")
    adapt(later, LORA.replaced({"lora_dropout": 0.5}), seed=9)
    freeze(later.llava, later.tower, config)
    later.llava.eval()
    assert torch.equal(losses(later, samples, pack), losses(parts, samples, pack))
    assert all(parameter.requires_grad for parameter in adapter_parameters(later.llava.language_model).values())
    assert later.manifest.language_model == parts.manifest.language_model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_enable": False}, "holds an adapter over .*; set lora.lora_enable = true to continue"),
        ({"lora_r": 8}, r"lora.lora_r is 8, but the adapter in .* was trained with 4"),
        ({"use_dora": True}, "lora.use_dora is True"),
        ({"bits": 4}, r"lora.bits is 4, but .* was trained with 16"),
        ({"lora_target_modules": ("q_proj",)}, r"lora.lora_target_modules is \['q_proj'\]"),
    ],
)
def test_going_on_with_other_settings_is_refused(change: dict[str, object], message: str, folders, tmp_path) -> None:
    save_bundle(tmp_path / "bundle", adapted(folders))
    parts = assemble(ModelConfig(model_name_or_path=str(tmp_path / "bundle")), "pad")
    with pytest.raises(ModelError, match=message):
        adapt(parts, LORA.replaced(change), seed=0)


def test_gradients_reach_a_checkpointed_adapter_though_nothing_before_it_learns(folders, samples, pack) -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        parts = adapted(folders, LORA.replaced({"lora_dropout": 0.0}), freeze_mm_mlp_adapter=True)
        parts.llava.train()
        if checkpointing:
            parts.llava.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        token_losses(parts.llava, *pack(parts, samples(parts.image_tokens.num_features)).inputs).sum().backward()
        found = adapter_parameters(parts.llava.language_model)
        return {name: parameter.grad for name, parameter in found.items() if parameter.grad is not None}

    plain, recomputed = gradients(False), gradients(True)
    assert len(plain) == 2 * 7 * 2
    assert plain.keys() == recomputed.keys()
    assert all(torch.allclose(plain[name], recomputed[name], atol=1e-6) for name in plain)
