"""The long proofs of a review: limits over whole minutes, kills of real processes, our own service as judge."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from review_files import check_money, flags, write_review_files
from scripted_judge import scripted_judge

from llava_ray.review.ledger_file import read_account, read_final_rows

ROOT = Path(__file__).resolve().parents[2]
PRICE = ("--judge.input_dollars", "1", "--judge.output_dollars", "2")
ACTORS = ("ray::Reviewer", "ray::Limiter", "ray::Ledger")

pytestmark = pytest.mark.ray


class Driver:
    """review.py in a process group of its own, with a Ray of its own."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.log = log.open("a")
        command = [sys.executable, str(ROOT / "pipelines/review.py"), *arguments]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            command,
            stdout=self.log,
            stderr=self.log,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path},
            process_group=0,  # as a terminal's: Ctrl-C goes to all of it
        )

    def below(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.Error:
            return []

    def actors(self) -> list[psutil.Process]:
        found = []
        for process in self.below():
            try:
                if process.cmdline() and process.cmdline()[0].startswith(ACTORS):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def kill_actor(self, draw: random.Random) -> bool:
        actors = self.actors()
        if not actors:
            return False
        try:
            draw.choice(actors).send_signal(signal.SIGKILL)
        except psutil.Error:
            return False
        return True

    def kill(self) -> None:
        """SIGKILL the driver; what Ray started for it has to end by itself."""
        below = self.below()
        self.process.kill()
        self.process.wait()
        _, alive = psutil.wait_procs(below, timeout=30)
        for process in alive:
            process.kill()
        psutil.wait_procs(alive, timeout=10)

    def wait(self) -> int:
        code = self.process.wait(timeout=400)
        self.log.close()
        return code


def scores(ledger: Path) -> dict[str, Any]:
    return {row["key"]: (row["state"], row.get("scores")) for row in read_final_rows(ledger)}


def check_kills(tmp_path: Path, num_items: int, num_kills: int, num_driver_kills: int, seed: int) -> None:
    """Kill real processes at random; the results are those of the judge's own rule, and no call is paid twice."""
    draw = random.Random(seed)
    files, output = write_review_files(tmp_path / "files", num_items), tmp_path / "out"
    cap = 1.0
    with scripted_judge(latency_s=0.1) as judge:
        arguments = flags(
            files, judge.base_url, output, *PRICE, "--budget.dollars", str(cap), "--judge.max_tokens", "64"
        )
        arguments += ["--limits.requests_per_minute", "1200", "--limits.window_s", "3"]
        kills = driver_kills = 0
        driver = Driver(arguments, tmp_path / "log")
        while driver.process.poll() is None and kills < num_kills:
            time.sleep(draw.uniform(0.2, 2.5))
            if (
                driver.actors()
                and driver_kills < num_driver_kills
                and kills >= (driver_kills + 1) * num_kills / (num_driver_kills + 1)
            ):
                driver.kill()
                driver_kills += 1
                kills += 1
                driver = Driver(arguments, tmp_path / "log")
            else:
                kills += driver.kill_actor(draw)
        code = driver.wait()
        if code == 3:  # killed on its last call, say
            code = Driver(arguments, tmp_path / "log").wait()
        assert code == 0, (tmp_path / "log").read_text()[-3000:]
        stats = judge.stats()
    assert kills >= num_kills, f"only {kills} kills: make the job longer"
    found, account = scores(output / "ledger.jsonl"), read_account(output / "ledger.jsonl")
    assert len(found) == 2 * num_items
    assert sum(stats["paid"].values()) <= 2 * num_items + account.uncertain
    assert len(stats["arrivals"]) <= 2 * num_items + account.uncertain + account.refused
    check_money(output / "ledger.jsonl", cap)
    # An undisturbed run, with a ledger of its own, says the same.
    with scripted_judge() as judge:
        quiet = flags(files, judge.base_url, tmp_path / "quiet", *PRICE, "--judge.max_tokens", "64")
        assert Driver(quiet, tmp_path / "log").wait() == 0
    rows = [
        [json.loads(line) for line in (tmp_path / name / "reviews.jsonl").read_text().splitlines()]
        for name in ("out", "quiet")
    ]
    for stormy, calm in zip(*rows, strict=True):
        assert stormy["question_id"] == calm["question_id"]
        assert [one["scores"] for one in stormy["reviews"]] == [one["scores"] for one in calm["reviews"]]


@pytest.mark.verify
def test_killed_actors_and_a_killed_driver(tmp_path: Path) -> None:
    check_kills(tmp_path, 150, 5, 1, seed=1)


@pytest.mark.verify
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [2, 3])
def test_thirty_kills(tmp_path: Path, seed: int) -> None:
    check_kills(tmp_path, 600, 20, 2, seed)


