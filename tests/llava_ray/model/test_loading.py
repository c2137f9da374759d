"""One model in every layout is one model: the same losses from each, and what a folder is is never guessed."""

import json
from collections.abc import Callable
from pathlib import Path

import fakes
import originals
import peft
import pytest
import torch
import transformers
from losses import token_losses
from safetensors.torch import load_file, save_file

from llava_ray.config.model import ModelConfig
from llava_ray.errors import ModelError
from llava_ray.model.assembly import LlavaParts, assemble, load_tower, merge
from llava_ray.model.blueprint import read_blueprint
from llava_ray.model.formats.layout import LayoutKind
from llava_ray.model.formats.manifest import read_manifest
from llava_ray.model.loading import describe_model, load_pretrained_model, read_pretrained_blueprint
from llava_ray.model.saving import save_bundle

pytestmark = pytest.mark.slow

Writer = Callable[[Path, LlavaParts], Path]


def write_bundle(folder: Path, parts: LlavaParts) -> Path:
    save_bundle(folder, parts)
    return folder


def write_checkpoint(folder: Path, parts: LlavaParts) -> Path:
    """A run's checkpoint, which holds its model as a bundle."""
    save_bundle(folder / "model", parts)
    (folder / "trainer_state.json").write_text("{}")
    (folder / "COMPLETE").touch()
    return folder


