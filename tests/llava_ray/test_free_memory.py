"""What is free is what the machine has left, and what every control group around this process has left."""

from pathlib import Path

import pytest

from llava_ray import free_memory
from llava_ray.free_memory import find_free_memory

MIB = 2**20


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with 1,000 MiB free, whose files the test writes."""
    monkeypatch.setattr(free_memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(free_memory, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(free_memory, "_CGROUP", tmp_path / "cgroup")
    (tmp_path / "meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable:   {1000 * 1024} kB\n")
    return tmp_path


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(str(value))


def found(expected_mib: int, *words: str) -> None:
    free = find_free_memory()
    assert free is not None
    assert free.num_bytes == expected_mib * MIB
    assert all(word in free.source for word in words)


def test_without_groups_it_is_the_machines(machine: Path) -> None:
    found(1000, "of this machine")
    (machine / "own").write_text("0::/user.slice\n")
    found(1000)
    write(machine / "cgroup" / "user.slice", memory__max="max", memory__current=5)
    found(1000)


def test_a_container_sees_its_own_group_at_the_mount(machine: Path) -> None:
    (machine / "own").write_text("0::/../..\n")
    stat = f"anon 7\ninactive_file {30 * MIB}\n"
    write(machine / "cgroup", memory__max=500 * MIB, memory__current=200 * MIB, memory__stat=stat)
    found(330, "control group")
    write(machine / "cgroup", memory__current=900 * MIB)
    found(0)


def test_the_tightest_of_all_groups_around_counts(machine: Path) -> None:
    (machine / "own").write_text("0::/kubepods/pod1/main\n")
    write(machine / "cgroup" / "kubepods", memory__max=900 * MIB, memory__current=100 * MIB)
    write(machine / "cgroup" / "kubepods" / "pod1", memory__max=400 * MIB, memory__current=250 * MIB)
    write(machine / "cgroup" / "kubepods" / "pod1" / "main", memory__max=300 * MIB, memory__current=100 * MIB)
    found(150, "pod1")


def test_version_1_has_other_names(machine: Path) -> None:
    (machine / "own").write_text("9:cpu,cpuacct:/x\n4:memory:/docker/a\n1:name=systemd:/x\nbroken\n")
    names = {"memory__limit_in_bytes": 64 * MIB, "memory__usage_in_bytes": 40 * MIB}
    write(machine / "cgroup" / "memory" / "docker" / "a", **names, memory__stat=f"total_inactive_file {10 * MIB}\n")
    found(34)
    unlimited = 0x7FFFFFFFFFFFF000
    write(machine / "cgroup" / "memory" / "docker" / "a", memory__limit_in_bytes=unlimited)
    found(1000)


def test_where_nobody_says_it_is_unknown(machine: Path) -> None:
    (machine / "meminfo").write_text("MemTotal: 9 kB\n")
    assert find_free_memory() is None
    (machine / "meminfo").unlink()
    assert find_free_memory() is None


def test_this_machine_has_some() -> None:
    free = find_free_memory()
    assert free is None or free.num_bytes > MIB
