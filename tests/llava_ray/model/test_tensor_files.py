"""Headers and bytes of tensor files, read without torch's or safetensors' own loaders, against these loaders."""

import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llava_ray.errors import ModelError
from llava_ray.model.tensors.tensor_files import read_tensor_file, read_weights
from llava_ray.model.tensors.tensor_reading import LazyTensor, map_tensor, read_tensor, read_tensors

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    named = {str(dtype): (100 * torch.rand(3, 5)).to(dtype) for dtype in DTYPES}
    return named | {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 4), "long": torch.arange(1000.0)}


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_tensors_are_those_of_their_own_library(ending: str, tensors, tmp_path: Path) -> None:
    file = tmp_path / f"model.{ending}"
    save_file(tensors, file) if ending == "safetensors" else torch.save(tensors, file)
    stored = read_tensor_file(file)
    assert stored.keys() == tensors.keys()
    for read in (read_tensor, map_tensor, lambda tensor: LazyTensor(tensor)[...]):
        for name, tensor in tensors.items():
            found = read(stored[name])
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor)
            assert stored[name].num_bytes == tensor.nbytes


def test_float8(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.rand(4).to(dtype) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)}
    save_file(tensors, tmp_path / "model.safetensors")
    for name, tensor in read_tensors(read_tensor_file(tmp_path / "model.safetensors")).items():
        assert torch.equal(tensor.float(), tensors[name].float())


def test_views_of_one_storage(tmp_path: Path) -> None:
    """A .bin may hold transposed, sliced and shared tensors, and parameters."""
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "whole": whole,
        "transposed": whole.T,
        "slice": whole[1:3, 2:5],
        "strided": whole[::2, ::3],
        "row": whole[2],
        "expanded": whole[:1].expand(3, 6),
        "parameter": torch.nn.Parameter(whole),
    }
    torch.save(tensors, tmp_path / "model.bin")
    for name, tensor in read_tensors(read_tensor_file(tmp_path / "model.bin")).items():
        assert torch.equal(tensor, tensors[name]), name


def test_a_modules_state_dict(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    torch.save(module.state_dict(), tmp_path / "model.bin")  # an OrderedDict with metadata
    found = read_tensors(read_tensor_file(tmp_path / "model.bin"))
    assert all(torch.equal(found[name], tensor) for name, tensor in module.state_dict().items())


def test_what_is_no_tensor_is_passed_over(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "step": 3, "name": "x", "more": {"b": torch.ones(2)}}, tmp_path / "model.bin")
    assert list(read_tensor_file(tmp_path / "model.bin")) == ["a"]


def test_changes_are_never_written(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / "model.safetensors")
    [stored] = read_tensor_file(tmp_path / "model.safetensors").values()
    map_tensor(stored).zero_()
    read_tensor(stored).zero_()
    assert torch.equal(read_tensor(stored), torch.ones(4))


def test_safetensors_go_before_bin(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    torch.save({"b": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert read_weights(tmp_path).names == {"a"}


def header(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "has 0 bytes"),
        (b"\0" * 8, "announces a header of 0"),
        (b"\xff" * 100, "announces a header of 18,446,744"),
        (header("not json"), "damaged safetensors header"),
        (header("[1]"), "damaged safetensors header"),
        (header('{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}'), "damaged safetensors header"),
        (header('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}'), "a: 4 bytes for F32"),
        (header('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}'), "a: 4 bytes for F32"),
        (header('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'), "cut off or damaged"),
        (header('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}') + b"\0" * 5, "cut off or damaged"),
    ],
)
def test_damaged_safetensors(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=rf"{tmp_path}/model\.safetensors .*{says}"):
        read_tensor_file(tmp_path / "model.safetensors")


def rewritten(file: Path, member: str, content: bytes, *, compressed: bool = False) -> None:
    """Write a PyTorch file again with one member changed."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", kind) as archive:
        for name, old in members.items():
            archive.writestr(name, content if name.endswith(member) else old)


@pytest.mark.parametrize("num_bytes", [1, 30, 200, 700])
def test_cut_pickle(num_bytes: int, tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    torch.save({"a": torch.ones(100)}, file)
    file.write_bytes(file.read_bytes()[:-num_bytes])
    with pytest.raises(ModelError, match=r"model\.bin is cut off, damaged or no PyTorch file of tensors"):
        read_tensor_file(file)


def test_storage_that_is_too_short(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(100)}, tmp_path / "model.bin")
    rewritten(tmp_path / "model.bin", "data/0", b"\0" * 100)
    with pytest.raises(ModelError, match="storage 0 has 100 bytes of 400"):
        read_tensor_file(tmp_path / "model.bin")


def test_compressed_storage(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(100)}, tmp_path / "model.bin")
    rewritten(tmp_path / "model.bin", "nothing", b"", compressed=True)
    with pytest.raises(ModelError, match="is compressed"):
        read_tensor_file(tmp_path / "model.bin")


@pytest.mark.parametrize("value", [b"\x80\x02K\x01.", pickle.dumps([1, 2]), b"\x80\x02}q\0X", b"garbage", b""])
def test_pickle_that_is_no_dict_of_tensors(value: bytes, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "model.bin")
    rewritten(tmp_path / "model.bin", "data.pkl", value)
    with pytest.raises(ModelError, match=r"model\.bin (holds a|is cut off)"):
        read_tensor_file(tmp_path / "model.bin")


def test_tensor_beyond_its_storage(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(4)}, tmp_path / "model.bin")
    with zipfile.ZipFile(tmp_path / "model.bin") as archive:
        [data] = [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
    assert data.count(b"K\x04") == 2  # the storage's length, and the tensor's
    place = data.rindex(b"K\x04")
    rewritten(tmp_path / "model.bin", "data.pkl", data[:place] + b"K\x09" + data[place + 2 :])
    with pytest.raises(ModelError, match=r"a tensor of shape \(9,\) reaches beyond its storage"):
        read_tensor_file(tmp_path / "model.bin")


def test_old_format(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(4)}, tmp_path / "model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(ModelError, match=r"no PyTorch file .*older than PyTorch 1\.6 have to be saved again"):
        read_tensor_file(tmp_path / "model.bin")


def test_file_cut_while_it_is_read(tmp_path: Path) -> None:
    save_file({"a": torch.ones(100)}, tmp_path / "model.safetensors")
    [stored] = read_tensor_file(tmp_path / "model.safetensors").values()
    stored.file.write_bytes(stored.file.read_bytes()[:-4])
    with pytest.raises(ModelError, match=r"model\.safetensors ends inside tensor a; it was cut off"):
        read_tensor(stored)