@pytest.mark.verify
@pytest.mark.timeout(900)
@pytest.mark.parametrize("binding", ["requests", "tokens"])
def test_sixteen_reviewers_use_the_limit_of_a_minute_and_never_exceed_it(tmp_path: Path, binding: str) -> None:
    requests, tokens = (300, 10**6) if binding == "requests" else (10**5, 60_000)
    files = write_review_files(tmp_path / "files", 525)  # four minutes or so
    script = {"requests_per_minute": requests, "tokens_per_minute": tokens, "latency_s": 0.3, "announce": True}
    with scripted_judge(**script) as judge:
        limits = ("--limits.requests_per_minute", str(requests), "--limits.tokens_per_minute", str(tokens))
        more = ("--num_reviewers", "16", "--judge.max_tokens", "64")
        assert (
            Driver(flags(files, judge.base_url, tmp_path / "out", *PRICE, *limits, *more), tmp_path / "log").wait() == 0
        )
        stats = judge.stats()
    assert set(stats["outcomes"]) == {"fine"}  # the server, which counts sliding windows, refused nothing
    start, end = stats["arrivals"][0][0], stats["arrivals"][-1][0]
    shares = []
    for minute in range(1, int((end - start) // 60)):
        some = [one for one in stats["arrivals"] if minute * 60 <= one[0] - start < (minute + 1) * 60]
        shares.append(len(some) / requests if binding == "requests" else sum(one[1] for one in some) / tokens)
    print(f"{binding}: used {[round(share, 3) for share in shares]} of the limit in the minutes after the first")
    assert len(shares) >= 2
    assert all(0.95 <= share <= 1 for share in shares), shares


@pytest.mark.verify
@pytest.mark.timeout(900)
def test_a_fifth_of_all_requests_goes_wrong(tmp_path: Path) -> None:
    faults = {"429": 0.05, "500": 0.04, "502": 0.03, "hang": 0.02, "malformed": 0.02, "slow": 0.02, "drop": 0.02}
    files = write_review_files(tmp_path / "files", 400)
    with scripted_judge(faults=faults, retry_after=0.5, latency_s=0.05, storm=[10, 14]) as judge:
        more = ("--judge.timeout_s", "3", "--num_reviewers", "4")
        assert Driver(flags(files, judge.base_url, tmp_path / "out", *PRICE, *more), tmp_path / "log").wait() == 0
        stats = judge.stats()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (found,) = report["results"]
    assert sum(found[state] for state in ("done", "failed", "unparsed")) == 400
    assert len(scores(tmp_path / "out" / "ledger.jsonl")) == 800
    assert sum(times - 1 for times in stats["paid"].values()) <= report["calls"]["uncertain"]
    assert len(stats["outcomes"]) == 8


NUM_ANSWERED, NUM_UNDER_WAY = 320, 64
STOPS = {"Ctrl-C": signal.SIGINT, "SIGTERM": signal.SIGTERM, "Ctrl-C twice": signal.SIGINT}


@pytest.mark.verify
@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", STOPS)
def test_stopped_with_64_calls_under_way(tmp_path: Path, how: str) -> None:
    """The first signal waits for them: none is paid twice. The second leaves: they are booked, and paid once more."""
    files, output, log = write_review_files(tmp_path / "files", 250), tmp_path / "out", tmp_path / "log"
    with scripted_judge(hold_after=NUM_ANSWERED, latency_s=0.5) as judge:
        arguments = flags(files, judge.base_url, output, *PRICE, "--judge.timeout_s", "600")
        driver = Driver(arguments, log)
        wait_for(lambda: judge.stats()["held"] == NUM_UNDER_WAY, driver)
        if how == "SIGTERM":
            driver.process.terminate()
        else:
            os.killpg(driver.process.pid, signal.SIGINT)
        wait_for(lambda: f"waiting for {NUM_UNDER_WAY} calls under way" in log.read_text(), driver)
        time.sleep(3)
        assert len(judge.stats()["arrivals"]) == NUM_ANSWERED + NUM_UNDER_WAY  # nothing new went
        if how == "Ctrl-C twice":
            os.killpg(driver.process.pid, signal.SIGINT)
        else:
            judge.call("/release", {})
        code = driver.wait()
        account = read_account(output / "ledger.jsonl")
        judge.call("/release", {})
        again = Driver(arguments, log).wait()
        paid, after = judge.stats()["paid"], read_account(output / "ledger.jsonl")
    twice = sum(times - 1 for times in paid.values())
    print(
        f"{how}: exit {code}, {account.done} done of {account.sent} sent; resumed: exit {again}, {after.done} done, "
        f"{len(paid)} requests, {twice} paid twice, {after.uncertain} booked as uncertain, ${after.spent:.6f}"
    )
    assert (code, again) == (143 if how == "SIGTERM" else 130, 0)
    assert (after.done, len(paid)) == (500, 500)
    if how == "Ctrl-C twice":
        assert (account.done, account.sent - account.refused) == (NUM_ANSWERED, NUM_ANSWERED + NUM_UNDER_WAY)
        assert twice == after.uncertain == NUM_UNDER_WAY
    else:
        assert account.done == account.sent - account.refused == NUM_ANSWERED + NUM_UNDER_WAY
        assert twice == after.uncertain == 0


@pytest.mark.verify
@pytest.mark.timeout(900)
def test_a_disk_that_is_full_is_one_line_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """A disk of its own that somebody else fills in the middle of the job."""
    files, log, disk = write_review_files(tmp_path / "files", 250), tmp_path / "log", tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("a disk of its own needs the right to mount one")
    try:
        with scripted_judge(hold_after=NUM_ANSWERED, latency_s=0.5) as judge:
            arguments = flags(files, judge.base_url, disk / "out", *PRICE, "--judge.timeout_s", "600")
            driver = Driver(arguments, log)
            wait_for(lambda: judge.stats()["held"] == NUM_UNDER_WAY, driver)
            fill(disk / "ballast")
            judge.call("/release", {})
            code, told = driver.wait(), log.read_text()
            last = told.strip().splitlines()[-1]
            before = read_account(disk / "out/ledger.jsonl")
            print(f"full: exit {code}: {last}")
            assert code == 1
            assert last.startswith(f"ConfigError: cannot write {disk}/out/ledger.jsonl: No space left on device; free")
            assert "Traceback" not in told
            (disk / "ballast").unlink()
            assert Driver(arguments, log).wait() == 0
            account, paid = read_account(disk / "out/ledger.jsonl"), judge.stats()["paid"]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)
    twice = sum(times - 1 for times in paid.values())
    print(f"{before.done} done before; then {account.done} done, {twice} paid twice, {account.uncertain} uncertain")
    assert account.done == 500
    # What was answered and could not be noted is booked as it may have been paid.
    assert twice <= account.uncertain <= NUM_UNDER_WAY


def fill(path: Path) -> None:
    """Write a file until there is no room left."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)


def wait_for(arrived: Callable[[], bool], driver: Driver) -> None:
    until = time.monotonic() + 300
    while not arrived():
        if driver.process.poll() is not None or time.monotonic() > until:
            driver.kill()
            pytest.fail(Path(driver.log.name).read_text()[-2000:])
        time.sleep(0.2)
