"""Checkpoints without a cluster: two DeepSpeed processes save, at every ZeRO stage; what they saved is a model."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file
from samples import small_run

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.errors import CheckpointError
from llava_ray.model.formats.manifest import read_manifest
from llava_ray.model.loading import load_pretrained_model
from llava_ray.model.lora.adapters import has_adapter
from llava_ray.model.network.sample_attention import SampleBorders
from llava_ray.train.consolidation import consolidate

pytestmark = pytest.mark.slow

LORA = {"lora.lora_enable": True, "lora.lora_r": 4, "lora.lora_alpha": 8, "lora.lora_dropout": 0.0}
FULL = {"model.freeze_embeddings": True}  # some of it stays, and comes from the base
TOWER = {"model.unfreeze_mm_vision_tower": True, "train.mm_vision_tower_lr": 1e-3}
CASES: dict[str, dict[str, Any]] = {
    **{f"full-{stage}": FULL | {"train.zero_stage": stage} for stage in range(4)},
    "full-0-bf16": {"train.bf16": True, "train.zero_stage": 0},
    "full-3-bf16": {"train.bf16": True, "train.zero_stage": 3},
    **{f"lora-{stage}": LORA | {"train.zero_stage": stage} for stage in range(4)},
    "dora-3": LORA | {"train.zero_stage": 3, "lora.use_dora": True, "train.gradient_checkpointing": True},
    "projector-3": LORA | {"train.zero_stage": 3, "lora.lora_target_modules": ["q_proj", "projector.0"]},
    "tower-2": LORA
    | {
        "model.unfreeze_mm_vision_tower": True,
        "lora.lora_target_modules": ["q_proj", "vision_tower.encoder.layers.0.mlp.fc1"],
    },
    "full-tower-2": TOWER | {"train.zero_stage": 2},
    "full-tower-3": TOWER | {"train.zero_stage": 3, "train.gradient_checkpointing": True},
    "align": {"model.tune_mm_mlp_adapter": True},
}
STEP = "step-00000003"


def train_and_save(rank: int, folder: Path, port: int) -> None:
    """Take three steps in each case, and save as a run does: a checkpoint, and the model in memory beside it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    from llava_ray.model.saving import save_bundle
    from llava_ray.train.checkpoints import Checkpointer
    from llava_ray.train.engine import build_engine, load_parts
    from llava_ray.train.final_model import find_contents, gather_tensors
    from llava_ray.train.nonfinite import leaving_out
    from llava_ray.train.settings import LoopSettings

    for name, changes in CASES.items():
        config = small_run(folder, **changes, **{"run.name": name})
        settings = LoopSettings(config, None, 3, 3, "plan", "data", "", "", 1, None)  # type: ignore[arg-type]
        parts = load_parts(config, torch.device("cpu"))
        engine = build_engine(parts, config, 3)
        seen = (3, 32, 32) if config.model.unfreeze_mm_vision_tower else (16, parts.mm_hidden_size)
        losses = [step_loss(engine, rank, step, seen) for step in range(3)]
        checkpointer = Checkpointer(engine, parts, settings)
        checkpointer.write(folder / name / f"rank{rank}" / STEP, 3)
        tensors = gather_tensors(engine, parts, find_contents(config))
        if rank == 0:
            save_bundle(folder / name / "memory", parts, tensors, include=find_contents(config))
            (folder / name / "losses.json").write_text(json.dumps(losses))
        writes = checkpointer.stage(folder / name / "staged" / f"rank{rank}" / STEP, 3, math.inf)
        step_loss(engine, rank, 3, seen)  # training goes on before a word is written
        for write in writes:
            write()
        checkpointer.write(folder / name / "before" / f"rank{rank}" / STEP, 4)
        with leaving_out(engine):
            step_loss(engine, rank, 4, seen)
        checkpointer.write(folder / name / "left out" / f"rank{rank}" / STEP, 4)


