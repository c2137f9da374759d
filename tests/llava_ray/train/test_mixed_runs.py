"""Runs on a mixture: the same ledger whatever happens to them, losses by source, an end and a model by score."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from samples import small_run, write_samples
from watched_runs import committed

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.schema import merge_settings, nest_keys
from llava_ray.data.preparation import prepare_data
from llava_ray.model.loading import load_pretrained_model
from llava_ray.runtime import connected
from llava_ray.train.consolidation import consolidate
from llava_ray.train.finished_run import FinishedRun
from llava_ray.train.trainer import finetune, train_until

pytestmark = pytest.mark.ray

WORKER = "ray::RayTrainWorker"


def write_texts(path: Path, count: int, answers: tuple[str, str] = ("yes", "no")) -> Path:
    """Write text-only conversations, whose ids are also those of samples of another source."""
    records = [
        {
            "id": f"s{index:04d}",
            "conversations": [
                {"from": "human", "value": f"is {index % 4} even?"},
                {"from": "gpt", "value": answers[index % 2]},
            ],
        }
        for index in range(count)
    ]
    path.write_text(json.dumps(records))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, two sources with the same ids, and held-out samples of both."""
    folder = tmp_path_factory.mktemp("mixture")
    small_run(folder)
    write_texts(folder / "texts.json", 30)
    write_texts(folder / "opposite.json", 16, ("no", "yes"))
    write_samples(folder / "held_out", 6, seed=5)
    return folder


def mixture(folder: Path, name: str, **changes: Any) -> FinetuneConfig:
    """Return a run whose epoch has 32 of 64 samples with images, and 16 of 30 texts."""
    seen = {"name": "seen", "data_path": str(folder / "data.json"), "weight": 2}
    seen |= {"held_out": str(folder / "held_out/data.json"), "held_out_images": str(folder / "held_out/images")}
    texts = {"name": "texts", "data_path": str(folder / "texts.json"), "weight": 1, "version": "mistral_instruct"}
    asked = {
        "data.data_path": "",
        "data.sources": [seen, texts | {"model_max_length": 300, "held_out": str(folder / "opposite.json")}],
        "data.epoch_samples": 48,
        "held_out.num_answers": 0,
        "run.name": name,
        "tracking.log_model": False,
        "train.num_train_epochs": 2,
    }
    return FinetuneConfig.parsed(merge_settings(small_run(folder).model_dump(), nest_keys(asked | changes)))


def run(config: FinetuneConfig, until: int | None = None) -> FinishedRun:
    with connected(config.cluster) as resources:
        prepared = prepare_data(config.data, show_progress=False)
        if until is not None:
            assert train_until(config, prepared, resources, until=until, show_progress=False) is None
        return finetune(config, prepared, resources, show_progress=False)


def rows(finished: FinishedRun, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(finished.folder.path, name).read_text().splitlines()]


def kill_a_worker_after(step: int, config: FinetuneConfig, killed: list[int]) -> None:
    """Start a thread that kills a worker once a checkpoint after so many steps is committed."""

    def wait() -> None:
        folder = Path(config.run.storage_path).parent
        while committed(folder / "recipe", str(config.run.name)) < step:
            time.sleep(0.02)
        found = (one for one in psutil.Process().children(recursive=True) if one.cmdline()[:1] == [WORKER])
        worker = next(found)
        worker.kill()
        killed.append(worker.pid)

    threading.Thread(target=wait, daemon=True).start()


