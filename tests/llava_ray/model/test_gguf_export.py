"""GGUF files, read again by gguf, by transformers and, where it is installed, by llama.cpp itself."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from engines import make_parts
from transformers import AutoModelForCausalLM

from llava_ray.errors import ModelError
from llava_ray.model.formats.gguf.vision_file import check_vision_for_gguf, count_blocks
from llava_ray.model.formats.gguf.vocabulary_keys import find_vocabulary
from llava_ray.model.formats.gguf.write import export_gguf
from llava_ray.model.formats.model_files import ModelFiles
from llava_ray.model.formats.model_opening import open_model
from llava_ray.model.loading import load_pretrained_model
from llava_ray.model.saving import save_bundle

pytestmark = pytest.mark.slow
IDS = torch.tensor([[1, 20, 21, 22, 23, 40, 41]])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gguf")
    save_bundle(root / "model", make_parts(root), include="all")
    return root / "model"


@pytest.fixture(scope="module")
def opened(bundle: Path) -> ModelFiles:
    return open_model(bundle)


@pytest.fixture(scope="module")
def written(opened: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_gguf(opened, tmp_path_factory.mktemp("files") / "f32", "f32").folder


def read_values(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    found = gguf.GGUFReader(file).tensors
    return {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in found}


def test_transformers_reads_the_language_model_and_gives_our_logits(written: Path, bundle: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(written, gguf_file="model-f32.gguf", dtype=torch.float32)
    ours = load_pretrained_model(bundle).llava.language_model
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, ours(IDS).logits, rtol=1e-5, atol=1e-5)


def test_the_keys_are_the_models(written: Path, opened: ModelFiles) -> None:
    values, config = read_values(written / "model-f32.gguf"), opened.language_config
    assert values["general.architecture"] == "llama"
    assert values["llama.block_count"] == config["num_hidden_layers"]
    assert values["llama.attention.head_count_kv"] == config["num_key_value_heads"]
    assert values["tokenizer.ggml.model"] == "gpt2"
    assert values["tokenizer.ggml.pre"] == "gpt-2"
    assert len(values["tokenizer.ggml.tokens"]) == config["vocab_size"] == values["llama.vocab_size"]
    assert values["tokenizer.ggml.bos_token_id"] == 1
    assert values["tokenizer.ggml.add_bos_token"] is True


def test_rows_without_a_token_are_unused(opened: ModelFiles) -> None:
    found = find_vocabulary(opened, num_rows=303)
    assert found.tokens[300:] == ["[PAD300]", "[PAD301]", "[PAD302]"]
    assert set(found.types[300:]) == {gguf.TokenType.UNUSED}
    assert found.types[1] == gguf.TokenType.CONTROL


def test_mmproj_is_what_llama_cpp_expects(written: Path, opened: ModelFiles) -> None:
    values, arrays = read_values(written / "mmproj-f32.gguf"), read_arrays(written / "mmproj-f32.gguf")
    tower = opened.tower_config
    assert (values["general.architecture"], values["clip.has_vision_encoder"]) == ("clip", True)
    assert values["clip.projector_type"] == "mlp"
    assert values["clip.vision.block_count"] == tower["num_hidden_layers"] - 1 == count_blocks(opened)
    assert values["clip.vision.image_size"] == tower["image_size"]
    assert values["clip.vision.projection_dim"] == opened.manifest.hidden_size
    assert not any(name.startswith(("v.post_ln", f"v.blk.{count_blocks(opened)}.")) for name in arrays)
    own = {name: tensor.load().float().numpy() for name, tensor in opened.tensors.items()}
    assert np.array_equal(arrays["mm.0.weight"], own["projector.0.weight"])
    assert np.array_equal(arrays["mm.2.bias"], own["projector.2.bias"])
    layer = "vision_tower.encoder.layers.0."
    assert np.array_equal(arrays["v.blk.0.ffn_up.weight"], own[f"{layer}mlp.fc1.weight"])
    assert np.array_equal(arrays["v.blk.0.attn_q.weight"], own[f"{layer}self_attn.q_proj.weight"])
    assert np.array_equal(arrays["v.patch_embd.weight"], own["vision_tower.embeddings.patch_embedding.weight"])


@pytest.mark.parametrize(("wanted", "tolerance"), [("f16", 1e-3), ("bf16", 1e-2), ("q8_0", 2e-2)])
def test_other_precisions_are_near(
    opened: ModelFiles, written: Path, tmp_path: Path, wanted: Any, tolerance: float
) -> None:
    folder = export_gguf(opened, tmp_path / wanted, wanted).folder
    found, exact = read_arrays(folder / f"model-{wanted}.gguf"), read_arrays(written / "model-f32.gguf")
    assert found.keys() == exact.keys()
    for name, values in exact.items():
        np.testing.assert_allclose(found[name], values, atol=tolerance * np.abs(values).max())
    assert (folder / "mmproj-f16.gguf").is_file()


def test_what_llama_cpp_does_not_read_is_named(opened: ModelFiles, tmp_path: Path) -> None:
    def with_tower(**changes: object) -> ModelFiles:
        return replace(opened, tower_config={**opened.tower_config, **changes})

    def with_settings(**changes: object) -> ModelFiles:
        return replace(opened, manifest=opened.manifest.model_copy(update=changes))

    for model, why in (
        (with_tower(model_type="dinov2"), "it is 'dinov2'.*--language_model_only"),
        (with_tower(hidden_act="relu"), "hidden_act is 'relu'"),
        (with_settings(mm_projector_type="linear"), "projector: .*it is 'linear'"),
        (with_settings(image_aspect_ratio="anyres"), "'anyres'"),
        (with_settings(mm_vision_select_feature="cls_patch"), "'cls_patch'"),
        (with_settings(mm_vision_select_layer=(-2, -1)), "several layers"),
        (with_settings(s2_scales=(32, 64)), "s2 uses several scales"),
    ):
        with pytest.raises(ModelError, match=why):
            check_vision_for_gguf(model)
    for changes, why in (
        ({"model_type": "gemma"}, "it is 'gemma'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "scaled by 'yarn'"),
        ({"sliding_window": 16}, "sliding window of 16"),
    ):
        changed = replace(opened, language_config={**opened.language_config, **changes})
        with pytest.raises(ModelError, match=why):
            export_gguf(changed, tmp_path / "never")
    assert not (tmp_path / "never").exists()


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_llama_cpp_gives_our_logits_and_greedy_answer(written: Path, bundle: Path) -> None:
    from llama_cpp import Llama

    theirs = Llama(str(written / "model-f32.gguf"), n_ctx=64, logits_all=True, verbose=False)
    ours = load_pretrained_model(bundle).llava.language_model
    ids = IDS[0].tolist()
    theirs.eval(ids)
    with torch.no_grad():
        expected = ours(IDS).logits[0]
        answer = ours.generate(IDS, max_new_tokens=8, do_sample=False, eos_token_id=10**6)[0, len(ids) :].tolist()
    found = torch.from_numpy(np.array(theirs.scores[: len(ids)]))
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    theirs.reset()
    written_ids = [token for token, _ in zip(theirs.generate(ids, temp=0.0, repeat_penalty=1.0), answer, strict=False)]
    assert written_ids == answer
