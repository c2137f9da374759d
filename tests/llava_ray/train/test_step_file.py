"""Files of rows by step: appended to, cut where steps are repeated, and whole after any interruption."""

import errno
import json
from pathlib import Path

import fsspec
import pytest

from llava_ray.errors import DataError
from llava_ray.train import step_file
from llava_ray.train.step_file import StepFile, read_rows


def old_text(steps: range) -> str:
    """The rows as they were written before files were appended to."""
    rows = [{"step": step, "samples": [f"{step}-a", f"{step}-b"]} for step in steps]
    return "".join(json.dumps(row) + "\n" for row in rows)


def add(file: StepFile, steps: range) -> None:
    for step in steps:
        file.add(step, {"samples": [f"{step}-a", f"{step}-b"]})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "ledger.jsonl"


def test_rows_are_appended_and_the_file_is_never_written_anew(path, monkeypatch):
    written = []
    monkeypatch.setattr(
        step_file, "write_tail", lambda *call, write=step_file.write_tail: (written.append(len(call[2])), write(*call))
    )
    file = StepFile(str(path))
    for first in range(0, 40, 10):
        add(file, range(first, first + 10))
        file.flush()
        file.flush()  # nothing is new
    assert path.read_text() == old_text(range(40))
    assert sum(written) == path.stat().st_size
    assert len(written) == 4
    assert file.waiting == {}


def test_a_file_written_by_an_earlier_version_goes_on(path):
    path.parent.mkdir()
    path.write_text(old_text(range(5)))
    file = StepFile(str(path))
    assert file.last == 4
    add(file, range(5, 7))
    file.flush()
    assert path.read_text() == old_text(range(7))


@pytest.mark.parametrize("first", [0, 1, 4, 7, 8, 11, 12, 20])
@pytest.mark.parametrize("anew", [False, True])
def test_a_rewind_drops_what_is_repeated_wherever_it_is(path, first, anew):
    file = StepFile(str(path))
    add(file, range(8))
    file.flush()
    add(file, range(8, 12))
    if anew:
        file.flush()
        file = StepFile(str(path))
    file.rewind(first)
    file.rewind(first)  # every rank asks for it
    assert path.exists()
    add(file, range(min(first, 12), 15))
    file.flush()
    assert path.read_text() == old_text(range(15))


@pytest.mark.parametrize("cut", range(1, len(old_text(range(3, 4)))))
def test_a_row_that_a_kill_cut_off_is_dropped(path, cut):
    path.parent.mkdir()
    path.write_text(old_text(range(4))[:-cut])
    file = StepFile(str(path))
    assert file.last == 2
    file.rewind(3)
    add(file, range(3, 5))
    file.flush()
    assert path.read_text() == old_text(range(5))


def test_a_reader_meanwhile_sees_complete_rows(path):
    path.parent.mkdir()
    for cut in range(len(old_text(range(2, 3)))):
        path.write_text(old_text(range(3))[: -cut or None])
        assert [row["step"] for row in read_rows(str(path))] == [0, 1] + [2] * (cut == 0)
    path.write_text("")
    assert read_rows(str(path)) == []
    with pytest.raises(FileNotFoundError):
        read_rows(f"{path}x")


def test_a_rewind_without_new_rows_cuts_the_file_too(path):
    path.parent.mkdir()
    path.write_text(old_text(range(9)))
    file = StepFile(str(path))
    file.rewind(4)
    file.flush()
    assert path.read_text() == old_text(range(4))


def test_a_full_disk_is_named_and_the_rows_come_with_the_next_flush(path, monkeypatch):
    file = StepFile(str(path))
    add(file, range(3))
    file.flush()
    add(file, range(3, 6))

    def half(place: str, start: int, data: bytes) -> None:
        with Path(place).open("ab") as stream:
            stream.write(data[: len(data) // 2])
        raise DataError(f"cannot write {place!r}: {OSError(errno.ENOSPC, 'No space left on device')}")

    with monkeypatch.context() as patched:
        patched.setattr(step_file, "write_tail", half)
        with pytest.raises(DataError, match="No space left"):
            file.flush()
    assert path.read_text() != old_text(range(3))
    file.flush()
    assert path.read_text() == old_text(range(6))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    file = StepFile(str(tmp_path / "ledger.jsonl"))
    file.path = str(tmp_path / "file" / "ledger.jsonl")
    add(file, range(1))
    with pytest.raises(DataError, match=r"cannot write .*file/ledger.jsonl.*make room"):
        file.flush()


@pytest.mark.parametrize(
    "damage", ['{"samples": []}\n', "\0" * 20 + "\n", '{"step": 1, "samples": []}\n', '{"step": x}\n', "\n"]
)
def test_damage_in_the_middle_is_named(path, damage):
    path.parent.mkdir()
    path.write_text(old_text(range(2)) + damage + old_text(range(2, 4)))
    with pytest.raises(DataError, match=r"ledger.jsonl: line 3 is not the row of a step after 1.*restart"):
        StepFile(str(path))


def test_a_store_that_cannot_append_gets_the_same_bytes():
    file = StepFile("memory://runs/run/ledger.jsonl")
    add(file, range(4))
    file.flush()
    file.rewind(2)
    add(file, range(2, 6))
    file.flush()
    assert fsspec.filesystem("memory").cat("/runs/run/ledger.jsonl").decode() == old_text(range(6))
    assert StepFile("memory://runs/run/ledger.jsonl").last == 5


def test_a_rewind_reads_the_end_of_a_long_file_alone(path, monkeypatch):
    path.parent.mkdir()
    path.write_text(old_text(range(20_000)))
    file = StepFile(str(path))
    read: list[int] = []
    monkeypatch.setattr(
        step_file, "open_filesystem", lambda place, own=step_file.open_filesystem: Counting(own, place, read)
    )
    for first in (19_990, 19_000, 12_345):
        read.clear()
        file.rewind(first)
        assert (file.last, file.size) == (first - 1, len(old_text(range(first))))
        assert sum(read) < 8 * len(old_text(range(first, 20_000))) + 2 * 2**16
    file.flush()
    assert path.read_text() == old_text(range(12_345))


class Counting:
    """A filesystem that notes how many bytes are read."""

    def __init__(self, own, place: str, read: list[int]) -> None:
        (self.files, self.place), self.read = own(place), read

    def __iter__(self):
        return iter((self, self.place))

    def open(self, place: str, mode: str):
        stream = self.files.open(place, mode)
        whole, read = stream.read, self.read
        stream.read = lambda size=-1: read.append(len(data := whole(size))) or data
        return stream


def test_a_number_that_is_not_finite_is_null(path):
    file = StepFile(str(path))
    file.add(0, {"loss": float("nan"), "grad_norm": float("inf"), "step_seconds": 0.5})
    file.flush()
    assert path.read_text() == '{"step": 0, "loss": null, "grad_norm": null, "step_seconds": 0.5}\n'
    assert file.read_last() == {"loss": None, "grad_norm": None, "step_seconds": 0.5}
