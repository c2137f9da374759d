"""Real runs: Ray Train, Ray Data and DeepSpeed on CPU workers, through the same functions as the pipeline."""

import json
from pathlib import Path
from typing import Any

import pytest
from samples import small_run

from llava_ray.data.preparation import prepare_data
from llava_ray.errors import ConfigError
from llava_ray.model.bundle import load_bundle
from llava_ray.runtime import connected
from llava_ray.train.trainer import FinishedRun, finetune

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, models and runs of this module."""
    return tmp_path_factory.mktemp("training")


def run(folder: Path, name: str, **changes: Any) -> FinishedRun:
    """Prepare and tune as pipelines/finetune.py does."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    config = small_run(folder, **{"run.name": name, "tracking.log_model": False} | dotted)
    with connected(config.cluster) as resources:
        return finetune(config, prepare_data(config.data), resources)


def read_jsonl(path: str) -> list[dict[str, Any]]:
    """Return a JSONL file's rows."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def losses(finished: FinishedRun) -> list[float]:
    """Return the run's loss curve."""
    return [row["loss"] for row in read_jsonl(f"{finished.folder.path}/metrics.jsonl")]


@pytest.fixture(scope="module")
def reference(ray_cluster, folder: Path) -> FinishedRun:
    """The run that others are compared with: ZeRO 2, two workers, two epochs and a half."""
    return run(folder, "reference", train__max_steps=20, train__num_train_epochs=3)


def test_a_run_learns_and_leaves_a_ledger_metrics_and_a_bundle(reference, folder):
    curve = losses(reference)
    assert len(curve) == reference.num_steps == 20
    assert sum(curve[-4:]) < 0.5 * sum(curve[:4])
    ledger = read_jsonl(f"{reference.folder.path}/ledger.jsonl")
    assert [row["step"] for row in ledger] == list(range(20))
    assert sorted(sample for row in ledger[:8] for sample in row["samples"]) == [f"s{i:04d}" for i in range(64)]
    parts = load_bundle(reference.folder.bundle)
    assert parts.manifest.training["steps"] == 20


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_every_zero_stage_has_the_same_loss_curve(reference, folder, stage):
    other = run(folder, f"zero{stage}", train__max_steps=20, train__num_train_epochs=3, train__zero_stage=stage)
    assert losses(other) == pytest.approx(losses(reference), abs=1e-3)


@pytest.mark.parametrize(("workers", "row_length"), [(1, 512), (1, 2048), (2, 1024)])
def test_step_losses_do_not_depend_on_workers_or_packing(reference, folder, workers, row_length):
    other = run(
        folder,
        f"world{workers}-row{row_length}",
        train__max_steps=8,
        train__num_train_epochs=3,
        train__lr_scheduler_type="constant",
        cluster__num_workers=workers,
        train__tokens_per_micro_batch=row_length,
    )
    same = run(folder, "constant", train__max_steps=8, train__num_train_epochs=3, train__lr_scheduler_type="constant")
    assert losses(other) == pytest.approx(losses(same), rel=1e-5)
    assert read_jsonl(f"{other.folder.path}/ledger.jsonl") == read_jsonl(f"{same.folder.path}/ledger.jsonl")


def test_streamed_features_give_the_losses_of_inline_ones(reference, folder):
    other = run(folder, "streamed", train__max_steps=20, train__num_train_epochs=3, data__vision_features="streamed")
    assert losses(other) == pytest.approx(losses(reference), rel=1e-5)


def test_alignment_moves_the_projector_only_and_tuning_starts_from_it(ray_cluster, folder):
    aligned = run(folder, "align", model__tune_mm_mlp_adapter=True, train__max_steps=4)
    files = {path.name for path in Path(aligned.folder.bundle).iterdir()}
    assert "projector.safetensors" in files
    assert "language_model" not in files
    tuned = run(folder, "tune", model__pretrain_mm_mlp_adapter=aligned.folder.bundle, train__max_steps=4)
    assert (Path(tuned.folder.bundle) / "language_model").is_dir()


def test_a_finished_run_is_not_done_again(reference, folder):
    again = run(folder, "reference", train__max_steps=20, train__num_train_epochs=3)
    assert again.reused
    assert again.metrics == reference.metrics


def test_a_used_name_with_other_settings_is_refused(reference, folder):
    with pytest.raises(ConfigError, match=r"other settings \(train.learning_rate: 0.01 -> 0.1\).*--run.restart"):
        run(folder, "reference", train__max_steps=20, train__num_train_epochs=3, train__learning_rate=0.1)
