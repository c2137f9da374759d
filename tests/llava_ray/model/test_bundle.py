"""Bundles: written whole, read back to the same numbers, refused when they are not what they say."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import fakes
import pytest
import torch
import transformers
from losses import token_losses
from safetensors import safe_open

from llava_ray.config.model import ModelConfig
from llava_ray.errors import BundleError, ModelError
from llava_ray.model.assembly import assemble, load_tower
from llava_ray.model.blueprint import read_blueprint
from llava_ray.model.formats.manifest import absolute_base, read_manifest, relative_base
from llava_ray.model.formats.saved_weights import replacing, sanitize_generation_config
from llava_ray.model.loading import load_pretrained_model, read_pretrained_blueprint
from llava_ray.model.saving import save_bundle

pytestmark = pytest.mark.slow


def tensor_names(folder: Path) -> set[str]:
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names |= set(tensors.keys())
    return names


def losses(parts, samples, pack) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = token_losses(parts.llava, *pack(parts, samples(parts.image_tokens.num_features)).inputs)
    return result


def shaken(parts):
    """Parts as after training: every tensor that can learn has moved."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in parts.llava.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return parts


@pytest.mark.parametrize("kind", fakes.LANGUAGE_MODELS)
def test_round_trip(kind: str, folders, samples, pack, tmp_path: Path) -> None:
    parts = shaken(folders.assemble(kind))
    save_bundle(tmp_path / "bundle", parts, training={"run": "test", "step": 3})
    loaded = load_pretrained_model(tmp_path / "bundle")
    assert torch.equal(losses(loaded, samples, pack), losses(parts, samples, pack))
    assert loaded.manifest.training == {"run": "test", "step": 3}
    assert loaded.tokenizer.get_vocab() == parts.tokenizer.get_vocab()
    assert (loaded.image_spec, loaded.template) == (parts.image_spec, parts.template)


@pytest.mark.parametrize("kind", fakes.TOWERS)
def test_round_trip_of_every_tower(kind: str, folders, samples, pack, tmp_path: Path) -> None:
    parts = shaken(folders.assemble(tower=kind))
    save_bundle(tmp_path / "bundle", parts)
    assert torch.equal(losses(load_pretrained_model(tmp_path / "bundle"), samples, pack), losses(parts, samples, pack))


@pytest.mark.parametrize("kind", fakes.LANGUAGE_MODELS)
def test_language_model_is_an_ordinary_folder(kind: str, folders, tmp_path: Path) -> None:
    parts = folders.assemble(kind)
    save_bundle(tmp_path / "bundle", parts)
    plain = tmp_path / "plain"
    transformers.AutoModelForCausalLM.from_pretrained(folders.language_model(kind)).save_pretrained(plain)
    assert tensor_names(tmp_path / "bundle" / "language_model") == tensor_names(plain)
    found, expected = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "bundle/language_model", plain))
    assert found == expected


def test_vision_tower_is_an_ordinary_folder(folders, tmp_path: Path) -> None:
    save_bundle(tmp_path / "bundle", folders.assemble())
    assert tensor_names(tmp_path / "bundle" / "vision_tower") == tensor_names(folders.tower())
    assert (tmp_path / "bundle" / "vision_tower" / "preprocessor_config.json").exists()


def test_projector_has_llavas_names(folders, tmp_path: Path) -> None:
    save_bundle(tmp_path / "bundle", folders.assemble())
    with safe_open(tmp_path / "bundle" / "projector.safetensors", "pt") as tensors:
        assert set(tensors.keys()) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_tied_head_is_written_once_though_gathered_apart(folders, samples, pack, tmp_path: Path) -> None:
    parts = folders.assemble("llama_tied")
    gathered = {name: tensor.clone() for name, tensor in parts.llava.state_dict().items()}
    assert "language_model.lm_head.weight" in gathered
    save_bundle(tmp_path / "bundle", parts, gathered)
    assert "lm_head.weight" not in tensor_names(tmp_path / "bundle" / "language_model")
    assert torch.equal(losses(load_pretrained_model(tmp_path / "bundle"), samples, pack), losses(parts, samples, pack))


