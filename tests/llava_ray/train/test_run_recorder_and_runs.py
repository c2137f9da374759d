"""The run's folder and its journal, without a cluster: names, torn snapshots, replayed steps, one MLflow run."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient
from samples import small_run

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.model import MODEL_PATHS
from llava_ray.errors import CheckpointError, ConfigError, DataError
from llava_ray.tracking import TrackedRun, describe_page, moved_tracking_uri
from llava_ray.train.finished_run import FinishedRun
from llava_ray.train.identity import identify_run
from llava_ray.train.run_recorder import RunRecorder
from llava_ray.train.runs import (
    SNAPSHOT,
    SNAPSHOT_COPY,
    RunFolder,
    absolute_paths,
    claim_run,
    committed_step,
    find_run,
    repair_run,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> FinetuneConfig:
    return small_run(tmp_path_factory.mktemp("runs"))


def start_run(config: FinetuneConfig, data_hash: str = "data") -> RunFolder:
    """Find a run's folder and note its settings, as a start does that got as far as its workers."""
    identity = identify_run(config, data_hash)
    run = find_run(config, identity)
    claim_run(run, config, identity)
    return run


def commit(run: RunFolder) -> RunFolder:
    """Leave what Ray's first commit leaves."""
    Path(run.path).mkdir(parents=True, exist_ok=True)
    snapshot = json.dumps({"checkpoint_results": [{"checkpoint_dir_name": "step-00000004"}]})
    Path(run.path, SNAPSHOT).write_text(snapshot)
    return run


def test_a_run_notes_its_settings_and_may_be_opened_again(config, tmp_path):
    config = config.replaced({"run.storage_path": str(tmp_path)})
    run = commit(start_run(config))
    assert json.loads(Path(run.path, "resolved.json").read_text())["train"]["global_batch_size"] == 8
    assert start_run(config.replaced({"cluster.num_workers": 5})) == run
    assert run.finished("any") is None


def test_a_start_that_commits_nothing_claims_no_name(config, tmp_path):
    config = config.replaced({"run.storage_path": str(tmp_path)})
    start_run(config)
    run = commit(start_run(config.replaced({"train.seed": 1})))
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    assert json.loads(Path(run.path, "resolved.json").read_text())["train"]["seed"] == 1


def test_a_finished_run_on_data_that_changed_since_is_refused(tmp_path):
    run = RunFolder(str(tmp_path), "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/finished.json").write_text(json.dumps({"data_hash": "old", "num_steps": 4}))
    assert run.finished("old")["num_steps"] == 4
    with pytest.raises(ConfigError, match=r"finished, but data.data_path now holds other data.*old -> new"):
        run.finished("new")


def test_other_settings_under_a_used_name_are_refused_or_set_the_old_run_aside(config, tmp_path):
    config = config.replaced({"run.storage_path": str(tmp_path)})
    commit(start_run(config))
    other = config.replaced({"train.seed": 1})
    with pytest.raises(ConfigError, match=r"train.seed: 42 -> 1.*--run.restart True"):
        start_run(other)
    start_run(other.replaced({"run.restart": True}))
    assert sorted(path.name.partition(".")[0] for path in tmp_path.iterdir()) == ["small", "small"]


