"""Real runs: Ray Train, Ray Data and DeepSpeed on CPU workers, through the same functions as the pipeline."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from originals import write_original
from samples import small_run, write_samples

from llava_ray.data.plan import Plan
from llava_ray.data.preparation import prepare_data
from llava_ray.data.row_assignment import assign_to_ranks
from llava_ray.errors import ConfigError
from llava_ray.model.loading import load_pretrained_model
from llava_ray.runtime import connected
from llava_ray.train.finished_run import FinishedRun
from llava_ray.train.phases import PHASES
from llava_ray.train.trainer import finetune

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, models and runs of this module."""
    return tmp_path_factory.mktemp("training")


def run(folder: Path, name: str, *, profile: tuple[int, int] | None = None, **changes: Any) -> FinishedRun:
    """Prepare and tune as pipelines/finetune.py does."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    fixed = {"run.name": name, "tracking.log_model": False, "train.model_max_length": ROW_LENGTH}
    config = small_run(folder, **fixed | dotted)
    with connected(config.cluster) as resources:
        return finetune(config, prepare_data(config.data), resources, profile=profile)


def read_jsonl(path: str) -> list[dict[str, Any]]:
    """Return a JSONL file's rows."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


LONG = pytest.mark.verify  # each is a run of its own: `make test` has one of a kind
ROW_LENGTH = 400
TWENTY_STEPS = {"train__max_steps": 20, "train__num_train_epochs": 3, "train__lr_scheduler_type": "constant"}


@pytest.fixture(scope="module")
def reference(ray_cluster, folder: Path) -> FinishedRun:
    """The run that others are compared with: ZeRO 2, two workers, a look at held-out samples."""
    write_samples(folder / "held_out", 24, seed=5)
    everywhere = {"tracking__report_to": ("mlflow", "tensorboard")}
    return run(folder, "reference", profile=(4, 5), **held_out(folder), **everywhere)


def held_out(folder: Path) -> dict[str, Any]:
    """Return the settings of the reference."""
    asked = {"path": folder / "held_out/data.json", "images": folder / "held_out/images"}
    looks = {f"held_out__{key}": str(value) for key, value in asked.items()}
    return TWENTY_STEPS | looks | {"held_out__num_answers": 6, "held_out__max_new_tokens": 3}


def test_a_run_learns_and_leaves_a_ledger_metrics_and_a_bundle(reference, folder):
    curve = reference.read_losses()
    assert len(curve) == reference.num_steps == 20
    assert sum(curve[-4:]) < 0.5 * sum(curve[:4])
    ledger = read_jsonl(f"{reference.folder.path}/ledger.jsonl")
    assert [row["step"] for row in ledger] == list(range(20))
    assert sorted(sample for row in ledger[:8] for sample in row["samples"]) == [f"s{i:04d}" for i in range(64)]
    parts = load_pretrained_model(reference.folder.bundle)
    assert parts.manifest.training["steps"] == 20


def test_every_step_says_where_its_time_went_and_what_it_computed(reference):
    for row in read_jsonl(f"{reference.folder.path}/metrics.jsonl"):
        phases = {name: row[f"{name}_seconds"] for name in ("data_wait", *PHASES)}
        assert min(phases[name] for name in ("forward", "backward", "optimizer", "communication")) > 0
        assert sum(phases.values()) <= row["step_seconds"] * 1.01 + 0.01
        assert row["useful_tflops"] > 0
        assert "mfu" not in row  # no CPU has a peak that is known


def test_steps_are_profiled_and_metrics_reported_where_asked(reference):
    folder = Path(reference.folder.path)
    names = [f"steps-00000004-00000005-rank{rank}.json.gz" for rank in range(2)]
    assert sorted(path.name for path in folder.glob("profile/*")) == names
    assert list(folder.glob("tensorboard/events*"))


def test_held_out_samples_are_looked_at_whenever_the_run_saves(reference):
    rows = read_jsonl(f"{reference.folder.path}/metrics.jsonl")
    looks = {row["step"] + 1: row for row in rows if "held_out_loss" in row}
    assert list(looks) == [3, 6, 9, 12, 15, 18, 20]
    assert looks[20]["held_out_loss"] < looks[3]["held_out_loss"]
    assert all(0 <= row["held_out_accuracy"] <= 1 for row in looks.values())


