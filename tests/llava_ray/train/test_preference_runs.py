"""Real runs over preferences: the reference once, resumed at another world size, ZeRO 2 and 3, adapters and not."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from samples import small_run, write_preferences, write_samples

from llava_ray.chat.conversation import IGNORE_INDEX
from llava_ray.config.finetune import FinetuneConfig
from llava_ray.data.encoder_settings import load_encoder
from llava_ray.data.preparation import prepare_data
from llava_ray.data.record_examples import encode_row
from llava_ray.data.reference_file import take_reference, write_reference
from llava_ray.data.shards import open_prepared, read_shard_rows
from llava_ray.data.stages import decode_views
from llava_ray.data.token_lengths import TokenLengths
from llava_ray.errors import TrainingError
from llava_ray.images.processing import normalize_pixels
from llava_ray.model.blueprint import read_blueprint
from llava_ray.runtime import connected
from llava_ray.train import reference
from llava_ray.train.engine import assemble_for
from llava_ray.train.finished_run import FinishedRun
from llava_ray.train.identity import identify_run
from llava_ray.train.run_data import stream_settings
from llava_ray.train.trainer import finetune, train_until

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
LONG = pytest.mark.verify


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, models and runs of this module."""
    folder = tmp_path_factory.mktemp("preferences")
    write_preferences(folder, 32)
    write_samples(folder / "conversations", 16, seed=3)
    return folder


def make_config(folder: Path, name: str, **changes: Any) -> FinetuneConfig:
    fixed = {
        "run.name": name,
        "data.data_path": str(folder / "preferences.jsonl"),
        "tracking.log_model": False,
        "train.objective": "dpo",
        "train.model_max_length": 400,
        "train.num_train_epochs": 3,
        "train.learning_rate": 1e-3,
        "train.lr_scheduler_type": "constant",
    }
    (folder / "data.json").touch()
    return small_run(folder, **fixed | {key.replace("__", "."): value for key, value in changes.items()})


def run(folder: Path, name: str, **changes: Any) -> FinishedRun:
    config = make_config(folder, name, **changes)
    with connected(config.cluster) as resources:
        return finetune(config, prepare_data(config.data), resources, show_progress=False)


def ledger(finished: FinishedRun) -> bytes:
    return Path(finished.folder.path, "ledger.jsonl").read_bytes()


def metrics(finished: FinishedRun) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(finished.folder.path, "metrics.jsonl").read_text().splitlines()]


def reference_files(folder: Path) -> dict[Path, int]:
    """The files of the reference, with the time at which each was written."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("cache/prepared-*/tokens-*/reference-*/**/*.*")}


@pytest.fixture(scope="module")
def first(ray_cluster, folder: Path) -> FinishedRun:
    """Three epochs of DPO by two workers."""
    return run(folder, "first")


def test_a_run_learns_what_is_preferred(first: FinishedRun) -> None:
    rows = metrics(first)
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-6), "the policy is the reference"
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert np.mean([row["reward_accuracy"] for row in rows[8:]]) > 0.8
    assert rows[-1]["loss"] < rows[0]["loss"]
    lines = [json.loads(line) for line in ledger(first).splitlines()]
    assert sorted(name for line in lines[:4] for name in line["samples"]) == [f"p{index:04d}" for index in range(32)]


def alone(parts: Any, config: FinetuneConfig, stream: Any, row: dict[str, Any], side: int) -> float:
    """The log-probability of one side of a record by the loaded model, from its logits without any packing."""
    encoder = load_encoder(stream.encoder)
    turns = row["turns"] if side == 0 else [*row["turns"][:-1], *row["rejected"]]
    [example] = encode_row(encoder, row | {"turns": turns, "rejected": None})
    features = None
    if row["images"]:
        spec = stream.image_spec
        cell = decode_views(row["images"][0], (row["widths"][0], row["heights"][0]), row["id"], stream)
        pixels = np.frombuffer(cell, np.uint8).reshape(-1, 3, spec.height, spec.width).copy()
        features = parts.tower(normalize_pixels(torch.from_numpy(pixels), spec))
    ids, labels = (torch.from_numpy(values.astype(np.int64)) for values in (example.input_ids, example.labels))
    predicting = torch.arange(len(ids) - 1)[labels[1:] != IGNORE_INDEX]
    logits = parts.llava(ids[None], torch.arange(len(ids))[None], predicting, features=features)
    return float(logits.double().log_softmax(-1).gather(1, labels[predicting + 1][:, None]).sum())


@torch.no_grad()
def test_the_reference_is_computed_once_and_is_that_of_the_live_model(first: FinishedRun, folder: Path) -> None:
    written = reference_files(folder)
    assert len(written) == 2, "one chunk, and all of them together"
    second = run(folder, "second", train__learning_rate=5e-4, preference__beta=0.3)
    assert reference_files(folder) == written
    assert metrics(second)[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    [place] = {path.parent for path in written if path.name == "reference.parquet"}
    lengths = TokenLengths.open(str(place.parent))
    config, prepared = make_config(folder, "first"), open_prepared(str(place.parent.parent))
    blueprint = read_blueprint(config.model, config.data.image_aspect_ratio)
    with connected(config.cluster) as resources:
        stream = stream_settings(config, prepared, blueprint, resources)
    parts = assemble_for(config)
    parts.llava.eval()
    shards, rows = lengths.column("shard"), lengths.column("row")
    for example in range(0, 32, 3):
        name = prepared.shards[shards[example]].name
        [row] = read_shard_rows(prepared.path, name, [int(rows[example])]).to_pylist()
        expected = [alone(parts, config, stream, row, side) for side in range(2)]
        assert take_reference(str(place), np.array([example]))[0].tolist() == pytest.approx(expected, rel=1e-5)


def test_an_interrupted_reference_goes_on_with_the_missing_chunks(
    first: FinishedRun, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill between two chunks: four of them, one of which was written."""
    monkeypatch.setattr(reference, "_CHUNK", 8)
    [place] = {path.parent for path in reference_files(folder) if path.name == "reference.parquet"}
    lengths = replace(TokenLengths.open(str(place.parent)), path=str(tmp_path / "tokens"))
    shutil.copytree(place.parent, lengths.path, ignore=shutil.ignore_patterns("reference-*"))
    config, prepared = make_config(folder, "first"), open_prepared(str(place.parent.parent))
    blueprint = read_blueprint(config.model, config.data.image_aspect_ratio)
    identity = identify_run(config, prepared.data_hash)
    written = Path(lengths.path, place.name, "chunks", f"{8:09d}.json")
    written.parent.mkdir(parents=True)
    rows = take_reference(str(place), np.arange(8, 16)).tolist()
    written.write_text(json.dumps(rows))
    before = written.stat().st_mtime_ns
    with connected(config.cluster) as resources:
        stream = stream_settings(config, prepared, blueprint, resources)
        found = reference.cache_reference(config, stream, lengths, identity, resources)
    assert found is not None
    assert written.stat().st_mtime_ns == before, "what was written is not computed again"
    expected = take_reference(str(place), np.arange(32))
    np.testing.assert_allclose(found.take(np.arange(32)), expected, rtol=1e-5)


