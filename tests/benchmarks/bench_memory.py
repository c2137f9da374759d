#!/usr/bin/env python
"""Peak memory of driver and workers while 2,000 and 20,000 images stream through: it must not grow with the data.

A process's resident set counts the pages of Ray's object store that it has ever touched, so the sum over processes
counts that store several times and rises until each has touched all of it. The store has a fixed size, so what could
grow is each process's own memory: that is summed, the store's part is added once. Plain sums stand beside it.

python tests/benchmarks/bench_memory.py --output tests/benchmarks/results/memory.json
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

SIZES = (2_000, 20_000)
TARGET = 0.15
SAMPLE_SECONDS = 0.25


def main() -> None:
    """Stream each size in a process of its own, and compare the peaks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--stream", type=int, help="(used by the benchmark itself) stream so many images")
    options = parser.parse_args()
    if options.stream:
        print(json.dumps(measure(options.stream)))
        return
    peaks = {}
    for size in SIZES:
        command = [sys.executable, __file__, "--stream", str(size)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[size] = json.loads(done.stdout.splitlines()[-1])
        print(f"{size} images: {peaks[size]}", flush=True)
    small, large = (peaks[size] for size in SIZES)
    result = {
        "peaks": peaks,
        "growth": round(large["total_mb"] / small["total_mb"] - 1, 4),
        "growth_of_each": {name: round(large[name] / small[name] - 1, 4) for name in small},
        "target": TARGET,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
    }
    from outcome import keep_result

    keep_result(result, options.output)


def measure(num_images: int) -> dict[str, float]:
    """Stream ``num_images`` and return peaks in MB: of all processes together, and of the largest one."""
    from bench_stream import measure_lengths_of, stream_config, time_stream, write_images, write_records

    with tempfile.TemporaryDirectory() as folder:
        paths = write_images(Path(folder), num_images)
        config = stream_config(Path(folder), write_records(Path(folder), paths, "data"))
        # Preparation has workers of its own; they are not to stand beside the stream's.
        with started_ray():
            measure_lengths_of(config)
        with started_ray():
            peaks = watched(lambda: time_stream(config, num_images))
    return {name: round(value) for name, value in peaks.items()}


@contextmanager
def started_ray() -> Iterator[None]:
    """Run a local Ray with so few objects that 2,000 images fill its store too."""
    import ray

    ray.init(address="local", num_cpus=2, object_store_memory=200 * 2**20, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def watched(work: Callable[[], object]) -> dict[str, float]:
    """Do the work and return the peaks meanwhile, in MB."""
    names = ("total_mb", "largest_own_mb", "driver_own_mb", "sum_of_rss_mb", "largest_rss_mb")
    peaks = dict.fromkeys(names, 0.0)
    ended = threading.Event()
    watcher = threading.Thread(target=watch, args=(peaks, ended))
    watcher.start()
    work()
    ended.set()
    watcher.join()
    return peaks


def watch(peaks: dict[str, float], ended: threading.Event) -> None:
    """Note the peaks of this process and Ray's workers: own memory, shared memory once, plain resident sets."""
    driver = psutil.Process()
    while not ended.wait(SAMPLE_SECONDS):
        sizes = [driver.memory_info()]
        for process in driver.children(recursive=True):
            try:
                if "ray::" in " ".join(process.cmdline()):
                    sizes.append(process.memory_info())
            except psutil.Error:
                time.sleep(0)  # it has just ended
        own = [size.rss - size.shared for size in sizes]
        now = {
            "total_mb": sum(own) + max(size.shared for size in sizes),
            "largest_own_mb": max(own[1:], default=0),
            "driver_own_mb": own[0],
            "sum_of_rss_mb": sum(size.rss for size in sizes),
            "largest_rss_mb": max(size.rss for size in sizes),
        }
        for name, size in now.items():
            peaks[name] = max(peaks[name], size / 2**20)


if __name__ == "__main__":
    main()