def write_exported_original(folder: Path, parts: LlavaParts) -> Path:
    """An export of ours, with the tower beside it and the template noted."""
    originals.write_original(folder, parts)
    config = originals.original_config(parts) | {"llava_ray": {"version": "v1"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


LAYOUTS: dict[str, tuple[Writer, LayoutKind]] = {
    "bundle": (write_bundle, LayoutKind.BUNDLE),
    "checkpoint": (write_checkpoint, LayoutKind.BUNDLE),
    "original": (originals.write_original, LayoutKind.ORIGINAL),
    "original, shards": (lambda f, p: originals.write_original(f, p, num_shards=3), LayoutKind.ORIGINAL),
    "original, bin": (lambda f, p: originals.write_original(f, p, ending="bin"), LayoutKind.ORIGINAL),
    "original, bin shards": (
        lambda f, p: originals.write_original(f, p, ending="bin", num_shards=2),
        LayoutKind.ORIGINAL,
    ),
    "original with tower": (lambda f, p: originals.write_original(f, p, with_tower=True), LayoutKind.ORIGINAL),
    "original, exported": (write_exported_original, LayoutKind.ORIGINAL),
    "lora": (originals.write_lora, LayoutKind.ORIGINAL_LORA),
    "lora, bin": (lambda f, p: originals.write_lora(f, p, ending="bin"), LayoutKind.ORIGINAL_LORA),
    "projector": (originals.write_projector_only, LayoutKind.ORIGINAL_PROJECTOR),
    "hub": (originals.write_hub, LayoutKind.HUB),
    "hub, new names": (lambda f, p: originals.write_hub(f, p, rename=originals.new_hub_name), LayoutKind.HUB),
    "hub, shards": (lambda f, p: originals.write_hub(f, p, num_shards=2), LayoutKind.HUB),
}


@pytest.fixture(scope="module")
def parts(folders) -> LlavaParts:
    """A model all of whose parts have moved away from the folders that it was made from."""
    made = folders.assemble()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in made.llava.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return made


@pytest.fixture(scope="module")
def base(parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its language model as a folder of its own."""
    folder = tmp_path_factory.mktemp("base")
    parts.llava.language_model.save_pretrained(folder)
    parts.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def losses(samples, pack) -> Callable[[LlavaParts], torch.Tensor]:
    def of(parts: LlavaParts) -> torch.Tensor:
        with torch.no_grad():
            result: torch.Tensor = token_losses(
                parts.llava, *pack(parts, samples(parts.image_tokens.num_features)).inputs
            )
        return result

    return of


def needed(kind: LayoutKind, folders, base: Path) -> dict[str, str]:
    """What a folder of that kind does not say itself."""
    if kind is LayoutKind.BUNDLE:
        return {}
    if kind is LayoutKind.HUB:
        return {"version": "v1"}
    over = {"model_base": str(base)} if kind in (LayoutKind.ORIGINAL_LORA, LayoutKind.ORIGINAL_PROJECTOR) else {}
    return {**over, "vision_tower": str(folders.tower()), "version": "v1"}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_the_same_model(name: str, parts, folders, base, losses, tmp_path: Path) -> None:
    write, kind = LAYOUTS[name]
    folder = write(tmp_path / "some model", parts)
    loaded = load_pretrained_model(folder, **needed(kind, folders, base))
    assert loaded.layout.kind is kind
    assert torch.equal(losses(loaded), losses(parts))
    assert not any(module.training for module in [loaded.llava, loaded.tower])
    assert loaded.tokenizer.get_vocab() == parts.tokenizer.get_vocab()
    expected_ratio = "square" if kind is LayoutKind.HUB else "pad"
    assert (loaded.template.name, loaded.image_spec.aspect_ratio) == ("v1", expected_ratio)
    assert describe_model(loaded).startswith(f"{folder}: {kind}, template 'v1'")


@pytest.mark.parametrize("name", LAYOUTS)
def test_fine_tuning_may_start_from_every_layout(name: str, parts, folders, base, losses, tmp_path: Path) -> None:
    write, kind = LAYOUTS[name]
    config = ModelConfig.parsed(
        {"model_name_or_path": str(write(tmp_path / "model", parts)), **needed(kind, folders, base)}
    )
    blueprint = read_blueprint(config, "pad")
    assert (blueprint.image_tokens.num_features, blueprint.hidden_size, blueprint.mm_hidden_size) == (16, 32, 48)
    assert torch.equal(losses(assemble(config, "pad")), losses(parts))
    pixels = torch.randn(1, 3, fakes.IMAGE_SIZE, fakes.IMAGE_SIZE)
    assert torch.equal(load_tower(config)(pixels), parts.tower(pixels))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_blueprint_reads_no_weights(name: str, parts, folders, base, tmp_path: Path) -> None:
    write, kind = LAYOUTS[name]
    folder = write(tmp_path / "model", parts)
    for file in [*folder.rglob("*.safetensors"), *folder.rglob("*.bin")]:
        if file.name != "mm_projector.bin":  # which says what the folder is
            file.unlink()
    blueprint = read_pretrained_blueprint(folder, **needed(kind, folders, base))
    assert blueprint.layout.missing or kind is LayoutKind.ORIGINAL_PROJECTOR
    assert blueprint.image_tokens.num_features == 16


def test_tower_inside_a_checkpoint_is_the_one_that_is_used(parts, folders, tmp_path: Path) -> None:
    """Config and image processor come from the tower that is named, which it was tuned from."""
    folder = originals.write_original(tmp_path / "model", parts, with_tower=True)
    other = fakes.make_vision_tower(tmp_path / "other", seed=8)
    loaded = load_pretrained_model(folder, vision_tower=other, version="v1")
    pixels = torch.randn(1, 3, fakes.IMAGE_SIZE, fakes.IMAGE_SIZE)
    assert torch.equal(loaded.tower(pixels), parts.tower(pixels))


def test_tower_beside_an_export_is_found(parts, folders, losses, tmp_path: Path) -> None:
    folder = write_exported_original(tmp_path / "model", parts)
    fakes.make_vision_tower(folder / "vision_tower")
    assert torch.equal(losses(load_pretrained_model(folder)), losses(parts))


def test_a_llava_is_a_base_too(parts, folders, base, losses, tmp_path: Path) -> None:
    """Of a base that is itself a LLaVA, in any layout, the language model is taken."""
    other = originals.write_hub(tmp_path / "llava", parts)
    aligned = originals.write_projector_only(tmp_path / "projector", parts)
    loaded = load_pretrained_model(aligned, other, vision_tower=folders.tower(), version="v1")
    assert torch.equal(losses(loaded), losses(parts))


def test_a_base_may_be_named_by_the_adapter(parts, folders, base, losses, tmp_path: Path) -> None:
    folder = originals.write_lora(tmp_path / "lora", parts)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(base)}))
    loaded = load_pretrained_model(folder, vision_tower=folders.tower(), version="v1")
    assert torch.equal(losses(loaded), losses(parts))


def test_adapter_over_base_and_merged_are_peft_itself(parts, folders, base, samples, losses, tmp_path: Path) -> None:
    folder = originals.write_lora(tmp_path / "lora", parts)
    file = folder / "adapter_model.safetensors"
    torch.manual_seed(2)
    save_file({name: 0.1 * torch.randn_like(tensor) for name, tensor in load_file(file).items()}, file)
    loaded = load_pretrained_model(folder, base, vision_tower=folders.tower(), version="v1")
    wrapped = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), folder)
    ids = samples(16)[1].input_ids
    with torch.no_grad():
        assert torch.equal(loaded.llava.language_model(ids).logits, wrapped(ids).logits)
    adapted = losses(loaded)
    assert not torch.allclose(adapted, losses(parts))
    torch.testing.assert_close(losses(merge(loaded)), adapted, rtol=0, atol=1e-5)


def test_hub_layout_is_transformers_own(parts, tmp_path: Path) -> None:
    """A folder that transformers wrote gives transformers' logits."""
    vision, text = parts.tower_config.to_dict(), parts.llava.language_model.config.to_dict()
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=299, vision_feature_layer=-2, image_seq_length=16
    )
    torch.manual_seed(4)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    parts.tokenizer.save_pretrained(tmp_path)
    parts.image_processor.save_pretrained(tmp_path)
    loaded = load_pretrained_model(tmp_path, version="v1")
    pixels = torch.randn(1, 3, fakes.IMAGE_SIZE, fakes.IMAGE_SIZE)
    ids = torch.tensor([[1, *[299] * 16, 20, 21]])
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=pixels).logits
        embedded = loaded.llava.embed(ids.masked_fill(ids == 299, -200), loaded.tower(pixels))
        found = loaded.llava.language_model(inputs_embeds=embedded).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_image_processor_that_pads_means_pad(parts, losses, tmp_path: Path) -> None:
    folder = originals.write_hub(tmp_path / "hub", parts)
    file = folder / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"image_processor_type": "LlavaImageProcessor", "do_pad": True}))
    loaded = load_pretrained_model(folder, version="v1")
    assert loaded.image_spec == parts.image_spec


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_weights_are_converted_as_they_are_read(ending: str, dtype: torch.dtype, parts, folders, tmp_path) -> None:
    folder = originals.write_original(tmp_path / "model", parts, ending=ending, num_shards=2)
    loaded = load_pretrained_model(folder, vision_tower=folders.tower(), version="v1", dtype=dtype)
    for name, tensor in loaded.llava.state_dict().items():
        assert torch.equal(tensor, parts.llava.state_dict()[name].to(dtype)), name