def test_given_tensors_are_written_not_the_models(folders, samples, pack, tmp_path: Path) -> None:
    """Under ZeRO 3 the module's own tensors are empty, and its names for them are not to be trusted."""
    parts = folders.assemble()
    expected = losses(parts, samples, pack)
    gathered = {name: tensor.clone() for name, tensor in parts.llava.state_dict().items()}
    for parameter in parts.llava.parameters():
        parameter.data = torch.empty(0)
    save_bundle(tmp_path / "bundle", parts, gathered)
    assert torch.equal(losses(load_pretrained_model(tmp_path / "bundle"), samples, pack), expected)


def without(name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key != name}


@pytest.mark.parametrize("change", ["missing", "empty", "unknown"])
def test_tensors_that_do_not_fit_are_refused(change: str, folders, tmp_path: Path) -> None:
    parts = folders.assemble()
    name = "language_model.model.norm.weight"
    tensors = {
        "missing": without(name, parts.llava.state_dict()),
        "empty": {**parts.llava.state_dict(), name: torch.empty(0)},
        "unknown": {**parts.llava.state_dict(), "language_model.model.other": torch.zeros(1)},
    }[change]
    with pytest.raises(BundleError, match=r"1 tensors do not fit LlamaForCausalLM, the first is model\.(norm|other)"):
        save_bundle(tmp_path / "bundle", parts, tensors)
    assert list(tmp_path.iterdir()) == []


def test_alignment_bundle_names_its_parts(folders, samples, pack, tmp_path: Path) -> None:
    parts = folders.assemble(tune_mm_mlp_adapter=True)
    with torch.no_grad():
        parts.llava.projector[0].weight.add_(1.0)
    save_bundle(tmp_path / "bundle", parts, include="projector")
    assert not (tmp_path / "bundle" / "language_model").exists()
    assert not (tmp_path / "bundle" / "vision_tower").exists()
    assert torch.equal(losses(load_pretrained_model(tmp_path / "bundle"), samples, pack), losses(parts, samples, pack))


def test_alignment_bundle_of_a_bundle_names_that_bundles_parts(folders, samples, pack, tmp_path: Path) -> None:
    save_bundle(tmp_path / "first", shaken(folders.assemble()))
    parts = assemble(ModelConfig(model_name_or_path=str(tmp_path / "first")), "pad")
    save_bundle(tmp_path / "second", parts, include="projector")
    assert read_manifest(tmp_path / "second").language_model.base == str(tmp_path / "first" / "language_model")
    assert torch.equal(losses(load_pretrained_model(tmp_path / "second"), samples, pack), losses(parts, samples, pack))


def test_a_project_that_is_copied_finds_its_own_parts(folders, samples, pack, tmp_path: Path) -> None:
    here = tmp_path / "here"
    tower = fakes.make_vision_tower(here / "parts/tower")
    base = fakes.make_language_model(here / "parts/base")
    save_bundle(here / "whole", assemble(ModelConfig(model_name_or_path=str(base), vision_tower=str(tower)), "pad"))
    parts = assemble(ModelConfig(model_name_or_path=str(here / "whole")), "pad")
    save_bundle(here / "runs/aligned", parts, include="projector")
    for bundle in (here / "whole", here / "runs/aligned"):
        assert str(tmp_path) not in (bundle / "llava.json").read_text()
    shutil.copytree(here, tmp_path / "there")
    here.rename(tmp_path / "gone")
    there = tmp_path / "there"
    assert read_manifest(there / "runs/aligned").language_model.base == str(there / "whole/language_model")
    assert read_manifest(there / "whole").vision_tower.base == str(there / "parts/tower")
    assert torch.equal(
        losses(load_pretrained_model(there / "runs/aligned"), samples, pack), losses(parts, samples, pack)
    )


