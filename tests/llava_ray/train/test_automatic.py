"""Settings that are "auto": what is chosen for which devices, and that a run keeps what it began with."""

import json
from pathlib import Path
from typing import Any

import pytest
from samples import small_run

from llava_ray.train.identity import comparable
from llava_ray.train.planning import automatic
from llava_ray.train.planning.automatic import Workers, decide_settings, measure_bf16
from llava_ray.train.planning.memory import GPU_MEMORY_GIB

AUTO = {"train.bf16": "auto", "train.tokens_per_micro_batch": "auto"}
ON_CPU = Workers(None)


def on(name: str) -> Workers:
    return Workers({name: GPU_MEMORY_GIB.get(name)})


@pytest.fixture
def config(tmp_path: Path) -> Any:
    return small_run(tmp_path, num_samples=2, **AUTO)


@pytest.mark.parametrize(("ratio", "chosen"), [(0.4, True), (0.79, True), (0.9, False), (3.0, False)])
def test_a_processor_decides_by_its_own_measurement(
    config: Any, ratio: float, chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = [ratio]
    monkeypatch.setattr(automatic, "measure_bf16", measured.pop)
    decided, lines = decide_settings(config, ON_CPU)
    assert (decided.train.bf16, decided.train.uses_bf16) == (chosen, chosen)
    assert decided.train.row_length == config.train.model_max_length
    assert [line.split(" (")[0] for line in lines] == [
        f"Chosen: train.bf16 = {str(chosen).lower()}",
        f"Chosen: train.tokens_per_micro_batch = {config.train.model_max_length:,}",
    ]
    again, _ = decide_settings(config, ON_CPU)  # measured once: the list is empty
    assert again.train.bf16 is chosen
    assert list(json.loads(Path(config.data.cache_dir, "processors.json").read_text()).values()) == [ratio]


def test_a_damaged_file_of_measurements_is_measured_again(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(automatic, "measure_bf16", lambda: 0.5)
    file = Path(config.data.cache_dir, "processors.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text('{"cut off')
    assert decide_settings(config, ON_CPU)[0].train.bf16 is True


@pytest.mark.parametrize(("gpu", "chosen"), [("H100", True), ("A10G", True), ("T4", False), ("V100", False)])
def test_gpus_decide_by_their_kind(config: Any, gpu: str, chosen: bool) -> None:
    decided, _ = decide_settings(config, on(gpu))
    assert decided.train.bf16 is chosen
    assert decided.train.row_length == 16_384  # a tiny model


def test_the_memory_of_an_unknown_gpu_decides_nothing(config: Any) -> None:
    decided, lines = decide_settings(config, on("the GPU"))
    assert decided.train.row_length == config.train.model_max_length
    assert "cluster.accelerator_type" in lines[1]


def test_rows_are_as_long_as_the_memory_allows(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bytes_per_token = 2**30 / 256
    needs = lambda config: bytes_per_token * config.train.row_length  # noqa: E731
    monkeypatch.setattr("llava_ray.train.planning.fitting.memory_estimator", lambda: needs)
    assert automatic.find_row_length(config, 80 * 2**30) == (16_384, 64 * 2**30)
    assert automatic.find_row_length(config, 64 * 2**30)[0] == 12_288  # a tenth stays free
    assert automatic.find_row_length(config, 9 * 2**30)[0] == 2_048
    assert automatic.find_row_length(config, 2**20)[0] == config.train.model_max_length


def test_what_is_set_stays_and_nothing_is_said(tmp_path: Path) -> None:
    config = small_run(tmp_path, num_samples=2)
    assert decide_settings(config, on("T4")) == (config, [])


def test_a_run_keeps_what_it_began_with(config: Any) -> None:
    saved = config.replaced({"train.bf16": True, "train.tokens_per_micro_batch": 777}).model_dump(mode="json")
    decided, lines = decide_settings(config, on("T4"), saved)
    assert (decided.train.bf16, decided.train.row_length) == (True, 777)
    assert all("as the run began" in line for line in lines)
    then, now = comparable(saved | {"identity": {"data": "x"}}, config, {"data": "x"})
    assert then == now
    fixed = config.replaced({"train.bf16": False})
    then, now = comparable(saved | {"identity": {"data": "x"}}, fixed, {"data": "x"})
    assert then != now


def test_a_measurement_is_a_ratio_of_times() -> None:
    assert 0.02 < measure_bf16() < 100
