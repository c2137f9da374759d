"""Real runs on images of several views, several images and none, with frozen and with learning towers."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from samples import small_run, write_mixed_samples

from llava_ray.data.plan import Plan
from llava_ray.data.preparation import prepare_data
from llava_ray.data.row_assignment import assign_to_ranks
from llava_ray.model.loading import load_pretrained_model
from llava_ray.runtime import connected
from llava_ray.train.consolidation import consolidate
from llava_ray.train.finished_run import FinishedRun
from llava_ray.train.trainer import finetune

# `make test` runs LLaVA-1.6's recipe: tiles, several images, and a tower that learns.
pytestmark = [pytest.mark.ray, pytest.mark.verify]

ROW_LENGTH = 600
BATCH, STEPS = 4, 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, models and runs of this module."""
    folder = tmp_path_factory.mktemp("training_images")
    write_mixed_samples(folder, 32)
    return folder


def run(folder: Path, name: str, **changes: object) -> FinishedRun:
    """Prepare and tune as pipelines/finetune.py does."""
    fixed = {
        "run.name": name,
        "tracking.log_model": False,
        "data.image_aspect_ratio": "anyres",
        "model.mm_patch_merge_type": "spatial_unpad",
        "train.model_max_length": ROW_LENGTH,
        "train.global_batch_size": BATCH,
        "train.max_steps": STEPS,
        "train.num_train_epochs": 3,
        "train.lr_scheduler_type": "constant",
    }
    config = small_run(folder, **fixed | {key.replace("__", "."): value for key, value in changes.items()})
    with connected(config.cluster) as resources:
        return finetune(config, prepare_data(config.data), resources)


def tuned(folder: Path, stage: int) -> FinishedRun:
    """A run whose tower learns."""
    return run(
        folder,
        f"tower{stage}",
        model__unfreeze_mm_vision_tower=True,
        train__mm_vision_tower_lr=1e-3,
        train__zero_stage=stage,
        train__gradient_checkpointing=stage == 3,
    )


@pytest.fixture(scope="module")
def tuned_by_two(ray_cluster, folder: Path) -> FinishedRun:
    """The run that others are compared with: a tower that learns in two workers, ZeRO 2."""
    return tuned(folder, 2)


def test_anyres_learns_with_several_images_and_none(tuned_by_two: FinishedRun, folder: Path) -> None:
    curve = tuned_by_two.read_losses()
    assert len(curve) == STEPS
    assert sum(curve[-3:]) < 0.7 * sum(curve[:3])
    bundle = Path(tuned_by_two.folder.bundle)
    newline = load_file(bundle / "projector.safetensors")["image_newline"]
    parts = load_pretrained_model(bundle)
    assert torch.equal(parts.llava.image_newline, newline)
    assert (parts.image_spec.aspect_ratio, parts.image_tokens.merge_type) == ("anyres", "spatial_unpad")
    assert parts.manifest.image_grid_pinpoints == parts.image_spec.grid_pinpoints


def test_in_a_round_one_rank_may_see_images_and_the_other_none(tuned_by_two: FinishedRun, folder: Path) -> None:
    """Otherwise these runs would not show that ranks stay together."""
    (path,) = (folder / "cache").glob("prepared-*/tokens-*/lengths.parquet")
    table = pq.read_table(path)
    num_tokens, num_images = (table.column(name).to_numpy() for name in ("num_tokens", "num_images"))
    assert set(num_images.tolist()) == {0, 1, 2, 3}
    plan = Plan(num_tokens, table.column("shard").to_numpy(), BATCH, 3, seed=42, shuffle_window=2, max_steps=STEPS)
    uneven = 0
    for step in range(STEPS):
        members = plan.step(step)
        dealt = assign_to_ranks(num_tokens[members].tolist(), ROW_LENGTH, 2)
        for rows in zip(*dealt, strict=True):
            uneven += len({bool(num_images[members[row]].sum()) for row in rows}) == 2
    assert uneven


