"""Vision transformers of timm as towers, by settings alone: the folder of the tower is named, nothing else.

timm wants torchvision, with which transformers chooses other image processors: both lie in an environment of their own
(``make test-timm``), and these tests are passed over where they are not.
"""

import json
from pathlib import Path

import pytest
import torch
from losses import token_losses
from PIL import Image
from safetensors.torch import load_file, save_file

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.errors import ModelError
from llava_ray.generate.chat import ChatSession
from llava_ray.images.geometry import crop_pixels
from llava_ray.model.assembly import LlavaParts, assemble, load_tower
from llava_ray.model.blueprint import read_blueprint
from llava_ray.model.formats.hub.write import export_hub
from llava_ray.model.formats.inspection import inspect
from llava_ray.model.formats.model_opening import open_model
from llava_ray.model.freezing import freeze
from llava_ray.model.loading import load_pretrained_model
from llava_ray.model.network.tower import VisionTower
from llava_ray.model.saving import save_bundle
from llava_ray.model.summary import count_positions, summarize_model

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.slow
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4}
KINDS = {
    "plain": ("vit_tiny_patch16_224", TINY),
    "registers": ("vit_small_patch14_reg4_dinov2", TINY),
    "siglip": ("vit_base_patch16_siglip_224", {**TINY, "num_classes": 0}),
    "clip": ("vit_base_patch16_clip_224", TINY),
    "eva": ("eva02_tiny_patch14_224", TINY),
}


def make_tower(folder: Path, kind: str = "plain", **data: object) -> Path:
    architecture, settings = KINDS[kind]
    torch.manual_seed(5)
    model = timm.create_model(architecture, pretrained=False, **settings)
    timm.models.save_for_hf(model, folder, safe_serialization=True, data_config=data or None)
    return folder


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tower(tmp_path_factory.mktemp("timm") / "plain")


def put_together(folders, tower: Path, **settings: object) -> LlavaParts:
    return assemble(folders.config(vision_tower=str(tower), **settings), "pad", seed=3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [-2, -1, (1, 3)])
def test_features_are_timms_own_hidden_states(kind: str, layer, folders, tmp_path: Path) -> None:
    folder = make_tower(tmp_path / kind, kind)
    architecture, settings = KINDS[kind]
    whole = timm.create_model(architecture, pretrained=False, **settings).eval()
    whole.load_state_dict(load_file(folder / "model.safetensors"))
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    states = [spatial for spatial in whole.forward_intermediates(pixels, output_fmt="NLC", intermediates_only=True)]
    wanted = [layer] if isinstance(layer, int) else layer
    expected = torch.cat([states[index if index < 0 else index - 1] for index in wanted], dim=-1)
    found = load_tower(folders.config(vision_tower=str(folder), mm_vision_select_layer=layer))
    assert torch.equal(found(pixels), expected)
    full = load_file(folder / "model.safetensors")
    assert {name: tensor.shape for name, tensor in found.full_state_dict().items()} == {
        name: tensor.shape for name, tensor in full.items()
    }
    assert len(found.backbone.blocks) == max(3 + 1 + index if index < 0 else index for index in wanted)
    kept = load_tower(folders.config(vision_tower=str(folder), mm_vision_select_feature="cls_patch"))
    assert kept(pixels).shape[1] == 16 + kept.num_prefix_tokens == 16 + whole.num_prefix_tokens


@pytest.mark.parametrize(
    "data",
    # Even margins: an odd one is rounded up by torchvision and down here, as by transformers.
    [
        {"crop_pct": 0.5},
        {"crop_pct": 1.0},
        {"crop_mode": "squash", "crop_pct": 0.5},
        {"interpolation": "bilinear", "mean": (0.4,) * 3, "crop_pct": 1.0},
    ],
)
def test_images_become_what_timms_own_transform_makes(data, folders, tmp_path: Path) -> None:
    folder = make_tower(tmp_path / "tower", **data)
    blueprint = read_blueprint(folders.config(vision_tower=str(folder)), "square")
    values = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    transform = timm.data.create_transform(**{key: values[key] for key in keys})
    image = Image.effect_noise((60, 40), 60).convert("RGB")
    spec = blueprint.image_spec
    found = torch.tensor(crop_pixels(image, spec)).float() * spec.rescale_factor
    mean, std = (torch.tensor(each)[:, None, None] for each in (spec.mean, spec.std))
    torch.testing.assert_close((found - mean) / std, transform(image), atol=1e-5, rtol=1e-5)


