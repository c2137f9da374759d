"""Adapters alone, as the original keeps them, and merged."""

from pathlib import Path

import pytest
import torch
from losses import token_losses
from published import read
from safetensors.torch import load_file

from llava_ray.config.lora import LoraConfig
from llava_ray.errors import ModelError
from llava_ray.model.adaptation import adapt
from llava_ray.model.formats.manifest import read_manifest
from llava_ray.model.formats.model_opening import open_model
from llava_ray.model.formats.original.write import export_original
from llava_ray.model.loading import load_pretrained_model
from llava_ray.model.lora_export import base_dtype, export_adapter, export_merged
from llava_ray.model.saving import save_bundle

pytestmark = pytest.mark.slow


@pytest.fixture
def bundle(folders, tmp_path: Path) -> Path:
    """A bundle with an adapter whose every number has moved."""
    parts = folders.assemble()
    adapt(parts, LoraConfig(lora_enable=True, lora_r=4, lora_alpha=8), seed=3)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in parts.llava.named_parameters():
            if "lora_" in name or name.startswith("projector."):
                parameter += 0.05 * torch.randn_like(parameter)
    save_bundle(tmp_path / "bundle", parts, training={"run": "test"})
    return tmp_path / "bundle"


def test_merged_it_computes_the_same(bundle, folders, samples, pack, tmp_path: Path) -> None:
    export_merged(bundle, tmp_path / "merged")
    before, after = load_pretrained_model(bundle), load_pretrained_model(tmp_path / "merged")
    with torch.no_grad():
        expected = token_losses(before.llava, *pack(before, samples(before.image_tokens.num_features)).inputs)
        found = token_losses(after.llava, *pack(after, samples(after.image_tokens.num_features)).inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert read_manifest(tmp_path / "merged").language_model.inside
    assert after.manifest.training == {"run": "test"}
    export_original(open_model(tmp_path / "merged"), tmp_path / "original")
    with pytest.raises(ModelError, match="exists already"):
        export_merged(bundle, tmp_path / "merged")


def test_an_unmerged_bundle_is_not_exported_as_if_it_were_whole(bundle) -> None:
    with pytest.raises(ModelError, match=r"an adapter that is not merged .* llava-ray export merge"):
        open_model(bundle)


def test_alone_it_is_the_originals_lora_folder(bundle, folders, tmp_path: Path) -> None:
    exported = export_adapter(bundle, tmp_path / "lora")
    assert str(folders.language_model()) in exported.notes[0]
    names = ["adapter_config.json", "adapter_model.safetensors", "config.json", "non_lora_trainables.bin"]
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == names
    tensors = load_file(tmp_path / "lora/adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in tensors
    others = torch.load(tmp_path / "lora/non_lora_trainables.bin", weights_only=True)
    prefix = "base_model.model.model.mm_projector"
    assert set(others) == {f"{prefix}.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert torch.equal(others[f"{prefix}.2.bias"], load_file(bundle / "projector.safetensors")["2.bias"])
    config = read(tmp_path / "lora/config.json")
    assert (config["model_type"], config["mm_projector_type"]) == ("llava_llama", "mlp2x_gelu")
    assert config["hidden_size"] == read(folders.language_model() / "config.json")["hidden_size"]


def test_a_bundle_without_one_has_none_to_export(folders, tmp_path: Path) -> None:
    save_bundle(tmp_path / "bundle", folders.assemble())
    with pytest.raises(ModelError, match=r"adapter: .*adapter_config.json is not there; the model was tuned"):
        export_adapter(tmp_path / "bundle", tmp_path / "lora")


def test_the_base_says_in_which_dtype_to_merge(bundle, folders, tmp_path: Path) -> None:
    assert base_dtype(bundle, None) == torch.float32
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text('{"torch_dtype": "float16"}')
    assert base_dtype(bundle, str(tmp_path / "base")) == torch.float16
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/adapter_config.json").write_text('{"base_model_name_or_path": ""}')
    with pytest.raises(ModelError, match="does not name the base of its adapter; say where it is with --model_base"):
        base_dtype(tmp_path / "lora", None)