# Four bits are few for matrices as small as these.
@pytest.mark.parametrize(("bits", "similarity"), [(8, 0.95), (4, 0.5)])
def test_language_model_alone_is_quantised(
    bits: int, similarity: float, parts, folders, base, samples, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    folder = originals.write_projector_only(tmp_path / "model", parts)
    loaded = load_pretrained_model(folder, base, vision_tower=folders.tower(), version="v1", bits=bits)
    layer = loaded.llava.language_model.model.layers[0].mlp.up_proj
    assert type(layer).__module__.startswith("bitsandbytes")
    assert {p.dtype for p in [*loaded.llava.projector.parameters(), *loaded.tower.parameters()]} == {torch.float32}
    ids = samples(16)[1].input_ids
    with torch.no_grad():
        found, exact = (model.llava.language_model(ids).logits for model in (loaded, parts))
    assert torch.nn.functional.cosine_similarity(found.flatten(), exact.flatten(), dim=0) > similarity


def test_other_bits_are_refused(parts, folders, base, tmp_path: Path) -> None:
    folder = originals.write_projector_only(tmp_path / "model", parts)
    with pytest.raises(ModelError, match="bits is 3; expected 16, 8 or 4"):
        load_pretrained_model(folder, base, vision_tower=folders.tower(), version="v1", bits=3)


def test_plain_language_model_gets_a_new_projector(folders) -> None:
    loaded = load_pretrained_model(folders.language_model(), vision_tower=folders.tower(), version="v1")
    assert loaded.layout.kind is LayoutKind.LANGUAGE_MODEL
    assert "projector is new" in describe_model(loaded)


def test_an_original_can_be_saved_as_a_bundle(parts, folders, losses, tmp_path: Path) -> None:
    folder = originals.write_original(tmp_path / "model", parts, ending="bin", with_tower=True)
    save_bundle(tmp_path / "bundle", load_pretrained_model(folder, vision_tower=folders.tower(), version="v1"))
    bundle = load_pretrained_model(tmp_path / "bundle")
    assert torch.equal(losses(bundle), losses(parts))
    assert read_manifest(tmp_path / "bundle").language_model.base == str(folder)
    config = json.loads((tmp_path / "bundle" / "language_model" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert not [key for key in config if key.startswith(("mm_", "image_", "tokenizer_"))]


def test_alignment_over_an_original_names_it(parts, folders, losses, tmp_path: Path) -> None:
    """A bundle without parts takes them out of the folder that it names, of whatever layout."""
    folder = originals.write_original(tmp_path / "model", parts, with_tower=True)
    loaded = load_pretrained_model(folder, vision_tower=folders.tower(), version="v1")
    save_bundle(tmp_path / "bundle", loaded, include="projector")
    with pytest.raises(ModelError, match="no such vision tower: 'openai/clip"):
        load_pretrained_model(tmp_path / "bundle")  # the folder's own config names no tower that is here
    fakes.make_vision_tower(folder / "vision_tower")
    assert torch.equal(losses(load_pretrained_model(tmp_path / "bundle")), losses(parts))
