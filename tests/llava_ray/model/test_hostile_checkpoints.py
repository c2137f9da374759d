"""Files that were made to hang, to fill the memory or to raise what nobody catches: each is refused in words."""

import io
import json
import pickle
import resource
import shutil
import struct
import time
import zipfile
from pathlib import Path

import fakes
import pytest
import torch
import transformers
from damage import deep
from originals import copy_golden
from safetensors.torch import load_file, save_file

from llava_ray.errors import ModelError
from llava_ray.model.formats.bundle.write import export_bundle
from llava_ray.model.formats.declared_sizes import check_declared
from llava_ray.model.formats.hub.write import export_hub
from llava_ray.model.formats.inspection import inspect
from llava_ray.model.formats.manifest import fingerprint_weights
from llava_ray.model.formats.model_opening import open_model
from llava_ray.model.loading import describe_model, load_pretrained_model, read_pretrained_blueprint
from llava_ray.model.saving import save_bundle
from llava_ray.model.tensors.tensor_files import read_json_object, read_tensor_file
from llava_ray.model.tensors.tensor_reading import check_finite, read_tensor

ATTACK = Path(__file__).parents[2] / "attack"
READERS = (inspect, read_pretrained_blueprint, load_pretrained_model, open_model)


@pytest.fixture(autouse=True)
def bounded():
    """Every one of these takes moments and little memory."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.monotonic() - start < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # KiB


@pytest.mark.parametrize("name", sorted(path.name for path in ATTACK.glob("[sp]t_*")))
def test_a_hostile_tensor_file_is_refused_by_name(name: str) -> None:
    with pytest.raises(ModelError, match=name):
        read_tensor_file(ATTACK / name)


@pytest.fixture(scope="module")
def bundle(folders, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "bundle"
    save_bundle(folder, folders.assemble())
    return folder


@pytest.fixture(scope="module")
def hub(bundle: Path) -> Path:
    folder = bundle.with_name("hub")
    export_hub(open_model(bundle), folder)
    return folder


@pytest.mark.parametrize("name", sorted(path.name for path in ATTACK.glob("bundle_*")))
def test_a_hostile_bundle_is_refused_by_file(name: str, bundle: Path, tmp_path: Path) -> None:
    """Each has one damaged file; our own model's weights stand in for those it was made of."""
    model = shutil.copytree(bundle, tmp_path / "model")
    for file in (ATTACK / name).iterdir():
        target = model / file.name.replace("__", "/")
        if target.name != "llava.json":
            shutil.copyfile(file, target)
    if "index" in name:
        (model / "language_model/model.safetensors").unlink(missing_ok=True)
    for read in READERS:
        try:
            read(model)
        except ModelError as error:
            assert str(model) in str(error)
    with pytest.raises(ModelError):
        load_pretrained_model(model)


def write_pt(file: Path, data: bytes, *, compression: int = zipfile.ZIP_STORED, **members: bytes) -> Path:
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("a/data.pkl", data)
        for name, content in members.items():
            archive.writestr(f"a/{name}", content)
    return file


NESTED = b"\x80\x02)" + b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(100))


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02Nr" + struct.pack("<I", 2**31 - 1) + b".",  # a memo of 16 GB
        b"\x80\x02}" + NESTED[2:] + b"K\x01s.",  # a key that takes 2 ** 100 steps to hash
        NESTED + b"Q.",
        b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
        b"\x80\x02" + b"(" * 10**6 + b".",
        b"\x80\x02I" + b"9" * 10_000 + b"\n.",
        b"\x80\x02cbuiltins\neval\nX\x03\0\0\x001+1\x85R.",
        pickle.dumps({"a": shutil.rmtree}),
    ],
)
def test_a_hostile_pickle_is_refused(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.bin"):
        read_tensor_file(write_pt(tmp_path / "model.bin", data))


def test_archives_that_lie_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    torch.save({"a": torch.ones(4)}, file)
    with zipfile.ZipFile(file) as archive:
        [data] = [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
    with pytest.raises(ModelError, match="byte order"):
        read_tensor_file(write_pt(file, data, **{"data/0": bytes(16), "byteorder": b"big"}))
    with pytest.raises(ModelError, match="compressed"):
        read_tensor_file(write_pt(file, bytes(2**24), compression=zipfile.ZIP_DEFLATED))
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(file, "w") as archive:
        for _ in range(2):
            archive.writestr("a/data.pkl", data)
    with pytest.raises(ModelError, match="is in it twice"):
        read_tensor_file(file)
    write_pt(file, data, **{"data/0": bytes(16), "data/1": bytes(16)})
    content = bytearray(file.read_bytes())
    first, second = (content.find(b"PK\1\2", content.rfind(b"PK\1\2", 0, -90) + skip) for skip in (0, 1))
    content[second + 42 : second + 46] = content[first + 42 : first + 46]  # the second where the first is
    file.write_bytes(content)
    with pytest.raises(ModelError, match="overlaps"):
        read_tensor_file(file)


def test_a_tensor_of_few_bytes_and_many_numbers_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1).expand(2**30)}, tmp_path / "model.bin")
    with pytest.raises(ModelError, match=r"would take 4,294,967,296 bytes"):
        read_tensor_file(tmp_path / "model.bin")