def test_the_reference_has_text_only_micro_batches_and_steps_of_different_counts(reference, folder):
    paths = (folder / "cache").glob("prepared-*/tokens-*/lengths.parquet")
    table = max(map(pq.read_table, paths), key=len)  # the other is of what is held out
    num_tokens, num_images = (table.column(name).to_numpy() for name in ("num_tokens", "num_images"))
    plan = Plan(num_tokens, table.column("shard").to_numpy(), 8, 3, seed=42, shuffle_window=2, max_steps=20)
    dealt = {step: assign_to_ranks(num_tokens[plan.step(step)].tolist(), ROW_LENGTH, 2) for step in range(20)}
    assert len({len(ranks[0]) for ranks in dealt.values()}) > 1
    rows = [plan.step(step)[row] for step, ranks in dealt.items() for rank in ranks for row in rank if row]
    assert any(num_images[row].sum() == 0 for row in rows)


@pytest.mark.parametrize("stage", [pytest.param(0, marks=LONG), pytest.param(1, marks=LONG), 3])
def test_every_zero_stage_has_the_same_loss_curve(reference, folder, stage):
    other = run(folder, f"zero{stage}", train__zero_stage=stage, **TWENTY_STEPS)
    assert other.read_losses() == pytest.approx(reference.read_losses(), abs=1e-3)


@LONG
@pytest.mark.parametrize(("workers", "row_length"), [(1, 2048), (2, 1024)])
def test_step_losses_do_not_depend_on_workers_or_packing(reference, folder, workers, row_length):
    other = run(
        folder,
        f"world{workers}-row{row_length}",
        cluster__num_workers=workers,
        train__tokens_per_micro_batch=row_length,
        **TWENTY_STEPS | {"train__max_steps": 8},
    )
    assert other.read_losses() == pytest.approx(reference.read_losses()[:8], rel=1e-5)
    ledger = read_jsonl(f"{reference.folder.path}/ledger.jsonl")
    assert read_jsonl(f"{other.folder.path}/ledger.jsonl") == ledger[:8]


@LONG
def test_streamed_features_give_the_losses_of_inline_ones(reference, folder):
    other = run(folder, "streamed", data__vision_features="streamed", **TWENTY_STEPS | {"train__max_steps": 8})
    assert other.read_losses() == pytest.approx(reference.read_losses()[:8], rel=1e-5)


@LONG
def test_a_run_starts_from_a_published_model(reference, folder):
    """Under ZeRO 3 weights go from shards of .bin into the partitions; a run that learns nothing gives them back."""
    parts = load_pretrained_model(reference.folder.bundle)
    published = write_original(folder / "published", parts, ending="bin", num_shards=2, with_tower=True)
    changes = {"model__model_name_or_path": str(published), "train__zero_stage": 3, "train__learning_rate": 1e-12}
    tuned = run(folder, "published", train__max_steps=1, train__weight_decay=0.0, **changes)
    found = load_pretrained_model(tuned.folder.bundle)
    assert found.layout.manifest.language_model.base == str(published)
    for name, tensor in parts.llava.state_dict().items():
        torch.testing.assert_close(found.llava.state_dict()[name], tensor, rtol=0, atol=1e-6)
    assert all(torch.equal(*pair) for pair in zip(found.tower.parameters(), parts.tower.parameters(), strict=True))


def test_a_finished_run_is_not_done_again_here_or_in_a_copied_project(reference, folder, tmp_path, monkeypatch):
    copied = Path(shutil.copytree(folder, tmp_path / "copied"))
    for project in (folder, copied):
        monkeypatch.chdir(project)  # as commands are typed
        again = run(project, "reference", **held_out(project))
        assert again.reused
        assert again.folder.path == str(project / "runs/reference")
        assert again.metrics == reference.metrics


@LONG
def test_a_run_that_was_stopped_goes_on_in_a_copied_project(reference, folder, tmp_path, monkeypatch):
    copied = Path(shutil.copytree(folder, tmp_path / "copied"))
    (copied / "runs/reference/finished.json").unlink()  # as if it had been killed after its last commit
    shutil.rmtree(copied / "runs/reference/model")
    monkeypatch.chdir(copied)
    again = run(copied, "reference", **held_out(copied))
    assert not again.reused
    assert again.read_losses() == reference.read_losses()
    now, before = (load_pretrained_model(one.folder.bundle).llava.state_dict() for one in (again, reference))
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())


def test_a_used_name_with_other_settings_is_refused(reference, folder):
    with pytest.raises(ConfigError, match=r"other settings \(train.learning_rate: 0.01 -> 0.1\).*--run.restart"):
        run(folder, "reference", train__learning_rate=0.1, **held_out(folder))