def test_a_bundle_that_is_copied_alone_within_its_project_finds_its_base(folders, tmp_path: Path) -> None:
    save_bundle(tmp_path / "runs/first/model", folders.assemble())
    parts = assemble(ModelConfig(model_name_or_path=str(tmp_path / "runs/first/model")), "pad")
    save_bundle(tmp_path / "runs/second/model", parts, include="projector")
    shutil.copytree(tmp_path / "runs/second/model", tmp_path / "runs/best")
    found = read_manifest(tmp_path / "runs/best").language_model.base
    assert found == str(tmp_path / "runs/first/model/language_model")


@pytest.mark.parametrize(
    ("base", "written"),
    [
        ("/project/parts/base", "../../parts/base"),
        ("/project/runs/run/inside", "./inside"),
        ("/elsewhere/base", "../../../elsewhere/base"),
        ("lmsys/vicuna-7b-v1.5", "lmsys/vicuna-7b-v1.5"),
        ("...", "..."),
    ],
)
def test_a_manifest_names_a_folder_as_the_way_from_its_own(base: str, written: str) -> None:
    place = Path("/project/runs/run")
    assert relative_base(base, place) == written
    assert absolute_base(written, place) == base
    assert absolute_base(base, place) == base  # as manifests of earlier versions have it
    assert relative_base(base, "s3://bucket/run") == base


@pytest.mark.parametrize("base", ["../" * 500_000 + "x", "./\0", "../" + "a" * 100_000, "./", "../..", "./\ud83d"])
def test_odd_bases_are_answered_at_once(base: str) -> None:
    assert isinstance(absolute_base(base, Path("/project/runs/run")), str)


def test_another_base_is_refused(folders, tmp_path: Path) -> None:
    base = fakes.make_language_model(tmp_path / "base", seed=0)
    config = ModelConfig(model_name_or_path=str(base), vision_tower=str(folders.tower()))
    save_bundle(tmp_path / "bundle", assemble(config, "pad"), include="projector")
    fakes.make_language_model(base, seed=1)
    with pytest.raises(BundleError, match=r"language model in .*base is not the one that the bundle was made with"):
        load_pretrained_model(tmp_path / "bundle")


def test_moved_base_can_be_pointed_at(folders, samples, pack, tmp_path: Path) -> None:
    base = fakes.make_language_model(tmp_path / "base")
    tower = fakes.make_vision_tower(tmp_path / "tower")
    parts = assemble(ModelConfig(model_name_or_path=str(base), vision_tower=str(tower)), "pad")
    save_bundle(tmp_path / "bundle", parts, include="projector")
    base.rename(tmp_path / "moved")
    tower.rename(tmp_path / "moved_tower")
    with pytest.raises(ModelError, match=r"no such language model: .*base"):
        load_pretrained_model(tmp_path / "bundle")
    loaded = load_pretrained_model(
        tmp_path / "bundle", model_base=tmp_path / "moved", vision_tower=tmp_path / "moved_tower"
    )
    assert torch.equal(losses(loaded, samples, pack), losses(parts, samples, pack))


def test_exchanged_weights_inside_are_refused(folders, tmp_path: Path) -> None:
    save_bundle(tmp_path / "bundle", folders.assemble())
    fakes.make_vision_tower(tmp_path / "bundle" / "vision_tower", seed=9)
    with pytest.raises(BundleError, match=r"vision tower in .* is not the one"):
        load_pretrained_model(tmp_path / "bundle")


def test_no_bundle_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"is no llava_ray bundle"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format_version": 2}, "format_version"),
        ({"colour": "red"}, "colour: Extra inputs"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
)
def test_unknown_manifest_is_refused(change: dict[str, object], match: str, folders, tmp_path: Path) -> None:
    save_bundle(tmp_path / "bundle", folders.assemble(), include="projector")
    file = tmp_path / "bundle" / "llava.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(BundleError, match=rf"llava.json is not a manifest of format 1: .*{match}"):
        load_pretrained_model(tmp_path / "bundle")


