"""Weight files read and written a tensor at a time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_ray.errors import ModelError
from llava_ray.model.tensors.weight_files import (
    read_folder,
    read_weight_file,
    wrap_tensor,
    write_folder,
    write_weight_file,
)

TENSORS = {
    "b": torch.randn(3, 5, dtype=torch.bfloat16),
    "a": torch.randn(7),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(2.5),
    "h": torch.randn(5).half(),
    "i": torch.arange(3),
    "turned": torch.randn(4, 6).T,
}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[n].dtype == t.dtype and found[n].shape == t.shape and torch.equal(found[n], t)
        for n, t in expected.items()
    )


def test_what_is_written_is_what_the_library_reads(tmp_path: Path) -> None:
    write_weight_file(
        tmp_path / "x.safetensors", {name: wrap_tensor(tensor) for name, tensor in TENSORS.items()}, {"k": "v"}
    )
    assert same(load_file(tmp_path / "x.safetensors"), TENSORS)
    assert same({n: t.load() for n, t in read_weight_file(tmp_path / "x.safetensors").items()}, TENSORS)


def test_an_empty_file_can_be_written(tmp_path: Path) -> None:
    write_weight_file(tmp_path / "x.safetensors", {})
    assert load_file(tmp_path / "x.safetensors") == {}


def test_shards_and_index(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(5)}
    files = write_folder(tmp_path, {n: wrap_tensor(t) for n, t in tensors.items()}, max_shard_bytes=900)
    assert [file.name for file in files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2000
    assert same({n: t.load() for n, t in read_folder(tmp_path).items()}, tensors)


def test_torch_pickles_are_read_too(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    assert same({n: t.load() for n, t in read_folder(tmp_path).items()}, TENSORS)


def test_a_missing_shard_is_named_with_a_tensor(tmp_path: Path) -> None:
    write_folder(tmp_path, {f"t{i}": wrap_tensor(torch.ones(100)) for i in range(4)}, max_shard_bytes=900)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    message = "shard model-00002-of-00002.safetensors is not there, .* holds 2 tensors, the first is t2"
    with pytest.raises(ModelError, match=message):
        read_folder(tmp_path)


@pytest.mark.slow
def test_memory_is_that_of_one_tensor(tmp_path: Path) -> None:
    """240 MB in 60 tensors pass through a process that may grow by 100 MB: torch itself and a few tensors."""
    write_folder(tmp_path, {f"t{i}": wrap_tensor(torch.ones(1_000_000)) for i in range(60)}, max_shard_bytes=10**8)
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from llava_ray.model.tensors.weight_files import read_folder, write_folder\n"
        "def anonymous():\n"
        "    return int(next(l for l in open('/proc/self/status') if l.startswith('RssAnon')).split()[1])\n"
        "folder = Path(sys.argv[1])\n"
        "(folder / 'copy').mkdir()\n"
        "before, most = anonymous(), 0\n"
        "def watched(t):\n"
        "    global most\n"
        "    most = max(most, anonymous())\n"
        "    return t + 1\n"
        "write_folder(folder / 'copy', {n: t.mapped(watched) for n, t in read_folder(folder).items()})\n"
        "print(most - before)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 40_000  # kB; a tensor is 4 MB
    assert torch.equal(read_folder(tmp_path / "copy")["t59"].load(), torch.full((1_000_000,), 2.0))