def step_loss(engine: Any, rank: int, step: int, seen: tuple[int, ...]) -> float:
    """Take one step on a random row with an image (features, or pixels), and return its loss over both ranks."""
    draw = torch.Generator().manual_seed(10 * step + rank)
    ids = torch.randint(5, 300, (1, 40), generator=draw)
    ids[0, 2:18] = -200
    image = {"pixels" if len(seen) == 3 else "features": torch.randn(1, *seen, generator=draw)}
    labels = ids.masked_fill(ids < 0, -100)
    borders = SampleBorders.of([40], torch.device("cpu"))
    loss = engine(ids, torch.arange(40)[None], labels, borders=borders, **image).sum() / 46
    engine.backward(loss * 2, scale_wrt_gas=False)
    engine.step()
    total = loss.detach().clone()
    torch.distributed.all_reduce(total)
    return float(total)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each case, with the ranks' files merged as Ray merges them."""
    folder = tmp_path_factory.mktemp("saved")
    small_run(folder)
    torch.multiprocessing.spawn(train_and_save, (folder, 29600 + os.getpid() % 300), nprocs=2)
    for name in CASES:
        for rank in range(2):
            shutil.copytree(folder / name / f"rank{rank}" / STEP, folder / name / STEP, dirs_exist_ok=True)
    return folder


