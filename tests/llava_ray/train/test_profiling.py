"""The trace of chosen steps: which they are, where it is, and that it can be read."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from llava_ray.errors import ConfigError
from llava_ray.train.profiling import StepProfiler
from pipelines.finetune import split_profile


def test_a_trace_of_the_steps_asked_for_is_written_and_told(tmp_path: Path) -> None:
    said: list[str] = []
    profiler = StepProfiler((3, 4), str(tmp_path), 0, said.append)
    for step in range(6):
        profiler.start(step)
        torch.empty(8 + step).fill_(step)
        profiler.end(step)
        assert (profiler.running is not None) == (step == 3)
    [path] = tmp_path.glob("profile/*")
    assert path.name == "steps-00000003-00000004-rank0.json.gz"
    names = [event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]]
    assert names.count("aten::fill_") == 2
    [line] = said
    assert line.startswith(f"Profile of the steps 3 to 4: {tmp_path}/profile")


def test_a_run_that_resumes_among_them_profiles_the_rest_and_one_behind_them_nothing(tmp_path: Path) -> None:
    for first in (4, 9):
        profiler = StepProfiler((3, 4), str(tmp_path), 1)
        for step in range(first, first + 3):
            profiler.start(step)
            profiler.end(step)
    assert [path.name for path in tmp_path.glob("profile/*")] == ["steps-00000004-00000004-rank1.json.gz"]
    profiler = StepProfiler(None, str(tmp_path), 0)
    profiler.start(0)
    assert profiler.running is None


@pytest.mark.parametrize(("given", "steps"), [("7", (7, 7)), ("7-9", (7, 9)), ("0-0", (0, 0))])
def test_steps_are_named_by_number(given: str, steps: tuple[int, int]) -> None:
    assert split_profile(["RECIPE", "--profile", given, "--train.seed", "1"]) == (
        steps,
        ["RECIPE", "--train.seed", "1"],
    )
    assert split_profile(["RECIPE"]) == (None, ["RECIPE"])


@pytest.mark.parametrize("given", ["", "x", "9-7", "-1", "3-", "1.5", "1-2-3", "9" * 13])
def test_anything_else_is_refused_with_the_form(given: str) -> None:
    with pytest.raises(ConfigError, match=r"--profile.*give a step as metrics.jsonl numbers it.*--profile 20-22"):
        split_profile(["RECIPE", f"--profile={given}"])
    with pytest.raises(ConfigError, match="expected one argument"):
        split_profile(["RECIPE", "--profile"])