def test_going_on_from_a_bundle(folders, samples, pack, tmp_path: Path) -> None:
    """Template, aspect ratio and length are the next run's; what the projector was trained with must stay."""
    parts = shaken(folders.assemble(version="plain", mm_projector_type="linear", mm_vision_select_layer=-1))
    save_bundle(tmp_path / "bundle", parts)
    config = ModelConfig(
        model_name_or_path=str(tmp_path / "bundle"),
        version="v1",
        mm_projector_type="linear",
        mm_vision_select_layer=-1,
    )
    later = assemble(config, "square", model_max_length=512)
    assert torch.equal(losses(later, samples, pack), losses(parts, samples, pack))
    manifest = later.manifest
    assert (manifest.version, manifest.image_aspect_ratio, manifest.model_max_length) == ("v1", "square", 512)
    with pytest.raises(ModelError, match=r"mm_vision_select_layer is -2, .* trained with -1; set it so"):
        assemble(config.replaced({"mm_vision_select_layer": -2}), "square")
    with pytest.raises(ModelError, match=r"includes its own vision tower .*elsewhere is configured"):
        assemble(config.replaced({"vision_tower": "elsewhere"}), "square")
    same_tower = config.replaced({"vision_tower": str(folders.tower())})
    assert assemble(same_tower, "square").manifest.vision_tower == manifest.vision_tower


def test_lineage_names_what_was_tuned(folders, tmp_path: Path) -> None:
    save_bundle(tmp_path / "bundle", folders.assemble())
    part = read_manifest(tmp_path / "bundle").language_model
    assert part.inside
    assert part.base == str(folders.language_model())


def test_second_stage_starts_from_the_first_ones_projector(folders, tmp_path: Path) -> None:
    first = folders.assemble(version="plain", tune_mm_mlp_adapter=True)
    with torch.no_grad():
        first.llava.projector[2].bias.fill_(0.5)
    save_bundle(tmp_path / "aligned", first, include="projector")
    second = folders.assemble(pretrain_mm_mlp_adapter=str(tmp_path / "aligned"))
    assert torch.equal(second.llava.projector[2].bias, first.llava.projector[2].bias)
    with pytest.raises(ModelError, match="trained with mm_vision_select_layer -2"):
        folders.assemble(pretrain_mm_mlp_adapter=str(tmp_path / "aligned"), mm_vision_select_layer=-1)


def test_projector_of_another_tower_width_is_refused(folders, tmp_path: Path) -> None:
    wide = fakes.make_vision_tower(tmp_path / "wide", hidden_size=64)
    parts = assemble(folders.config(vision_tower=str(wide)), "pad")
    save_bundle(tmp_path / "aligned", parts, include="projector")
    with pytest.raises(ModelError, match=r"mlp2x_gelu from tower width 64 .* expected mlp2x_gelu from tower width 48"):
        folders.assemble(pretrain_mm_mlp_adapter=str(tmp_path / "aligned"))


