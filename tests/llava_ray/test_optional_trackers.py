"""Trackers beside MLflow: what they are given, what is missing, and that none of them can end a run."""

import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

import pytest

from llava_ray.config.evaluate import EvaluateConfig
from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.preferences import PreferencesConfig
from llava_ray.config.review import ReviewConfig
from llava_ray.config.run import TrackingConfig
from llava_ray.errors import ConfigError
from llava_ray.optional_trackers import check_trackers, open_trackers, wandb_environment

PARAMS = {"train": {"seed": 1, "bf16": False}, "model": {"version": "v1"}}


class FakeWandb(types.ModuleType):
    """Keeps what it is told."""

    def __init__(self, api_key: str | None = "key") -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.api = types.SimpleNamespace(api_key=api_key)
        self.told: list[Any] = []

    def Settings(self, **settings: Any) -> dict[str, Any]:  # noqa: N802
        return settings

    def init(self, **arguments: Any) -> "FakeWandb":
        self.told.append(arguments)
        return self

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.told.append((step, metrics))

    def finish(self, exit_code: int) -> None:
        self.told.append(exit_code)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return fake


def test_wandb_gets_settings_and_steps_and_the_same_run_at_the_next_start(wandb, tmp_path):
    for status in ("FAILED", "FINISHED"):
        [tracker] = open_trackers(["mlflow", "wandb"], str(tmp_path / "run"), "llava_ray", PARAMS, {})
        tracker.log_steps({4: {"loss": 1.0}, 3: {"loss": 2.0}})
        tracker.end(status)
    first, *steps, failed = wandb.told[:4]
    assert (first["name"], first["project"], first["resume"], first["config"]) == ("run", "llava_ray", "allow", PARAMS)
    assert first["dir"] == str(tmp_path / "run")
    assert steps == [(3, {"loss": 2.0}), (4, {"loss": 1.0})]
    assert (failed, wandb.told[-1]) == (1, 0)
    assert wandb.told[4]["id"] == first["id"]
    [other] = open_trackers(["wandb"], str(tmp_path / "other"), "llava_ray", PARAMS, {})
    assert other.run.told[-1]["id"] != first["id"]


def test_a_missing_library_or_login_is_said_before_a_run_starts(wandb, monkeypatch):
    check_trackers(["mlflow", "wandb", "tensorboard"], "runs")
    wandb.api.api_key = None
    with pytest.raises(ConfigError, match=r"nobody is logged in.*wandb login.*WANDB_MODE=offline"):
        check_trackers(["wandb"], "runs")
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(["wandb"], "runs")
    assert wandb_environment()["WANDB_MODE"] == "offline"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("wandb", "tensorboard"):
        with pytest.raises(ConfigError, match=rf"report_to names '{name}'.*pip install 'llava_ray\[{name}\]'"):
            check_trackers([name], "runs")
    check_trackers(["mlflow"], "runs")


def test_event_files_need_a_folder():
    with pytest.raises(ConfigError, match=r"tensorboard.*s3://bucket/runs"):
        check_trackers(["tensorboard"], "s3://bucket/runs")


def test_tensorboard_files_hold_what_was_logged(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    for first in (0, 2):  # two starts
        [tracker] = open_trackers(["tensorboard"], str(tmp_path), "llava_ray", PARAMS, {})
        tracker.log_steps({step: {"loss": 1 / (step + 1)} for step in range(first, first + 2)})
        tracker.end("FINISHED")
    found = {}
    for path in (tmp_path / "tensorboard").iterdir():
        data, place = path.read_bytes(), 0
        while place < len(data):  # length (8), its checksum (4), the event, its checksum (4)
            size = int.from_bytes(data[place : place + 8], "little")
            event = Event.FromString(data[place + 12 : place + 12 + size])
            found |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
            place += 16 + size
    losses = {step: value for (step, tag), value in found.items() if tag == "loss"}
    assert losses == pytest.approx({step: 1 / (step + 1) for step in range(4)})


def test_report_to_is_a_list_as_elsewhere():
    assert TrackingConfig().report_to == ("mlflow",)
    config = FinetuneConfig.parsed(
        {
            "model": {"model_name_or_path": "x"},
            "data": {"data_path": "x"},
            "tracking": {"report_to": ["wandb", "tensorboard"]},
        }
    )
    assert config.tracking.report_to == ("wandb", "tensorboard")
    with pytest.raises(ConfigError, match="report_to"):
        FinetuneConfig.parsed({"model": {}, "data": {"data_path": "x"}, "tracking": {"report_to": ["comet"]}})


@pytest.mark.parametrize(
    ("schema", "rest"),
    [
        (EvaluateConfig, {"evaluate": {"model_path": "x", "benchmarks": ["gqa=x"]}}),
        (ReviewConfig, {"review": {"answers": ["x"], "questions": "q", "references": "r"}, "judge": {"model": "x"}}),
        (PreferencesConfig, {"preferences": {"models": ["x"], "data_path": "d", "rule": "answer"}}),
    ],
)
def test_other_jobs_refuse_trackers_that_they_do_not_write_to(schema, rest):
    with pytest.raises(ConfigError, match=r"report_to names 'wandb', which only training runs write to"):
        schema.parsed(rest | {"tracking": {"report_to": ["mlflow", "wandb"]}})


@pytest.mark.slow
def test_the_real_wandb_writes_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(["wandb"], str(tmp_path))
    (tmp_path / "run").mkdir()
    [tracker] = open_trackers(["wandb"], str(tmp_path / "run"), "llava_ray", PARAMS, wandb_environment())
    tracker.log_steps({0: {"loss": 1.0}, 1: {"loss": 0.5}})
    tracker.end("FINISHED")
    assert list((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))
