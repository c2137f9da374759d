"""The hub layout: plain transformers loads it whole, gives our logits, and from its own files the original's words."""

import json
from pathlib import Path

import pytest
import torch
from originals import GOLDEN, copy_golden
from PIL import Image
from published import read
from safetensors import safe_open
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

from llava_ray.chat.conversation import IMAGE_TOKEN_INDEX
from llava_ray.errors import ModelError
from llava_ray.model.assembly import LlavaParts
from llava_ray.model.formats.hub.write import export_hub
from llava_ray.model.formats.model_opening import open_model
from llava_ray.model.loading import load_pretrained_model
from llava_ray.model.saving import save_bundle

pytestmark = pytest.mark.slow

MODELS = [
    ("llama", "clip", "patch"),
    ("llama_tied", "siglip", "patch"),
    ("mistral", "clip", "cls_patch"),
    ("qwen2", "siglip", "patch"),
    ("qwen3", "clip", "patch"),
    ("gemma", "siglip", "cls_patch"),
    ("phi3", "clip", "patch"),
    ("smollm3", "dinov2", "patch"),
]


def make_bundle(folder: Path, parts: LlavaParts) -> Path:
    """Write a bundle of parts that have all moved a little."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in parts.llava.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    save_bundle(folder, parts)
    return folder


@pytest.mark.parametrize(("language_model", "tower", "feature"), MODELS)
def test_transformers_loads_all_of_it_and_gives_our_logits(language_model, tower, feature, folders, tmp_path) -> None:
    parts = folders.assemble(language_model, tower, mm_vision_select_feature=feature)
    bundle = make_bundle(tmp_path / "bundle", parts)
    export_hub(open_model(bundle), tmp_path / "hub", for_vllm=tower != "dinov2")
    model, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hub", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    loaded = load_pretrained_model(bundle)
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    ours = torch.tensor([[1, 20, *[IMAGE_TOKEN_INDEX] * loaded.image_tokens.num_features, 21, 22, 23]])
    theirs = ours.masked_fill(ours == IMAGE_TOKEN_INDEX, model.config.image_token_index)
    with torch.no_grad():
        embeddings = loaded.llava.embed(ours, loaded.tower(pixels))
        expected = loaded.llava.language_model(inputs_embeds=embeddings).logits
        found = model.eval()(input_ids=theirs, pixel_values=pixels).logits
    torch.testing.assert_close(found[..., : expected.shape[-1]], expected, rtol=1e-5, atol=1e-5)
    best = found[..., : expected.shape[-1]].amax(-1)
    assert (found[..., expected.shape[-1] :].amax(-1) < best).all()  # an added token is never the greedy one


@pytest.mark.parametrize(
    ("name", "kind"),
    [("v15_mlp_pad", LlavaForConditionalGeneration), ("v16_anyres", LlavaNextForConditionalGeneration)],
)
def test_its_processor_and_template_lead_to_the_originals_words(name, kind, tmp_path: Path) -> None:
    """From pictures and questions alone, with nothing of ours: pixels, sequence lengths and greedy ids."""
    source = copy_golden(name, tmp_path / "source")
    export_hub(open_model(source, version="vicuna_v1", vision_tower=str(source / "tower")), tmp_path / "hub")
    model, info = kind.from_pretrained(tmp_path / "hub", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    processor = AutoProcessor.from_pretrained(tmp_path / "hub")
    for case in json.loads((GOLDEN / name / "expected.json").read_text())["generations"]:
        question = case["question"].replace("<image>\n", "")
        content = [{"type": "image"}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        image = Image.open(GOLDEN / name / "images" / case["image"]).convert("RGB")
        inputs = processor(text=[text], images=[image], add_special_tokens=False, return_tensors="pt")
        assert [1, *inputs["pixel_values"].shape][-len(case["pixel_shape"]) :] == case["pixel_shape"]
        assert float(inputs["pixel_values"].mean()) == pytest.approx(case["pixel_mean"], abs=1e-4)
        assert inputs["input_ids"].shape[1] == case["sequence_length"]
        answer = model.generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False)
        assert answer[0, case["sequence_length"] :].tolist() == case["new_token_ids"]


def test_tokens_around_images_stand_in_its_template(folders, tmp_path: Path) -> None:
    save_bundle(tmp_path / "bundle", folders.assemble(mm_use_im_start_end=True))
    exported = export_hub(open_model(tmp_path / "bundle"), tmp_path / "hub", "padded")
    assert not any("chat template" in note for note in exported.notes)
    processor = AutoProcessor.from_pretrained(tmp_path / "hub")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert "<im_start><image><im_end>\nWhat?" in text


def key_names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        return set(tensors.keys())


def vllm_names() -> set[str]:
    """The parameters of vLLM's LlavaForConditionalGeneration over a two-layer Llama and a three-block CLIP.

    Its loader fuses q, k, v and gate, up by itself, from these names.
    """
    names = {f"multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    names |= {"language_model.model.embed_tokens.weight", "language_model.model.norm.weight"}
    names |= {"language_model.lm_head.weight"}
    for layer in range(2):
        inner = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
        inner += ["input_layernorm", "post_attention_layernorm"]
        names |= {f"language_model.model.layers.{layer}.{name}.weight" for name in inner}
    vision = "vision_tower.vision_model"
    names |= {f"{vision}.embeddings.{name}" for name in ("class_embedding", "patch_embedding.weight")}
    names |= {f"{vision}.embeddings.position_embedding.weight"}
    names |= {f"{vision}.{norm}.{k}" for norm in ("pre_layrnorm", "post_layernorm") for k in ("weight", "bias")}
    for block in range(3):
        inner = [f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")]
        inner += ["layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"]
        names |= {f"{vision}.encoder.layers.{block}.{name}.{kind}" for name in inner for kind in ("weight", "bias")}
    return names


def test_its_key_names_are_vllms(folders, tmp_path: Path) -> None:
    export_hub(open_model(make_bundle(tmp_path / "bundle", folders.assemble())), tmp_path / "hub")
    assert key_names(tmp_path / "hub") == vllm_names()


def test_what_vllm_and_older_versions_look_for_is_there(folders, tmp_path: Path) -> None:
    export_hub(open_model(make_bundle(tmp_path / "bundle", folders.assemble("qwen2", "siglip"))), tmp_path / "hub")
    config = read(tmp_path / "hub/config.json")
    text = config["text_config"]
    assert text["architectures"] == ["Qwen2ForCausalLM"]
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == 10000.0
    assert (text["torch_dtype"], config["torch_dtype"]) == ("float32", "float32")
    assert config["tie_word_embeddings"] is text["tie_word_embeddings"] is True
    assert config["vision_feature_select_strategy"] == "full"  # a SigLIP has no token to drop
    tokenizer = read(tmp_path / "hub/tokenizer_config.json")
    assert tokenizer["tokenizer_class"] != "TokenizersBackend"  # of transformers 5 alone
    assert not isinstance(tokenizer.get("extra_special_tokens"), list)
    processor = read(tmp_path / "hub/processor_config.json")
    assert (processor["num_additional_image_tokens"], processor["patch_size"]) == (0, 8)
    assert read(tmp_path / "hub/preprocessor_config.json")["image_processor_type"] == "LlavaImageProcessor"


@pytest.mark.parametrize(("vocabulary", "rows"), [("auto", 320), ("padded", 320), ("kept", None), ("truncated", None)])
def test_rows_of_the_vocabulary(vocabulary, rows, folders, tmp_path: Path) -> None:
    """The tiny tokenizer's 300 ids fill the table: <image> needs room."""
    model = open_model(make_bundle(tmp_path / "bundle", folders.assemble()))
    if rows is None:
        with pytest.raises(
            ModelError, match=r"vocabulary: the tokenizer's ids take 301 rows, but .* Use --vocabulary padded"
        ):
            export_hub(model, tmp_path / "hub", vocabulary)
        assert not (tmp_path / "hub").exists()
        return
    export_hub(model, tmp_path / "hub", vocabulary)
    reopened = open_model(tmp_path / "hub")
    assert reopened.tensors["language_model.model.embed_tokens.weight"].shape[0] == rows
    assert reopened.num_rows == 300