def test_new_projector_depends_on_the_seed_alone(folders) -> None:
    def weights(seed: int) -> torch.Tensor:
        state: torch.Tensor = assemble(folders.config(), "pad", seed=seed).llava.projector[0].weight
        return state

    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = weights(5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(weights(5), first)
    assert not torch.equal(weights(6), first)


def test_a_bundle_is_replaced_only_when_the_new_one_is_whole(folders, tmp_path: Path) -> None:
    parts = folders.assemble()
    save_bundle(tmp_path / "bundle", parts, training={"step": 1})
    with pytest.raises(BundleError):
        save_bundle(tmp_path / "bundle", parts, without("language_model.lm_head.weight", parts.llava.state_dict()))
    assert read_manifest(tmp_path / "bundle").training == {"step": 1}
    save_bundle(tmp_path / "bundle", parts, training={"step": 2})
    assert read_manifest(tmp_path / "bundle").training == {"step": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_other_folders_are_not_overwritten(folders, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(BundleError, match="exists already and is not a llava_ray bundle"):
        save_bundle(tmp_path, folders.assemble())
    assert (tmp_path / "thesis.txt").exists()


def test_unwritable_folder_is_said_so(folders, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match=r"cannot be written to .*choose a folder that can be written"):
        save_bundle(tmp_path / "file" / "bundle", folders.assemble())


@pytest.mark.skipif(not os.access("/dev/full", os.W_OK), reason="no /dev/full here")
def test_full_disk_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="No space left"), replacing(tmp_path / "bundle"):
        Path("/dev/full").write_text("x")
    assert list(tmp_path.iterdir()) == []


def test_invalid_generation_config_does_not_spoil_a_save(folders, tmp_path: Path) -> None:
    parts = folders.assemble()
    parts.llava.language_model.generation_config.temperature = 0.9  # without do_sample, as Vicuna ships it
    with pytest.raises(ValueError, match="temperature"):
        parts.llava.language_model.save_pretrained(tmp_path / "plain")
    save_bundle(tmp_path / "bundle", parts)
    assert load_pretrained_model(tmp_path / "bundle").llava.language_model.generation_config.eos_token_id == fakes.EOS


def test_valid_generation_config_is_kept() -> None:
    config = transformers.GenerationConfig(do_sample=True, temperature=0.9, eos_token_id=2)
    assert sanitize_generation_config(config) is config


def test_bfloat16_bundle(folders, tmp_path: Path) -> None:
    parts = assemble(folders.config(), "pad", dtype=torch.bfloat16)
    save_bundle(tmp_path / "bundle", parts)
    config = json.loads((tmp_path / "bundle" / "language_model" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    loaded = load_pretrained_model(tmp_path / "bundle", dtype=torch.bfloat16)
    assert {p.dtype for p in [*loaded.llava.parameters(), *loaded.tower.parameters()]} == {torch.bfloat16}
    assert all(torch.equal(a, b) for a, b in zip(loaded.llava.parameters(), parts.llava.parameters(), strict=True))


def test_blueprint_needs_no_weights(folders, tmp_path: Path) -> None:
    save_bundle(
        tmp_path / "bundle", folders.assemble(tower="dinov2_with_registers", mm_vision_select_feature="cls_patch")
    )
    for file in (tmp_path / "bundle").rglob("*.safetensors"):
        file.unlink()
    blueprint = read_pretrained_blueprint(tmp_path / "bundle")
    assert blueprint.image_tokens.num_features == 16 + 5
    assert (blueprint.hidden_size, blueprint.mm_hidden_size) == (fakes.WIDTH, fakes.TOWER_WIDTH)
    assert (blueprint.image_spec.height, blueprint.image_spec.aspect_ratio) == (fakes.IMAGE_SIZE, "pad")


def test_tower_alone(folders) -> None:
    parts = folders.assemble()
    pixels = torch.randn(1, 3, fakes.IMAGE_SIZE, fakes.IMAGE_SIZE)
    assert torch.equal(load_tower(parts.config)(pixels), parts.tower(pixels))


def test_tokenizer_pads_without_growing(folders) -> None:
    tokenizer = read_blueprint(folders.config(), "pad").tokenizer
    assert tokenizer.pad_token == "<unk>"
    assert len(tokenizer) == 300


def test_partitioned_loading_covers_the_language_model_only(folders) -> None:
    events: list[str] = []

    class Context:
        def __enter__(self) -> None:
            events.append("enter")

        def __exit__(self, *error: object) -> None:
            events.append("exit")

    assemble(folders.config(), "pad", language_model_context=Context())
    assert events == ["enter", "exit"]


def test_longer_samples_than_positions_are_refused(folders) -> None:
    with pytest.raises(ModelError, match=r"model_max_length is 4096, but .*llama was trained on 2048 positions"):
        assemble(folders.config(), "pad", model_max_length=4096)