def test_a_run_resumed_by_another_number_of_workers_is_the_same(first: FinishedRun, folder: Path) -> None:
    begun = make_config(folder, "resumed")
    with connected(begun.cluster) as resources:
        assert train_until(begun, prepare_data(begun.data), resources, until=5, show_progress=False) is None
    resumed = run(folder, "resumed", cluster__num_workers=1)
    assert ledger(resumed) == ledger(first)
    assert resumed.read_losses() == pytest.approx(first.read_losses(), rel=1e-4, abs=1e-5)


def test_a_reference_of_other_weights_is_refused(first: FinishedRun, folder: Path) -> None:
    [path] = [path for path in reference_files(folder) if path.name == "reference.parquet"]
    kept = path.read_bytes()
    write_reference(str(path.parent), take_reference(str(path.parent), np.arange(32)) - 3.0)
    try:
        with pytest.raises(TrainingError, match="computed with other weights"):
            run(folder, "foreign", run__max_failures=0)
    finally:
        path.write_bytes(kept)


def test_conversations_beside_pairs_in_one_mixture(first: FinishedRun, folder: Path) -> None:
    sources = [
        {"name": "pairs", "data_path": str(folder / "preferences.jsonl"), "epochs": 1},
        {
            "name": "talk",
            "data_path": str(folder / "conversations/data.json"),
            "image_folder": str(folder / "conversations/images"),
            "kind": "instruction",
            "epochs": 1,
        },
    ]
    mixed = run(
        folder,
        "mixed",
        data__data_path="",
        data__sources=sources,
        train__num_train_epochs=1,
        preference__rpo_alpha=0.1,
    )
    for row in metrics(mixed):
        assert row["loss_share/pairs"] + row["loss_share/talk"] == pytest.approx(row["loss"], rel=1e-6)
    assert metrics(mixed)[0]["loss_share/pairs"] > np.log(2)


@LONG
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("objective", ["dpo", "simpo"])
def test_every_stage_and_adapters_have_the_same_ledger(first, folder: Path, stage: int, lora: bool, objective) -> None:
    """Text-only pairs stand beside pairs with images: no rank waits for another for ever."""
    changes = {"train__zero_stage": stage, "lora__lora_enable": lora, "train__objective": objective}
    if objective == "simpo":
        changes["preference__beta"] = 2.0
    name = f"{objective}-zero{stage}-{'lora' if lora else 'full'}"
    begun = make_config(folder, name, **changes)
    with connected(begun.cluster) as resources:
        assert train_until(begun, prepare_data(begun.data), resources, until=4, show_progress=False) is None
    finished = run(folder, name, cluster__num_workers=1, **changes)
    assert ledger(finished) == ledger(first)
    if objective == "dpo":
        assert metrics(finished)[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
