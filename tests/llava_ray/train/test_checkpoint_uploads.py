"""The thread that writes and commits a staged checkpoint: full disks, on this machine and on storage, without Ray."""

import errno
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pyarrow.fs import LocalFileSystem

from llava_ray.errors import CheckpointError
from llava_ray.train.staging import StagedFiles, copy_tensors, free_memory
from llava_ray.train.uploads import CheckpointUploads


class Storage:
    """Ray's storage of a run: a folder."""

    def __init__(self, folder: Path, error: Exception | None = None) -> None:
        self.storage_filesystem, self.experiment_fs_path, self.error = LocalFileSystem(), str(folder), error

    def persist_current_checkpoint(self, local: Any, name: str) -> str:
        shutil.copytree(local.path, f"{self.experiment_fs_path}/{name}", dirs_exist_ok=True)
        if self.error:
            raise self.error
        return name


class Journal:
    """The recorder, of which only the ledger matters."""

    def __init__(self) -> None:
        self.flushed: list[int] = []
        self.flush = SimpleNamespace(remote=lambda step: self.flushed.append(step) or True)


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CheckpointUploads:
    """Rank 0's uploads, and a folder for what it stages."""
    monkeypatch.setattr("llava_ray.train.uploads.ray.get", lambda value: value)
    (tmp_path / "local").mkdir()
    return CheckpointUploads(Journal(), 0)


def upload(uploads: CheckpointUploads, storage: Storage, writes: list[Any], monkeypatch: Any, folder: Path) -> Any:
    context = SimpleNamespace(get_storage=lambda: storage)
    monkeypatch.setattr("llava_ray.train.uploads.ray.train.get_context", lambda: context)
    return uploads.upload(writes, 8, uploads.ended, SimpleNamespace(path=str(folder / "local")), "step-8")


def test_what_was_staged_is_on_storage_before_ray_commits_it(uploads, monkeypatch, tmp_path):
    writes = [lambda: (tmp_path / "local/a").write_text("a")]
    assert upload(uploads, Storage(tmp_path / "run"), writes, monkeypatch, tmp_path) == "step-8"
    assert (tmp_path / "run/step-8/a").read_text() == "a"
    assert uploads.journal.flushed == [8]
    assert not writes  # the memory is free
    uploads.wait()


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
    OSError("When writing: [Errno 28] No space left on device"),
]


@pytest.mark.parametrize("error", FULL, ids=["os", "torch", "arrow"])
@pytest.mark.parametrize("where", ["local", "storage"])
def test_a_disk_that_fills_up_is_named_and_nothing_half_written_stays(error, where, uploads, monkeypatch, tmp_path):
    (tmp_path / "run/step-8").mkdir(parents=True)
    (tmp_path / "run/step-8/of another rank").touch()

    def fill() -> None:
        if where == "local":
            raise error

    writes = [lambda: (tmp_path / "local/a").write_text("a"), fill]
    storage = Storage(tmp_path / "run", error if where == "storage" else None)
    named = tmp_path / ("local" if where == "local" else "run/step-8")
    remedy = "set TMPDIR" if where == "local" else "choose another run.storage_path"
    with pytest.raises(CheckpointError, match=f"step 8 to {named} .*GiB free there.*{remedy}.*last complete"):
        upload(uploads, storage, writes, monkeypatch, tmp_path)
    assert not (tmp_path / "local").exists()
    assert [path.name for path in (tmp_path / "run/step-8").iterdir()] == ["of another rank"]
    with pytest.raises(CheckpointError, match="step 8"):  # at the next save, if Ray has not ended the worker before
        uploads.wait()


def test_an_error_that_ray_may_try_again_keeps_what_is_written(uploads, monkeypatch, tmp_path):
    storage = Storage(tmp_path / "run", OSError("AWS Error SLOW_DOWN"))
    writes = [lambda: (tmp_path / "local/a").write_text("a")]
    uploads.ended = threading.Event()  # as a started save leaves it
    with pytest.raises(OSError, match="SLOW_DOWN"):
        upload(uploads, storage, writes, monkeypatch, tmp_path)
    assert uploads.ended.is_set()  # a later save would wait for ever
    with pytest.raises(CheckpointError, match=r"after step 8 could not be stored: .*SLOW_DOWN.*last complete"):
        uploads.wait()
    storage.error = None
    assert upload(uploads, storage, writes, monkeypatch, tmp_path) == "step-8"
    uploads.wait()


def test_a_copy_shares_nothing_with_its_state_and_keeps_its_shape():
    tensor = torch.arange(6.0)
    module = torch.nn.Linear(2, 2)
    state = {"a": tensor, "again": [tensor, (tensor[2:4], 3)], "module": module.state_dict(), "p": module.weight}
    copied = copy_tensors(state)
    tensor.fill_(7)
    assert copied["a"].tolist() == [0, 1, 2, 3, 4, 5]
    assert copied["again"][0] is copied["a"]
    assert copied["again"][1][0].untyped_storage().nbytes() == 8  # not all that it was a view of
    assert copied["module"]._metadata == state["module"]._metadata
    assert type(copied["p"]) is torch.nn.Parameter


def test_what_memory_does_not_hold_is_written_at_once():
    saved: list[str] = []
    writer = SimpleNamespace(save=lambda state, path: saved.append(path), name="torch")
    staged = StagedFiles(writer, 40)
    assert staged.name == "torch"
    for path in ("first", "second"):
        staged.save({"a": [torch.zeros(5)], "b": torch.zeros(3)}, path)
    assert saved == ["second"]
    staged.waiting[0]()
    assert saved == ["second", "first"]


def test_free_memory_is_that_of_the_container_where_it_has_less(monkeypatch, tmp_path):
    free = free_memory()
    assert free > 2**20
    monkeypatch.setattr("llava_ray.free_memory._CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("3000000")
    (tmp_path / "memory.current").write_text("1000000")
    assert free_memory() == 2_000_000
    (tmp_path / "memory.max").write_text("max")
    assert free_memory() > 2**20
