"""The size of the working directory that a job or a run uploads to a cluster, and its largest folders."""

import os
from collections import Counter
from pathlib import Path

from llava_ray.errors import ConfigError

MB = 10**6
_JOB_LIMIT = 100 * 2**20  # bytes that Ray's dashboard accepts from `ray job submit`; beyond, it answers a bare "413"
_MAX_FILES = 100_000  # counted at most; far more than source code has
_NUM_SHOWN = 4


def measure_upload(root: Path) -> Counter[str]:
    """Return the bytes below each folder (or file) of ``root`` that Ray would upload, by .gitignore and .rayignore.

    Stops after MAX_FILES files. Ray compresses the upload, which shrinks code, but hardly images and weights.
    """
    from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

    sizes: Counter[str] = Counter()
    waiting, num_files = [(root.absolute(), list(get_excludes_from_ignore_files(root.absolute(), True)))], 0
    while waiting and num_files < _MAX_FILES:
        folder, excludes = waiting.pop()
        for entry in os.scandir(folder):
            path = Path(entry.path)
            if any(excluded(path) for excluded in excludes):
                continue
            if path.is_dir():
                waiting.append((path, excludes + get_excludes_from_ignore_files(path, True)))
            elif path.is_file():  # Ray skips dangling links and pipes
                num_files += 1
                sizes[path.relative_to(root.absolute()).parts[0]] += entry.stat().st_size
    return sizes


def check_upload(root: Path, limit: int = _JOB_LIMIT) -> int:
    """Return the bytes of the upload; raise ConfigError, naming the largest folders, for more than ``limit``."""
    sizes = measure_upload(root)
    total = sizes.total()
    if total > limit:
        largest = sizes.most_common(_NUM_SHOWN)
        named = ", ".join(f"{name} {size / MB:,.0f} MB" for name, size in largest if size >= MB)
        raise ConfigError(
            f"{root} would be sent to the cluster with {total / MB:,.0f} MB, Ray takes {limit / MB:,.0f}: {named}. "
            f"Write /{largest[0][0]}/ into .rayignore, with the slash in front, and put what is in it on storage "
            "that the nodes share"
        )
    return total