def test_an_unwritable_storage_path_is_named(config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot write .*file/small/resolved.json.*run.storage_path"):
        start_run(config.replaced({"run.storage_path": str(tmp_path / "file")}))


def test_a_fresh_run_begins_at_step_0(tmp_path):
    assert committed_step(str(tmp_path), "nothing") == 0


@pytest.mark.parametrize("left", ['{"checkpoint_res', "", '{"checkpoint_results": []}', None])
def test_a_torn_snapshot_is_mended_from_its_copy_and_unnamed_checkpoints_go(tmp_path, left):
    run = RunFolder(str(tmp_path), "run")
    for name in ("step-00000004", "step-00000008"):
        (tmp_path / "run" / name).mkdir(parents=True)
    whole = json.dumps({"checkpoint_results": [{"checkpoint_dir_name": "step-00000004"}]})
    (tmp_path / "run" / SNAPSHOT_COPY).write_text(whole)
    if left is not None:
        (tmp_path / "run" / SNAPSHOT).write_text(left)
    repair_run(run)
    assert (tmp_path / "run" / SNAPSHOT).read_text() == whole
    assert [path.name for path in (tmp_path / "run").glob("step-*")] == ["step-00000004"]


def test_a_torn_first_snapshot_means_that_nothing_was_committed(tmp_path):
    (tmp_path / "run" / "step-00000004").mkdir(parents=True)
    (tmp_path / "run" / SNAPSHOT).write_text("{")
    repair_run(RunFolder(str(tmp_path), "run"))
    assert not list((tmp_path / "run").iterdir())
    assert committed_step(str(tmp_path), "run") == 0


def test_a_torn_snapshot_without_a_good_copy_is_an_error_that_deletes_nothing(tmp_path):
    (tmp_path / "run" / "step-00000004").mkdir(parents=True)
    for name in (SNAPSHOT, SNAPSHOT_COPY):
        (tmp_path / "run" / name).write_text("{")
    with pytest.raises(CheckpointError, match="unreadable"):
        repair_run(RunFolder(str(tmp_path), "run"))
    assert (tmp_path / "run" / "step-00000004").exists()


def test_folders_become_absolute_and_hub_ids_stay(config):
    changed = absolute_paths(config.replaced({"model.vision_tower": "openai/clip-vit-large-patch14-336"}))
    assert list(changed) == ["model.model_name_or_path"]


def test_every_setting_that_names_a_model_becomes_absolute(config, tmp_path, monkeypatch):
    (tmp_path / "runs/base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for key in MODEL_PATHS:
        assert absolute_paths(config.replaced({key: "runs/base"}))[key] == str((tmp_path / "runs/base").resolve())


def open_journal(folder: Path) -> RunRecorder:
    tracked = {"tracking_uri": f"sqlite:///{folder}/mlflow.db", "experiment_name": "e", "name": "n", "key": "k"}
    return RunRecorder(str(folder / "run"), tracked, {"train": {"seed": 1}}, 1)


def test_replayed_steps_stand_once_and_a_second_start_goes_on_in_the_same_mlflow_run(tmp_path):
    first = open_journal(tmp_path)
    for rank in range(2):
        first.rewind(rank, 0, 2)
    for step in range(3):
        for rank in range(2):
            first.record(rank, step, {"loss": 1.0 / (step + 1)}, [f"{step}-{rank}"])
    first.flush()
    second = open_journal(tmp_path)
    for rank in range(2):
        second.rewind(rank, 2, 2)
    for step in range(2, 4):
        for rank in range(2):
            second.record(rank, step, {"loss": 1.0 / (step + 1)}, [f"{step}-{rank}"])
    run_id, experiment_id = second.close("FINISHED", {"llava_ray.bundle": "b"}, {}, [])
    assert experiment_id == second.tracked.experiment_id
    assert run_id == first.tracked.run_id
    ledger = [json.loads(line) for line in (tmp_path / "run/ledger.jsonl").read_text().splitlines()]
    assert ledger == [{"step": step, "samples": [f"{step}-0", f"{step}-1"]} for step in range(4)]
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert {metric.step for metric in client.get_metric_history(run_id, "loss")} == {0, 1, 2, 3}
    run = client.get_run(run_id)
    assert (run.info.status, run.data.params["train.seed"]) == ("FINISHED", "1")


def test_a_flush_for_a_checkpoint_waits_for_the_records_of_all_ranks(tmp_path):
    journal = open_journal(tmp_path)
    for rank in range(2):
        journal.rewind(rank, 0, 2)
    journal.record(0, 0, {"loss": 1.0}, ["a"])
    assert journal.flush(1) is False
    assert not (tmp_path / "run/ledger.jsonl").exists()
    journal.record(1, 0, {}, ["b"])
    assert journal.flush(1) is True
    assert (tmp_path / "run/ledger.jsonl").read_text() == '{"step": 0, "samples": ["a", "b"]}\n'
    assert journal.progress().metrics == {"loss": 1.0}
    assert open_journal(tmp_path).progress().metrics == {"loss": 1.0}
    assert journal.unlogged == {}


def test_a_skipped_steps_loss_is_null_and_in_no_chart(tmp_path):
    journal = open_journal(tmp_path)
    journal.rewind(0, 0, 1)
    for step, loss in enumerate((2.0, math.nan, 1.0, math.inf)):
        journal.record(0, step, {"loss": loss, "grad_norm": loss, "skipped_steps": float(step % 2)}, ["a"])
    run_id, _ = journal.close("FINISHED", {}, {}, [])

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [row["loss"] for row in rows] == [2.0, None, 1.0, None]
    known = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_metric_history(run_id, "loss")
    assert [(metric.step, metric.value) for metric in known] == [(0, 2.0), (2, 1.0)]
    assert journal.progress().metrics == open_journal(tmp_path).progress().metrics == {"skipped_steps": 1.0}
    folder = SimpleNamespace(path=str(tmp_path / "run"))
    losses = FinishedRun(folder, 4, {}, "", run_id, "").read_losses()
    assert (losses[0], losses[2]) == (2.0, 1.0)
    assert math.isnan(losses[1])
    assert math.isnan(losses[3])


def test_a_tracker_that_fails_is_given_up_and_told_and_the_run_goes_on(tmp_path):
    class Tracker:
        def __init__(self, *, works: bool) -> None:
            self.works = works
            self.steps: list[int] = []

        def log_steps(self, steps: dict[int, dict[str, float]]) -> None:
            if not self.works:
                raise ConnectionError("no route to host")
            self.steps += steps

        def end(self, status: str) -> None:
            self.steps.append(-1)

    journal = open_journal(tmp_path)
    good, bad = Tracker(works=True), Tracker(works=False)
    journal.others = [bad, good]
    journal.rewind(0, 0, 1)
    for step in range(2):
        journal.record(0, step, {"loss": 1.0}, ["a"])
        journal.flush(step + 1)
    told = [line for line in journal.progress().said if line.startswith("Tracker")]
    assert [line.partition(":")[0] for line in told] == ["Tracker is not written to any more"]
    assert "no route to host" in told[0]
    journal.close("FINISHED", {}, {}, [])
    assert (good.steps, bad.steps) == ([0, 1, -1], [])


def test_a_start_with_other_settings_gets_an_mlflow_run_of_its_own(tmp_path):
    told = {"tracking_uri": f"sqlite:///{tmp_path}/mlflow.db", "experiment_name": "e", "name": "n", "key": "k"}
    failed = TrackedRun(**told, settings="one")
    failed.log_params({"seed": 1})
    other = TrackedRun(**told, settings="two")
    other.log_params({"seed": 2})
    assert TrackedRun(**told, settings="two").run_id == other.run_id != failed.run_id
    assert other.client.get_run(other.run_id).data.params == {"seed": "2"}


def test_a_finished_run_that_moved_with_its_mlflow_store_names_that_one(tmp_path):
    noted = "sqlite:////elsewhere/runs/mlflow.db"
    assert moved_tracking_uri(noted, str(tmp_path)) == noted
    (tmp_path / "mlflow.db").touch()
    assert moved_tracking_uri(noted, str(tmp_path)) == f"sqlite:///{tmp_path}/mlflow.db"
    assert moved_tracking_uri("http://tracking", str(tmp_path)) == "http://tracking"


def test_the_rate_is_that_of_the_last_steps_and_a_stop_is_heard_with_the_next_record(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("llava_ray.train.run_recorder.time.monotonic", lambda: now[0])
    journal = open_journal(tmp_path)
    now[0] = 100.0  # loading the model
    journal.rewind(0, 40, 1)
    assert (journal.progress().first, journal.progress().steps_per_second) == (40, None)
    for step in range(40, 44):
        now[0] += 2
        assert journal.record(0, step, {"loss": 1.0}, ["a"]) is False
    standing = journal.progress()
    assert (standing.state, standing.done, standing.steps_per_second) == ("training", 44, 0.5)
    journal.say("What learns: all")
    journal.say("What learns: all")
    first, said = journal.progress().said
    assert first.startswith("First step done at ")  # of four
    assert said == "What learns: all"
    journal.stop()
    assert journal.record(0, 44, {"loss": 1.0}, ["a"]) is True
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert client.get_run(journal.tracked.run_id).info.status == "KILLED"
    experiment = client.get_run(journal.tracked.run_id).info.experiment_id
    page = describe_page(f"sqlite:///{tmp_path}/mlflow.db", journal.tracked.run_id)
    assert f"http://127.0.0.1:5000/#/experiments/{experiment}/runs" in page
    assert page == describe_page(
        f"sqlite:///{tmp_path}/mlflow.db", journal.tracked.run_id, journal.tracked.experiment_id
    )