def test_a_tower_learns_with_its_own_rate_and_is_kept(tuned_by_two: FinishedRun, folder: Path) -> None:
    assert tuned_by_two.metrics["mm_vision_tower_lr"] == pytest.approx(1e-3)
    assert tuned_by_two.metrics["learning_rate"] == pytest.approx(1e-2)
    before = load_file(folder / "vision_tower" / "model.safetensors")
    after = load_file(Path(tuned_by_two.folder.bundle) / "vision_tower" / "model.safetensors")
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    # Of the tower's three blocks the last one has no part in the features of layer -2.
    assert not any("layers.2." in name for name in changed)
    assert all(any(f"layers.{block}." in name for name in changed) for block in (0, 1))
    (checkpoint,) = Path(tuned_by_two.folder.path).glob("step-*")
    state = torch.load(checkpoint / "zero" / "mp_rank_00_model_states.pt", weights_only=False)
    assert any(name.startswith("vision_tower.") for name in state["module"])
    consolidate(checkpoint, folder / "consolidated")
    again = load_file(folder / "consolidated" / "vision_tower" / "model.safetensors")
    assert all(torch.equal(again[name], after[name]) for name in after)


def test_zero_3_trains_a_tower_to_the_same_losses(tuned_by_two: FinishedRun, folder: Path) -> None:
    partitioned = tuned(folder, 3)
    assert partitioned.read_losses() == pytest.approx(tuned_by_two.read_losses(), abs=1e-3)
    files = [Path(run.folder.bundle) / "vision_tower" / "model.safetensors" for run in (tuned_by_two, partitioned)]
    one, other = (load_file(file) for file in files)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=5e-3, msg=name)
    (checkpoint,) = Path(partitioned.folder.path).glob("step-*")
    consolidate(checkpoint, folder / "consolidated3")
    again = load_file(folder / "consolidated3" / "vision_tower" / "model.safetensors")
    assert all(torch.equal(again[name], other[name]) for name in other)


def test_streamed_features_of_several_views_give_the_losses_of_a_frozen_tower(
    tuned_by_two: FinishedRun, folder: Path
) -> None:
    inline, streamed = (run(folder, where, data__vision_features=where) for where in ("inline", "streamed"))
    assert streamed.read_losses() == pytest.approx(inline.read_losses(), rel=1e-5)
    assert inline.read_losses()[0] == pytest.approx(tuned_by_two.read_losses()[0], rel=1e-5)
    assert inline.read_losses()[1:] != pytest.approx(tuned_by_two.read_losses()[1:], rel=1e-4)


def test_new_tokens_are_learnt_alike_where_the_embeddings_are_partitioned(ray_cluster, folder: Path) -> None:
    def aligned(stage: int) -> FinishedRun:
        return run(
            folder,
            f"tokens{stage}",
            model__tune_mm_mlp_adapter=True,
            model__mm_use_im_start_end=True,
            train__zero_stage=stage,
            train__weight_decay=0.0,
            train__max_steps=4,
        )

    two, three = aligned(2), aligned(3)
    assert three.read_losses() == pytest.approx(two.read_losses(), abs=1e-4)
    rows = [load_file(Path(done.folder.bundle) / "projector.safetensors") for done in (two, three)]
    assert rows[0]["embed_tokens.weight"].shape == (2, 32)
    assert not torch.allclose(rows[0]["embed_tokens.weight"][0], rows[0]["embed_tokens.weight"][1], atol=1e-2)
    for name in rows[0]:
        torch.testing.assert_close(rows[0][name], rows[1][name], rtol=0, atol=1e-3, msg=name)
    parts = load_pretrained_model(three.folder.bundle)
    learnt = parts.llava.language_model.get_input_embeddings().weight[list(parts.new_token_ids)]
    assert torch.equal(learnt, rows[1]["embed_tokens.weight"])