def with_header(file: Path, header: str, body: bytes = b"") -> Path:
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + body)
    return file


TENSOR = '{"dtype": "F32", "shape": [1], "data_offsets": [%d, %d]}'


@pytest.mark.parametrize(
    ("header", "body", "says"),
    [
        (f'{{"a": {TENSOR % (0, 4)}, "b": {TENSOR % (0, 4)}}}', bytes(4), "b overlaps|'b' overlaps"),
        (f'{{"a": {TENSOR % (4, 8)}}}', bytes(8), "leaves a gap"),
        (f'{{"a": {TENSOR % (0, 4)}, "a": {TENSOR % (4, 8)}}}', bytes(8), "'a' occurs twice"),
        ('{"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}}', b"", "0 bytes for F32"),
        ('{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}', bytes(4), "not lists of sizes"),
        ('{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}', bytes(4), "is none of"),
        ('{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}', bytes(4), "NaN is not JSON"),
        ('{"a": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 4]}}' % ("9" * 5000), bytes(4), "4300 digits"),
        (str(deep(100_000)), b"", "RecursionError"),
        ('{"a": 1}' + " " * 2**24, b"", "announces a header of 16,777,224 bytes"),
    ],
)
def test_a_hostile_header_is_refused(header: str, body: bytes, says: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=says) as caught:
        read_tensor_file(with_header(tmp_path / "model.safetensors", header, body))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": {"b": [1, %s]}}' % ("9" * 50), r"a\.b\.1 is 9{50}, beyond 101 bits"),
        ('{"a": NaN}', "NaN is no value"),
        (f'{{"a": {deep(70)}}}', "more than 64 nested lists or tables"),
        (str(deep(100_000)), "is not JSON"),
        ('{"a": "%s"}' % ("x" * 2**24), "has more than 16,777,216 bytes"),
    ],
)
def test_hostile_json_is_refused(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=rf"config\.json.*{says}"):
        read_json_object(tmp_path / "config.json")


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "", "..", "\0", 5, "x" * 5000]
)
def test_an_index_leads_nowhere_else(shard: object, bundle: Path, tmp_path: Path) -> None:
    model = shutil.copytree(bundle, tmp_path / "model")
    (model / "language_model/model.safetensors").unlink()
    index = model / "language_model/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))
    with pytest.raises(ModelError, match=r"index\.json|is not there"):
        load_pretrained_model(model)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("language_model", "hidden_size", 10**9),
        ("language_model", "hidden_size", 2**24),
        ("language_model", "num_hidden_layers", 10**8),
        ("language_model", "num_hidden_layers", 1000),
        ("language_model", "vocab_size", 10**12),
        ("language_model", "vocab_size", 10**7),
        ("language_model", "intermediate_size", 10**7),
        ("language_model", "num_attention_heads", 0),
        ("language_model", "num_attention_heads", "4"),
        ("language_model", "num_labels", 10**9),
        ("language_model", "head_dim", 2**22),
        ("language_model", "torch_dtype", -2),
        ("language_model", "rms_norm_eps", float("inf")),
        ("vision_tower", "hidden_size", 1e308),
        ("vision_tower", "image_size", 2**62),
        ("vision_tower", "image_size", 8192),
        ("vision_tower", "patch_size", 0),
        ("vision_tower", "num_hidden_layers", -1),
        ("vision_tower", "model_type", ["clip_vision_model"]),
    ],
)
def test_sizes_are_checked_before_anything_is_made(part: str, key: str, value: object, bundle: Path, tmp_path) -> None:
    model = shutil.copytree(bundle, tmp_path / "model")
    config = json.loads((model / part / "config.json").read_text())
    (model / part / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ModelError, match=str(model)):
        load_pretrained_model(model)
    with pytest.raises(ModelError, match=str(model)):
        export_bundle(open_model(model), tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


@pytest.mark.slow
def test_every_language_models_own_sizes_are_taken() -> None:
    """Whatever transformers' defaults are for a language model or a tower of ours, is no fault."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from llava_ray.model.formats.layouts import TOWER_TYPES

    transformers.logging.set_verbosity_error()
    checked = 0
    for kind in (*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *TOWER_TYPES):
        try:
            config = json.loads(CONFIG_MAPPING[kind]().to_json_string())
        except Exception:  # noqa: BLE001 - some have no defaults
            continue
        check_declared(config, kind)
        checked += 1
    assert checked > 100


def test_an_image_processor_is_checked(bundle: Path, tmp_path: Path) -> None:
    model = shutil.copytree(bundle, tmp_path / "model")
    file = model / "vision_tower/preprocessor_config.json"
    values = json.loads(file.read_text())
    for key, value in {
        "image_std": [0, 1, 1],
        "image_mean": "abc",
        "rescale_factor": "x",
        "resample": 77,
        "crop_size": {"height": 10**9, "width": 10**9},
        "auto_map": 0,
        "image_processor_type": {"a": 1},
    }.items():
        file.write_text(json.dumps(values | {key: value}))
        with pytest.raises(ModelError, match=str(model)):
            read_pretrained_blueprint(model)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused(kind: torch.dtype, value: float, tmp_path: Path) -> None:
    weights = torch.full((300, 7), 6e4 if kind is torch.float16 else 3e38, dtype=kind)  # their sum alone overflows
    save_file({"mine": weights}, tmp_path / "model.safetensors")
    assert torch.equal(read_tensor(read_tensor_file(tmp_path / "model.safetensors")["mine"]), weights)
    weights[5, 3] = weights[7, 2] = value
    save_file({"mine": weights}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.safetensors: tensor mine holds 2 of 2,100 numbers that are NaN or"):
        read_tensor(read_tensor_file(tmp_path / "model.safetensors")["mine"])


def test_eight_bits_and_masks() -> None:
    assert check_finite(torch.tensor([448.0, -1]).to(torch.float8_e4m3fn), "a", "f").shape == (2,)
    for kind in (torch.float8_e4m3fn, torch.float8_e5m2):
        with pytest.raises(ModelError, match="holds 1 of 2"):
            check_finite(torch.tensor([float("nan"), 1]).to(kind), "a", "f")
    mask = torch.tensor([-float("inf"), 0.0])
    assert check_finite(mask, "layer.attn_mask", "f") is mask
    with pytest.raises(ModelError, match="holds 1 of 2"):
        check_finite(torch.tensor([float("nan"), 0.0]), "layer.attn_mask", "f")
    assert check_finite(torch.tensor([2**31 - 1], dtype=torch.int32), "ids", "f").dtype is torch.int32


@pytest.mark.parametrize("part", ["language_model/model", "vision_tower/model", "projector"])
def test_a_model_with_nan_is_neither_loaded_nor_exported(part: str, bundle: Path, tmp_path: Path) -> None:
    model = shutil.copytree(bundle, tmp_path / "model")
    file = model / f"{part}.safetensors"
    tensors = load_file(file)
    name = max(tensors)
    tensors[name].view(-1)[-1] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    manifest = json.loads((model / "llava.json").read_text())
    for inside in ("language_model", "vision_tower"):  # as if it had been saved so
        manifest[inside]["fingerprint"] = fingerprint_weights(model / inside)
    (model / "llava.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match=rf"{file}: tensor .* holds 1 of"):
        load_pretrained_model(model)
    with pytest.raises(ModelError, match=rf"{file}: tensor .* holds 1 of"):
        export_bundle(open_model(model), tmp_path / "exported")


def test_a_token_without_a_row_is_refused(tmp_path: Path) -> None:
    model = copy_golden("v15_mlp_pad", tmp_path / "model")
    given = {"version": "v1", "vision_tower": str(model / "tower")}
    settings = json.loads((model / "tokenizer_config.json").read_text())
    box = {"content": "<box>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    settings["added_tokens_decoder"]["32000"] = box | {"special": True}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "added_tokens.json").write_text('{"<box>": 32000}')
    says = r"1 tokens without a row .* 32,000: the first is '<box>' with the id 32000"
    for read in (
        lambda: inspect(model),
        lambda: load_pretrained_model(model, **given),
        lambda: open_model(model, **given),
    ):
        with pytest.raises(ModelError, match=says):
            read()


def test_padding_needs_no_row(tmp_path: Path, folders) -> None:
    """Many published tokenizers have a padding token right behind their vocabulary; it is masked, never looked up."""
    model = fakes.make_language_model(tmp_path / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 300, "content": "<pad>"})
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "<pad>"}))
    assert not inspect(model).notes
    assert load_pretrained_model(model, vision_tower=folders.tower(), version="v1").tokenizer.pad_token_id == 300


def test_a_tokenizer_may_be_for_no_length(bundle: Path, tmp_path: Path) -> None:
    """Many published ones have the number that transformers writes where none is known."""
    model = shutil.copytree(bundle, tmp_path / "model")
    change(model, "tokenizer_config.json", model_max_length=int(1e30))
    assert not inspect(model).missing
    assert read_pretrained_blueprint(model).tokenizer.model_max_length == int(1e30)


def change(folder: Path, name: str, **values: object) -> None:
    config = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    ("file", "key", "value", "setting", "wanted"),
    [
        ("config.json", "vision_feature_layer", -1, "mm_vision_select_layer", -1),
        ("config.json", "vision_feature_layer", [-2, -1], "mm_vision_select_layer", (-2, -1)),
        ("config.json", "vision_feature_select_strategy", "full", "mm_vision_select_feature", "cls_patch"),
        ("preprocessor_config.json", "do_pad", False, "image_aspect_ratio", "square"),
    ],
)
def test_a_hub_folders_own_value_goes_before_what_was_exported(
    file: str, key: str, value: object, setting: str, wanted: object, hub: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(hub, tmp_path / "model")
    assert not inspect(model).notes
    change(model, file, **{key: value})
    found = inspect(model)
    assert found.settings.get(setting) == wanted
    assert any(key in note and "the file's own value is used" in note for note in found.notes)
    blueprint = read_pretrained_blueprint(model)
    assert key in describe_model(blueprint)
    if key != "vision_feature_layer" or value == -1:  # the projector is for features of one layer
        opened = open_model(model)
        assert getattr(opened.manifest, setting) == wanted
        assert any(key in note for note in opened.notes)


def test_a_hub_folders_image_processor_goes_before_what_was_exported(hub: Path, tmp_path: Path) -> None:
    model = shutil.copytree(hub, tmp_path / "model")
    change(model, "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3])
    opened = open_model(model)
    assert opened.preprocessor["image_mean"] == [0.1, 0.2, 0.3]
    assert any("image_mean" in note for note in opened.notes)
    assert read_pretrained_blueprint(model).image_spec.mean == (0.1, 0.2, 0.3)


def test_another_image_token_is_said(hub: Path, tmp_path: Path) -> None:
    model = shutil.copytree(hub, tmp_path / "model")
    change(model, "config.json", image_token_index=5)
    assert "image_token_index is 5" in inspect(model).notes[0]
    assert "image_token_index is 5" in describe_model(load_pretrained_model(model))
    assert open_model(model).num_rows == open_model(hub).num_rows


@pytest.mark.parametrize("noted", [5, {"manifest": [1]}, {"num_rows": "x"}, {"kept": 3}, {"chat_template": {}}])
def test_a_note_that_is_none_is_refused(noted: object, hub: Path, tmp_path: Path) -> None:
    model = shutil.copytree(hub, tmp_path / "model")
    change(model, "config.json", llava_ray=noted)
    with pytest.raises(ModelError, match=r"config\.json: llava_ray"):
        inspect(model)


def test_a_tokenizer_stays_in_its_folder_and_asks_nothing(bundle: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    for values in ({"tokenizer_file": "/etc/passwd"}, {"auto_map": {"AutoTokenizer": ["x--y.Z", None]}}, {"a": 10**30}):
        model = shutil.copytree(bundle, tmp_path / "model", dirs_exist_ok=True)
        change(model, "tokenizer_config.json", **values)
        start = time.monotonic()
        try:
            read_pretrained_blueprint(model)
        except ModelError as error:
            assert str(model) in str(error)
        assert time.monotonic() - start < 10


def test_pipes_and_links_are_no_models_files(bundle: Path, tmp_path: Path) -> None:
    import os

    model = shutil.copytree(bundle, tmp_path / "model")
    (model / "projector.safetensors").unlink()
    os.mkfifo(model / "projector.safetensors")
    with pytest.raises(ModelError, match=r"projector\.safetensors is not there"):
        load_pretrained_model(model)
    (model / "llava.json").unlink()
    (model / "llava.json").symlink_to("/dev/zero")
    with pytest.raises(ModelError, match="is not a known kind of model"):
        load_pretrained_model(model)


def test_weights_that_link_to_a_device_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("/dev/zero")
    with pytest.raises(ModelError, match=r"model\.safetensors is not an ordinary file"):
        fingerprint_weights(tmp_path)