def test_two_steps_one_answer_and_a_bundle(tower: Path, folders, samples, tmp_path: Path) -> None:
    parts = put_together(folders, tower, unfreeze_mm_vision_tower=True)
    freeze(parts.llava, parts.tower, parts.config)
    optimizer = torch.optim.AdamW([p for p in parts.llava.parameters() if p.requires_grad], lr=1e-3)
    sample = samples(parts.image_tokens.num_features)[0]
    pixels = sample.pixels
    parts.tower.enable_checkpointing()
    losses = []
    for _ in range(3):
        loss = token_losses(parts.llava, sample.input_ids, sample.position_ids, sample.labels, pixels=pixels).mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in parts.tower.parameters() if p.requires_grad)
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]
    save_bundle(tmp_path / "bundle", parts, parts.llava.state_dict(), include="all")
    loaded = load_pretrained_model(tmp_path / "bundle")
    assert torch.equal(loaded.tower(pixels), parts.tower.eval()(pixels))
    expected, found = parts.tower.full_state_dict(), loaded.tower.full_state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in found)
    assert loaded.image_spec == parts.image_spec
    assert loaded.tower_source.origin == str(tower)
    assert timm.create_model(f"local-dir:{tmp_path / 'bundle' / 'vision_tower'}", pretrained=True).embed_dim == 48
    told = inspect(tmp_path / "bundle")
    assert not told.missing
    answers = [ask(each) for each in (parts, loaded)]
    assert answers[0] == answers[1] and len(answers[0]) == 4
    with pytest.raises(ModelError, match=r"vit_tiny_patch16_224.*no layout of other programs holds"):
        export_hub(open_model(tmp_path / "bundle"), tmp_path / "hub", "padded")


def ask(parts: LlavaParts) -> list[int]:
    session = ChatSession(parts, max_new_tokens=4, temperature=0.0, pending=[Image.new("RGB", (40, 30), "red")])
    return session.ask("what is it?").ids


def test_the_summary_counts_it_without_weights(tower: Path, folders) -> None:
    settings = folders.config(vision_tower=str(tower)).model_dump()
    card = summarize_model(FinetuneConfig.parsed({"model": settings, "data": {"data_path": "data.json"}}))
    whole = sum(tensor.numel() for tensor in load_file(tower / "model.safetensors").values())
    part = card.part("vision_tower")
    assert part is not None
    assert (part.num_total, part.num_trainable, part.kind) == (whole, 0, "timm_vit")
    assert (card.image_side, count_positions(card.tower, 32)) == (32, 17)


def test_a_frozen_tower_stays(tower: Path, folders) -> None:
    parts = put_together(folders, tower)
    assert isinstance(parts.tower, VisionTower)
    assert not any(parameter.requires_grad for parameter in parts.tower.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "resnet18", "model_args": {}}, "'resnet18' is no vision transformer"),
        ({"architecture": "no_such_vit"}, "timm .* makes no 'no_such_vit'"),
        ({"model_args": {**TINY, "nonsense": 1}}, "nonsense"),
        ({"model_args": {**TINY, "depth": 4}}, r"blocks\.3\.\S+ is not there"),
        ({"model_args": {**TINY, "embed_dim": 96}}, r"is \(.*48.*\), expected \(.*96"),
        ({"model_args": {**TINY, "depth": 10**9}}, "depth is 1000000000, expected at most"),
        ({"model_args": {**TINY, "patch_drop_rate": 0.5}}, "patch_drop_rate drops patches"),
        ({"pretrained_cfg": {"crop_mode": "border"}}, "crop_mode is 'border'"),
        ({"pretrained_cfg": {"input_size": [1, 32, 32]}}, "input_size is"),
        ({"pretrained_cfg": {"input_size": [3, 64, 64]}}, "makes 64 x 64 pixels, but the tower takes 32 x 32"),
        ({"pretrained_cfg": {"mean": None}}, "mean is None, expected three numbers"),
        ({"pretrained_cfg": {"std": [0, 1, 1]}}, "image_std is"),
    ],
)
def test_what_is_no_tower_is_refused_by_name(change, message: str, tower: Path, folders, tmp_path: Path) -> None:
    values = json.loads((tower / "config.json").read_text())
    values = {**values, **change}
    if "pretrained_cfg" in change:
        own = json.loads((tower / "config.json").read_text())["pretrained_cfg"]
        values["pretrained_cfg"] = {**own, **change["pretrained_cfg"]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    save_file(load_file(tower / "model.safetensors"), tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        put_together(folders, tmp_path)


def test_the_embeddings_beside_other_layers_are_refused(tower: Path, folders) -> None:
    with pytest.raises(ModelError, match="select layers from 1 on, or 0 alone"):
        load_tower(folders.config(vision_tower=str(tower), mm_vision_select_layer=(0, 2)))(torch.zeros(1, 3, 32, 32))
    alone = load_tower(folders.config(vision_tower=str(tower), mm_vision_select_layer=0))
    assert alone(torch.zeros(1, 3, 32, 32)).shape == (1, 16, 48)