def test_a_table_with_room_is_kept_as_it_is(folders, tmp_path: Path) -> None:
    import fakes

    spacious = fakes.make_language_model(tmp_path / "spacious", vocab_size=310)
    from llava_ray.config.model import ModelConfig
    from llava_ray.model.assembly import assemble

    parts = assemble(ModelConfig(model_name_or_path=str(spacious), vision_tower=str(folders.tower())), "pad")
    export_hub(open_model(make_bundle(tmp_path / "bundle", parts)), tmp_path / "hub", "kept")
    config = read(tmp_path / "hub/config.json")
    assert (config["text_config"]["vocab_size"], config["image_token_index"]) == (310, 300)


@pytest.mark.parametrize(
    ("settings", "tower", "message"),
    [
        ({"mm_projector_type": "linear"}, "clip", "projector: .* it is 'linear', and the layout has two linear layers"),
        ({"mm_projector_type": "mlp3x_gelu"}, "clip", "projector: .* it is 'mlp3x_gelu'"),
        ({}, "siglip2", "vision tower: .* a SigLIP 2 for any aspect ratio takes patches"),
        ({}, "dinov2", "vision tower: vLLM takes CLIP and SigLIP towers, this one is 'dinov2'. --approximate"),
        ({}, "dinov2_with_registers", "vision tower: 'dinov2_with_registers' puts 5 tokens before its patches"),
    ],
)
def test_what_it_cannot_express_is_refused_by_part(settings, tower, message, folders, tmp_path: Path) -> None:
    save_bundle(tmp_path / "bundle", folders.assemble(tower=tower, **settings))
    with pytest.raises(ModelError, match=message):
        export_hub(open_model(tmp_path / "bundle"), tmp_path / "hub")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"s2_scales": (32, 64)}, r"vision tower: .* s2 uses several scales \(32, 64\)"),
        (
            {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial"},
            "image_newline: .* mm_patch_merge_type is 'spatial', the layout supports spatial_unpad",
        ),
        (
            {
                "image_aspect_ratio": "anyres",
                "mm_patch_merge_type": "spatial_unpad",
                "mm_vision_select_feature": "cls_patch",
            },
            "vision tower: .* a class token has no place",
        ),
        (
            {"mm_vision_select_layer": (-2, -1)},
            r"vision tower: features of several layers \(-2, -1\) are selected, vLLM",
        ),
    ],
)
def test_settings_that_it_cannot_express_are_refused(change, message, folders, tmp_path: Path) -> None:
    from dataclasses import replace

    save_bundle(tmp_path / "bundle", folders.assemble())
    model = open_model(tmp_path / "bundle")
    with pytest.raises(ModelError, match=message):
        export_hub(replace(model, manifest=model.manifest.model_copy(update=change)), tmp_path / "hub")


