"""The memory that this process may still take: what the machine has free, within the limits of its containers."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_OWN_GROUPS = Path("/proc/self/cgroup")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class FreeMemory:
    """Bytes that are free, and what bounds them."""

    num_bytes: int
    source: str


def find_free_memory() -> FreeMemory | None:
    """Return the memory that is free here, pages that the kernel can drop included; None where that is unknown."""
    try:
        lines = _MEMINFO.read_text().splitlines()
        free = 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))
    except (OSError, StopIteration, ValueError, IndexError):
        return None
    found = FreeMemory(free, "of this machine")
    for folder, names in _own_groups():
        left = _left_in_group(folder, *names)
        if left is not None and left < found.num_bytes:
            found = FreeMemory(max(0, left), f"of the control group {folder}")
    return found


# Files of limit and usage, and the key in memory.stat of what the kernel can drop: version 2, then version 1.
_NAMES_2 = ("memory.max", "memory.current", "inactive_file")
_NAMES_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _own_groups() -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Yield each control group that may bound this process, with its names: its own, and all above up to the mount."""
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:
        lines = []
    paths = {("memory", _NAMES_1): "/", ("", _NAMES_2): "/"}  # a container sees its own group at the mount
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers:
            paths["", _NAMES_2] = path
        elif "memory" in controllers.split(","):
            paths["memory", _NAMES_1] = path
    for (mount, names), path in paths.items():
        inside = Path(path.lstrip("/"))
        for part in (inside, *inside.parents):
            if ".." not in part.parts:
                yield _CGROUP / mount / part, names


def _left_in_group(folder: Path, limit_name: str, usage_name: str, droppable: str) -> int | None:
    """Return the bytes that a control group may still take; None without a limit."""
    try:
        limit, usage = int((folder / limit_name).read_text()), int((folder / usage_name).read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return None
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        cached = int(stat.get(droppable, 0))
    except (OSError, ValueError):
        cached = 0
    return limit - usage + min(cached, usage)