@pytest.mark.timeout(900)
def test_a_mixture_is_learnt_the_same_through_kills_and_by_any_number_of_workers(ray_cluster, folder, capfd):
    plain = run(mixture(folder, "plain"))
    assert "data.sources.1 (texts)" in capfd.readouterr().out
    ledger = rows(plain, "ledger.jsonl")
    drawn = [name for row in ledger for name in row["samples"]]
    assert [len(row["samples"]) for row in ledger] == [8] * 12
    for epoch in (drawn[:48], drawn[48:]):
        assert sum(name.startswith("seen/s") for name in epoch) == 32
        assert sum(name.startswith("texts/s") for name in epoch) == 16
        assert len(set(epoch)) == 48
    assert set(drawn[:48]) != set(drawn[48:])
    metrics = rows(plain, "metrics.jsonl")
    for row in metrics:
        assert row["loss_share/seen"] + row["loss_share/texts"] == pytest.approx(row["loss"], rel=1e-9)
        assert row["loss/seen"] > 0 < row["loss/texts"]
    judged = [row for row in metrics if "held_out_loss" in row]
    assert [row["step"] + 1 for row in judged] == [3, 6, 9, 12]
    for row in judged:
        low, high = sorted((row["held_out_loss/seen"], row["held_out_loss/texts"]))
        assert low < row["held_out_loss"] < high
    page = Path(plain.folder.path, "report.html").read_text()
    assert "Loss by source" in page and "Held-out samples by source" in page

    changed = mixture(folder, "changed", **{"cluster.num_workers": 1, "train.save_steps": 2})
    killed: list[int] = []
    with connected(changed.cluster) as resources:
        prepared = prepare_data(changed.data, show_progress=False)
        assert train_until(changed, prepared, resources, until=4, show_progress=False) is None
    changed = changed.replaced({"cluster.num_workers": 2})
    kill_a_worker_after(6, changed, killed)
    other = run(changed)
    assert killed, "the run ended before anything was killed"
    assert Path(other.folder.path, "ledger.jsonl").read_bytes() == Path(plain.folder.path, "ledger.jsonl").read_bytes()
    assert [row["loss/texts"] for row in rows(other, "metrics.jsonl")] == pytest.approx(
        [row["loss/texts"] for row in metrics], rel=1e-4
    )


@pytest.mark.timeout(900)
def test_a_run_ends_where_its_held_out_curve_turns_and_its_model_is_the_best_one(ray_cluster, folder, tmp_path):
    # What is held out contradicts what is learnt: its loss falls while the form is learnt, and then rises.
    config = small_run(folder).replaced(
        {
            "data.data_path": str(folder / "texts.json"),
            "held_out.path": str(folder / "opposite.json"),
            "held_out.num_answers": 0,
            "held_out.keep_best": True,
            "held_out.early_stopping_patience": 2,
            "run.name": "turning",
            "tracking.log_model": False,
            "train.num_train_epochs": 20,
            "train.save_steps": 2,
            "train.lr_scheduler_type": "constant",
            "cluster.num_workers": 1,
        }
    )
    with connected(config.cluster) as resources:
        prepared = prepare_data(config.data, show_progress=False)
        assert train_until(config, prepared, resources, until=4, show_progress=False) is None
    killed: list[int] = []
    config = config.replaced({"cluster.num_workers": 2})
    kill_a_worker_after(6, config, killed)
    finished = run(config)
    metrics = rows(finished, "metrics.jsonl")
    curve = {row["step"] + 1: row["held_out_loss"] for row in metrics if "held_out_loss" in row}
    assert list(curve) == list(range(2, finished.num_steps + 1, 2))
    best = min(curve, key=curve.__getitem__)
    assert killed
    assert finished.num_steps == best + 4 < 80
    assert finished.best_step == best
    assert len(rows(finished, "ledger.jsonl")) == len(metrics) == finished.num_steps
    checkpoint = Path(finished.folder.path, f"step-{best:08d}")
    consolidate(checkpoint, tmp_path / "best")
    made = load_pretrained_model(finished.folder.bundle)
    assert made.manifest.training["steps"] == best
    for name, tensor in load_pretrained_model(tmp_path / "best").llava.state_dict().items():
        assert torch.equal(made.llava.state_dict()[name], tensor), name
    again = run(config)
    assert (again.reused, again.num_steps, again.best_step) == (True, finished.num_steps, best)
