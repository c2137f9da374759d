"""Differences to a base: the same bits again, from the right base only."""

import shutil
from pathlib import Path

import fakes
import pytest
import torch
from published import assert_same_weights, make_original, read
from safetensors.torch import load_file, save_file

from llava_ray.errors import ModelError
from llava_ray.model.formats.deltas import apply_delta, make_delta
from llava_ray.model.formats.hub.write import export_hub
from llava_ray.model.formats.model_opening import open_model
from llava_ray.model.loading import load_pretrained_model
from llava_ray.model.saving import save_bundle


@pytest.fixture
def base(folders) -> Path:
    return folders.language_model()


def tuned(folder: Path, base: Path, tower: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A model in the original layout whose every number is another than the base's, with two more tokens."""
    make_original(folder, base, tower)
    torch.manual_seed(1)
    tensors = {
        name: (t + 0.01 * torch.randn_like(t)).to(dtype) for name, t in load_file(folder / "model.safetensors").items()
    }
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.ones(2, fakes.WIDTH, dtype=dtype)])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_base_and_delta_are_the_model_bit_for_bit(dtype, base, folders, tmp_path: Path) -> None:
    target = tuned(tmp_path / "target", base, folders.tower(), dtype)
    exported = make_delta(base, target, tmp_path / "delta")
    assert "21 tensors are differences" in exported.notes[0]  # all of the language model's, not the projector's
    apply_delta(base, tmp_path / "delta", tmp_path / "result")
    found, expected = load_file(tmp_path / "result/model.safetensors"), load_file(target / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert read(tmp_path / "result/config.json") == read(target / "config.json")
    assert not (tmp_path / "result/delta.json").exists()
    weights = load_file(tmp_path / "delta/model.safetensors")
    assert weights["model.norm.weight"].dtype in (torch.int16, torch.int32)  # nobody takes them for weights


def test_a_bundle_and_a_hub_folder_can_be_deltas_too(base, folders, tmp_path: Path) -> None:
    parts = folders.assemble()
    with torch.no_grad():
        parts.llava.language_model.get_input_embeddings().weight += 0.1
    save_bundle(tmp_path / "bundle", parts)
    export_hub(open_model(tmp_path / "bundle"), tmp_path / "hub")
    for name in ("bundle", "hub"):
        make_delta(base, tmp_path / name, tmp_path / f"{name}-delta")
        apply_delta(base, tmp_path / f"{name}-delta", tmp_path / f"{name}-result")
        assert_same_weights(open_model(tmp_path / f"{name}-result"), open_model(tmp_path / name))
    load_pretrained_model(tmp_path / "bundle-result")


def test_another_base_is_refused(base, folders, tmp_path: Path) -> None:
    make_delta(base, tuned(tmp_path / "target", base, folders.tower()), tmp_path / "delta")
    other = fakes.make_language_model(tmp_path / "other", seed=9)
    with pytest.raises(
        ModelError, match=rf"{other} is not the base of .*: its fingerprint is .*, expected .*, that of {base}"
    ):
        apply_delta(other, tmp_path / "delta", tmp_path / "result")
    assert not (tmp_path / "result").exists()


def test_a_damaged_delta_is_refused(base, folders, tmp_path: Path) -> None:
    make_delta(base, tuned(tmp_path / "target", base, folders.tower()), tmp_path / "delta")
    tensors = load_file(tmp_path / "delta/model.safetensors")
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, tmp_path / "delta/model.safetensors")
    with pytest.raises(ModelError, match=r"delta/model.safetensors: model.norm.weight is not restored exactly"):
        apply_delta(base, tmp_path / "delta", tmp_path / "result")
    assert not (tmp_path / "result").exists()


def test_models_that_have_nothing_in_common_are_refused(folders, tmp_path: Path) -> None:
    target = tuned(tmp_path / "target", folders.language_model(), folders.tower())
    with pytest.raises(ModelError, match="has no tensor of the same name and width"):
        make_delta(folders.tower(), target, tmp_path / "delta")


def test_a_delta_as_the_original_published_them_is_added(base, folders, tmp_path: Path) -> None:
    target = tuned(tmp_path / "target", base, folders.tower())
    published = tmp_path / "published"
    shutil.copytree(target, published)
    known, tensors = load_file(base / "model.safetensors"), load_file(target / "model.safetensors")
    for name, old in known.items():
        tensors[name][: old.shape[0]] -= old
    save_file(tensors, published / "model.safetensors", {"format": "pt"})
    exported = apply_delta(base, published, tmp_path / "result")
    assert "was not checked" in exported.notes[0]
    found, expected = load_file(tmp_path / "result/model.safetensors"), load_file(target / "model.safetensors")
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)
    assert torch.equal(found["model.mm_projector.0.weight"], expected["model.mm_projector.0.weight"])


def test_a_published_delta_of_another_size_is_refused(base, folders, tmp_path: Path) -> None:
    target = tuned(tmp_path / "target", base, folders.tower())
    larger = fakes.make_language_model(tmp_path / "larger", vocab_size=400)
    with pytest.raises(ModelError, match=r"lm_head.weight has no counterpart of its shape there"):
        apply_delta(larger, target, tmp_path / "result")
