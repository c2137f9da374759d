"""Real runs with a sample that is not finite: it is named, and the run stops, or goes on without its step."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from samples import small_run
from test_training import run

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.data.feature_cache import location_key, read_index
from llava_ray.data.preparation import prepare_data
from llava_ray.errors import DivergedError
from llava_ray.model.blueprint import read_blueprint
from llava_ray.runtime import connected
from llava_ray.train.run_data import stream_settings

pytestmark = pytest.mark.ray

SHARD, ROW = 1, 5  # of the sample


def cache(config: FinetuneConfig) -> None:
    """Compute the features of all images, as a run does before its first step."""
    with connected(config.cluster) as resources:
        blueprint = read_blueprint(config.model, config.data.image_aspect_ratio)
        stream_settings(config, prepare_data(config.data), blueprint, resources)


def poison(entry: Path) -> str:
    """Overwrite the cached features of one sample's image with NaN, and return the sample's id."""
    index = read_index(str(entry))
    [row] = (index.places == location_key(SHARD, ROW, 0)).nonzero()[0]
    with (entry / f"{index.files[index.file[row]]}.bin").open("r+b") as file:
        file.seek(int(index.offset[row]))
        file.write(b"\xff" * int(index.length[row]))
    [shard] = entry.parents[1].glob(f"prepared-*/shard-{SHARD:05d}-*.parquet")
    return str(pq.read_table(shard).column("id")[ROW])


def test_a_sample_with_nan_features_is_named_and_its_step_can_be_skipped(ray_cluster: None, tmp_path: Path) -> None:
    settings = {"data__vision_features": "cached", "train__max_steps": 10, "train__num_train_epochs": 2}
    cache(small_run(tmp_path, **{key.replace("__", "."): value for key, value in settings.items()}))
    [entry] = (tmp_path / "cache/features").iterdir()
    bad = poison(entry)
    with pytest.raises(DivergedError, match=f"image features are not finite: {bad}.*train.on_nonfinite") as caught:
        run(tmp_path, "poisoned", **settings)
    step = int(str(caught.value).partition(":")[0].removeprefix("step "))
    committed = sorted(path.name for path in (tmp_path / "runs/poisoned").glob("step-*"))
    assert committed == ([f"step-{step // 3 * 3:08d}"] if step >= 3 else [])

    finished = run(tmp_path, "poisoned", **settings, train__on_nonfinite="skip")
    rows = [json.loads(line) for line in Path(f"{finished.folder.path}/metrics.jsonl").read_text().splitlines()]
    ledger = [json.loads(line) for line in Path(f"{finished.folder.path}/ledger.jsonl").read_text().splitlines()]
    hit = [row["step"] for row in ledger if bad in row["samples"]]
    assert hit[0] == step
    assert rows[-1]["skipped_steps"] == len(hit)
    assert [row["step"] for row in rows if row["loss"] is None] == hit
    assert all(row["loss"] < 20 for row in rows if row["step"] not in hit)
