"""The loop with a tiny model and a scripted judge: killed at each stage, nothing is paid or done twice."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from preference_data import PRICE, make_bundle, rows, write_colours, write_records
from scripted_judge import Remote, scripted_judge

from llava_ray.config.improve import ImproveConfig
from llava_ray.review.ledger_file import read_account
from pipelines import improve_stages
from pipelines.improve import improve_model

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, questions to ask, and others that are held out."""
    folder = tmp_path_factory.mktemp("improving")
    make_bundle(folder)
    write_records(folder / "data")
    write_colours(folder / "held_out", 4)
    return folder


@pytest.fixture(scope="module")
def judge() -> Iterator[Remote]:
    with scripted_judge() as remote:
        yield remote


def loop_settings(folder: Path, output: Path, judge: Remote, **more: Any) -> ImproveConfig:
    sections: dict[str, Any] = {
        "improve": {"benchmark": f"custom={folder}/held_out", "output": str(output), "rounds": 2, "max_new_tokens": 4},
        "model": {"model_name_or_path": str(folder / "bundle")},
        "preferences": {
            **{"data_path": str(folder / "data/data.json"), "num_samples": 3, "max_new_tokens": 6, "cut_off": "keep"},
            **{"max_questions": 4, "batch_size": 2},
        },
        "judge": {"model": "scripted", "base_url": judge.base_url, **PRICE},
        "data": {"cache_dir": str(folder / "cache"), "image_aspect_ratio": "pad"},
        "train": {"max_steps": 2, "global_batch_size": 2, "bf16": False, "zero_stage": 0, "model_max_length": 512},
        "tracking": {"log_model": False},
        "actors": {"num_actors": 1, "cpus_per_actor": 0.5},
        "cluster": {"num_workers": 1},
    }
    for key, value in more.items():
        place, _, name = key.partition("__")
        sections.setdefault(place, {})[name] = value
    return ImproveConfig.parsed(sections)


class Killed(BaseException):
    """The process ends here."""


def test_a_loop_that_is_killed_at_each_stage_does_and_pays_nothing_twice(
    folder: Path, judge: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worst moment of each stage: all of its work is done, and nothing says so yet."""
    judge.play()
    config, output = loop_settings(folder, tmp_path / "out", judge), tmp_path / "out"
    real, written = improve_stages._write_note, list[str]()

    def write(place: Path, stage: Any, note: Any) -> None:
        name = f"{place.name}/{stage}"
        written.append(name)
        if written.count(name) == 1:
            raise Killed(name)
        real(place, stage, note)

    monkeypatch.setattr(improve_stages, "_write_note", write)
    seen: dict[str, bytes] = {}
    stages = ["round-0/evaluate", "round-1/preferences", "round-1/tune", "round-1/evaluate"]
    for stage in stages:
        with pytest.raises(Killed, match=stage):
            improve_model(config)
        for path in output.rglob("*"):
            if path.name in ("answers.jsonl", "sample.jsonl", "preferences.jsonl", "ledger.jsonl", "finished.json"):
                content = path.read_bytes() + str(path.stat().st_size).encode()
                assert seen.setdefault(str(path.relative_to(output)), content) == content
    done = improve_model(config)
    assert done.complete
    assert written == [name for stage in stages for name in (stage, stage)]
    assert done.ran == ("round 1, evaluate",)
    assert set(judge.stats()["paid"].values()) == {1}
    assert seen.keys() >= {"ledger.jsonl", "round-1/preferences/preferences.jsonl", "round-1/tune/finished.json"}
    check_lineage(done.summary, output)

    # Again: nothing runs. Undisturbed, elsewhere: the same preferences, and the ledger's calls are known there too.
    assert improve_model(config).ran == ()
    monkeypatch.setattr(improve_stages, "_write_note", real)
    calm = improve_model(
        loop_settings(folder, tmp_path / "calm", judge, preferences__ledger=str(output / "ledger.jsonl"))
    )
    place = "round-1/preferences/preferences.jsonl"
    assert (tmp_path / "calm" / place).read_bytes() == (output / place).read_bytes()
    assert calm.summary["rounds"][0]["tune"]["bundle_hash"] == done.summary["rounds"][0]["tune"]["bundle_hash"]
    assert set(judge.stats()["paid"].values()) == {1}


def check_lineage(summary: Any, output: Path) -> None:
    """From every preference to its answer, and from them to the model; a random model gains nothing, which is said."""
    from mlflow import MlflowClient

    (one,) = summary["rounds"]
    assert not one["accepted"]
    assert summary["best"]["round"] == 0
    assert "nothing significant" in summary["stopped_because"]
    assert "not significant" in (output / "report.html").read_text()
    assert (output / "model").resolve() == Path(summary["start"]["model"]).resolve()
    assert summary["dollars"] == pytest.approx(read_account(output / "ledger.jsonl").spent, abs=1e-6)
    (answers,) = (output / "round-1/preferences/answers").glob("*/sample.jsonl")
    sampled = {row["question_id"]: row["text"] for row in rows(answers)}
    for row in rows(output / "round-1/preferences/preferences.jsonl"):
        found = row["provenance"]
        assert found["chosen"]["fingerprint"] == summary["start"]["model_hash"]
        assert row["chosen"][0]["content"] == sampled[f"{found['question']}/{found['chosen']['sample']}"].strip()
        assert all(call["key"] for call in found["calls"])
    saved = json.loads((output / "summary.json").read_text())
    assert saved == json.loads(json.dumps(summary))
    client = MlflowClient(f"sqlite:///{output.parent}/mlflow.db")
    parents = {
        client.get_run(run).data.tags["mlflow.parentRunId"]
        for run in (one["preferences"]["mlflow_run_id"], one["tune"]["mlflow_run_id"], one["evaluate"]["mlflow_run_id"])
    }
    assert len(parents) == 1
    (parent,) = parents
    assert one["preferences"]["hash"] in client.get_run(parent).data.tags["llava_ray.round_1"]
    assert {file.path for file in client.list_artifacts(parent)} >= {"summary.json", "report.html"}
    made = client.list_artifacts(one["preferences"]["mlflow_run_id"])
    assert {file.path for file in made} >= {"preferences.jsonl", "answers"}