def test_canvases_are_turned_round(tmp_path: Path) -> None:
    """(width, height) in LLaVA, (height, width) in transformers, in the same order: ties go to the first."""
    source = copy_golden("v16_anyres", tmp_path / "source")
    model = open_model(source, version="v1", vision_tower=str(source / "tower"))
    export_hub(model, tmp_path / "hub")
    turned = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
    expected = [[height, width] for width, height in turned]
    assert read(source / "config.json")["image_grid_pinpoints"] == turned
    assert read(tmp_path / "hub/config.json")["image_grid_pinpoints"] == expected
    assert read(tmp_path / "hub/preprocessor_config.json")["image_grid_pinpoints"] == expected


def test_a_foreign_hub_folder_is_described_from_its_config(tmp_path: Path) -> None:
    source = copy_golden("v16_anyres", tmp_path / "source")
    model = open_model(source, version="v1", vision_tower=str(source / "tower"))
    export_hub(model, tmp_path / "hub")
    config = read(tmp_path / "hub/config.json")
    del config["llava_ray"]
    (tmp_path / "hub/config.json").write_text(json.dumps(config))
    foreign = open_model(tmp_path / "hub")
    keys = {"mm_projector_type", "mm_hidden_size", "hidden_size", "mm_vision_select_layer", "mm_vision_select_feature"}
    keys |= {"mm_patch_merge_type", "image_aspect_ratio", "image_grid_pinpoints", "model_max_length", "version"}
    assert foreign.manifest.model_dump(include=keys) == model.manifest.model_dump(include=keys)
    assert foreign.num_rows == 32000  # <image> is the first token that is not the language model's
    assert foreign.preprocessor == model.preprocessor