def weights(bundle: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.relative_to(bundle)} {name}": tensor
        for file in sorted(bundle.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_becomes_the_model_that_was_in_memory(name: str, saved: Path, tmp_path: Path) -> None:
    consolidate(saved / name / STEP, tmp_path / "model")
    found, expected = weights(tmp_path / "model"), weights(saved / name / "memory")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    assert {found[key].dtype for key in found} == {tensor.dtype for tensor in expected.values()}
    assert read_manifest(tmp_path / "model").training == {
        "run": name,
        "steps": 3,
        "data_hash": "data",
        "plan_hash": "plan",
    }
    load_pretrained_model(tmp_path / "model")


def read_states(folder: Path) -> dict[str, Any]:
    """Return what DeepSpeed and we wrote of each rank, by the files' places."""
    files = sorted(file for file in folder.rglob("*.pt"))
    return {str(file.relative_to(folder)): torch.load(file, weights_only=False) for file in files}


def flatten(state: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield tensors and plain values of a state by their places."""
    if isinstance(state, dict):
        for key, value in state.items():
            yield from flatten(value, f"{place}.{key}")
    elif isinstance(state, list | tuple):
        for index, value in enumerate(state):
            yield from flatten(value, f"{place}.{index}")
    elif isinstance(state, torch.Tensor | int | float | str | bool | None):
        yield place, state


def differing(one: Path, other: Path) -> dict[str, Any]:
    """Return what differs between two checkpoints, as it is in the first, by its place."""
    states = [dict(flatten(read_states(folder))) for folder in (one, other)]
    assert states[0].keys() == states[1].keys()
    assert len(states[0]) > 50
    return {
        key: value
        for key, value in states[0].items()
        if not (torch.equal(value, states[1][key]) if isinstance(value, torch.Tensor) else value == states[1][key])
    }


@pytest.mark.parametrize("name", CASES)
def test_a_staged_checkpoint_is_that_of_its_moment(name: str, saved: Path) -> None:
    for rank in range(2):
        assert differing(saved / name / f"rank{rank}" / STEP, saved / name / f"staged/rank{rank}" / STEP) == {}
    bundles = [saved / name / part / STEP / "model" for part in ("rank0", "staged/rank0")]
    found, expected = map(weights, bundles)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize("name", CASES)
def test_a_step_left_out_changes_neither_weights_nor_optimiser(name: str, saved: Path) -> None:
    changed = differing(saved / name / "before/rank0" / STEP, saved / name / "left out/rank0" / STEP)
    assert not [key for key, value in changed.items() if isinstance(value, torch.Tensor)]
    assert not [key for key in changed if key.endswith(".step")]
    assert {"global_steps", "skipped_steps"} <= {key.rpartition(".")[2] for key in changed}


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("full")])
def test_a_checkpoint_of_an_adapter_or_projector_is_a_model_as_it_is(name: str, saved: Path) -> None:
    parts = load_pretrained_model(saved / name / STEP / "model")
    assert has_adapter(parts.llava.language_model) == (name != "align")
    assert not (saved / name / STEP / "model" / "language_model").exists()
    files = [file for file in (saved / name / STEP).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 500_000


def test_every_zero_stage_learns_the_same_adapter(saved: Path) -> None:
    curves = [json.loads((saved / f"lora-{stage}" / "losses.json").read_text()) for stage in range(4)]
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], abs=1e-4)
    tensors = [weights(saved / f"lora-{stage}" / "memory") for stage in range(4)]
    for other in tensors[1:]:
        for key, tensor in tensors[0].items():
            torch.testing.assert_close(other[key], tensor, atol=1e-4, rtol=0)


def test_zero_3_trains_a_tower_to_the_same_weights(saved: Path) -> None:
    curves = [json.loads((saved / f"full-tower-{stage}" / "losses.json").read_text()) for stage in (2, 3)]
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)
    two, three = (weights(saved / f"full-tower-{stage}" / "memory") for stage in (2, 3))
    assert any(name.startswith("vision_tower/") for name in two)
    for name, tensor in two.items():
        torch.testing.assert_close(three[name], tensor, atol=1e-3, rtol=0)


def test_the_state_says_which_model_it_is(saved: Path) -> None:
    state = json.loads((saved / "lora-2" / STEP / "trainer_state.json").read_text())
    config = FinetuneConfig.parsed(state["config"])
    assert (config.lora.lora_r, config.train.zero_stage) == (4, 2)
    assert state["manifest"]["language_model"]["base"] == str(saved / "language_model")
    assert len(state["manifest"]["language_model"]["fingerprint"]) == 64


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("COMPLETE", "is half-written: COMPLETE is missing, torn or not of every worker"),
        ("rng_rank1.pt", r"is half-written: rng_rank\*.pt"),
        ("trainer_state.json", "is half-written: trainer_state.json"),
        ("zero", "is half-written: zero"),
        ("zero/zero_pp_rank_1_mp_rank_00_optim_states.pt", r"is half-written: zero/\*_optim_states.pt"),
        ("zero/zero_pp_rank_0_mp_rank_00_model_states.pt", r"is half-written: zero/\*_model_states.pt"),
    ],
)
def test_a_half_written_checkpoint_is_refused_by_name(missing: str, message: str, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "full-3" / STEP, tmp_path / STEP)
    path = tmp_path / STEP / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(CheckpointError, match=message):
        consolidate(tmp_path / STEP, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_torn_file_is_refused(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "full-2" / STEP, tmp_path / STEP)
    file = tmp_path / STEP / "zero/mp_rank_00_model_states.pt"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="zero cannot be read"):
        consolidate(tmp_path / STEP, tmp_path / "model")


def test_a_tensor_that_learnt_and_is_not_there_is_refused(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "full-2" / STEP, tmp_path / STEP)
    file = tmp_path / STEP / "zero/mp_rank_00_model_states.pt"
    state = torch.load(file, weights_only=False)
    del state["module"]["language_model.model.norm.weight"]
    torch.save(state, file)
    with pytest.raises(CheckpointError, match=r"lacks 1 trained tensors, the first is language_model.model.norm"):
        consolidate(tmp_path / STEP, tmp_path / "model")


def test_no_checkpoint_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is no checkpoint: it holds no trainer_state.json"):
        consolidate(tmp_path, tmp_path / "model")


def test_a_base_that_changed_since_is_refused(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "full-1" / STEP, tmp_path / STEP)
    file = tmp_path / STEP / "trainer_state.json"
    state = json.loads(file.read_text())
    state["manifest"]["language_model"]["fingerprint"] = "0" * 64
    file.write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=r"made with the language model .* holds other weights now"):
        consolidate(tmp_path / STEP, tmp_path / "model")
