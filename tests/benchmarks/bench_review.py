#!/usr/bin/env python
"""Reviews per second through the whole path, beside a bare loop of the same client, and the memory meanwhile.

python tests/benchmarks/bench_review.py --num-reviews 10000 --output tests/benchmarks/results/review.json

The judge is a fast local server in a process of its own, on the same cores. The bare loop sends the same requests with
as many in flight and keeps nothing; ours asks the limiter, notes each call in the ledger before and after, on the disk,
and reads the verdicts. The time counts from the first review; starting Ray and the reviewers is given beside it.
"""

import argparse
import asyncio
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1")
sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [sys.path[0], os.environ.get("PYTHONPATH")]))

import psutil
import ray
from bench_prepare import NUM_CORES
from outcome import keep_result
from review_files import flags, write_review_files
from scripted_judge import Remote, scripted_judge

from llava_ray.review.judge import OpenAIJudge
from llava_ray.review.ledger import close_ledger, open_ledger
from llava_ray.review.ledger_file import read_account
from llava_ray.review.pool import Pool, Progress
from pipelines.review_run import ReviewJob, prepare

TARGET = 150.0
MAX_GROWTH = 0.15
NUM_BARE, IN_FLIGHT = 2_000, 32
ACTORS = ("Reviewer", "Limiter", "Ledger")


def main() -> None:
    """Time both ways, print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-reviews", type=int, default=10_000)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:NUM_CORES])
    with tempfile.TemporaryDirectory() as folder, scripted_judge() as judge:
        files = write_review_files(Path(folder) / "files", options.num_reviews // 2)
        price = ("--judge.input_dollars", "1", "--judge.output_dollars", "2")
        job = prepare(flags(files, judge.base_url, Path(folder) / "out", *price))
        bare = asyncio.run(bare_rate(job))
        ray.init(address="local", num_cpus=NUM_CORES, include_dashboard=False, log_to_driver=False)
        found = review_rate(job)
        ray.shutdown()
        check(job, judge)
    result = {
        "num_reviews": options.num_reviews,
        "num_cores": NUM_CORES,
        "bare_requests_per_second": round(bare, 1),
        **found,
        "ratio": round(found["reviews_per_second"] / bare, 3),
        "target_reviews_per_second": TARGET,
        "max_growth": MAX_GROWTH,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
    }
    keep_result(result, options.output)


async def bare_rate(job: ReviewJob) -> float:
    """Return the requests a second of a loop that does nothing else."""
    (spec,) = job.plan.judges.values()
    client = OpenAIJudge.connect(spec)
    bodies = [job.plan[index].body for index in range(min(NUM_BARE, len(job.plan)))]
    waiting = iter(bodies)

    async def work() -> None:
        for body in waiting:
            await client.ask(body)

    start = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(IN_FLIGHT)))
    await client.close()
    return len(bodies) / (time.perf_counter() - start)


def review_rate(job: ReviewJob) -> dict[str, Any]:
    """Review everything; return rates, the start-up, and the memory at a fifth of the way and at the end."""
    job.output.mkdir(parents=True)
    start = time.perf_counter()
    ledger = open_ledger(job.ledger, "bench")
    pool = Pool(job.plan, job.config.limits, job.config.budget, ledger)
    progress = Progress(len(job.plan), 0)
    first = early = late = 0.0
    done_at_first = 0
    for seen in pool.run(range(len(job.plan)), job.config.review.num_reviewers, progress):
        if not first and seen.done:
            first, done_at_first = time.perf_counter(), seen.done
        if not early and seen.done >= len(job.plan) / 5:
            early = own_memory()
        late = own_memory()
    seconds = time.perf_counter() - first
    pool.close()
    close_ledger(ledger)
    return {
        "reviews_per_second": round((progress.done - done_at_first) / seconds, 1),
        "start_up_seconds": round(first - start, 1),
        "memory_mb_at_a_fifth": round(early),
        "memory_mb_at_the_end": round(late),
        "growth": round(late / early - 1, 4),
    }


def own_memory() -> float:
    """Return the own memory of driver, reviewers, limiter and ledger together, in MB."""
    driver = psutil.Process()
    sizes = [driver.memory_info()]
    for process in driver.children(recursive=True):
        try:
            if any(f"ray::{name}" in " ".join(process.cmdline()) for name in ACTORS):
                sizes.append(process.memory_info())
        except psutil.Error:
            continue
    return sum(size.rss - size.shared for size in sizes) / 2**20


def check(job: ReviewJob, judge: Remote) -> None:
    """Stop where not every review was made exactly once: the comparison would be unfair."""
    account, paid = read_account(job.ledger), judge.stats()["paid"]
    bare = min(NUM_BARE, len(job.plan))
    if account.done != len(job.plan) or account.sent != account.done or sum(paid.values()) != account.done + bare:
        raise SystemExit(f"{account} for {len(job.plan)} reviews, {sum(paid.values())} paid: something is wrong")


if __name__ == "__main__":
    main()
