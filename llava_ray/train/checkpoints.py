"""Complete, resumable checkpoints: ZeRO shards, RNG states, position; committed by Ray only when every rank reported.

A checkpoint folder holds ``zero/`` (each rank's shards), ``rng_rank{r}.pt``, ``trainer_state.json`` and ``COMPLETE``.
Frozen parameters are not in it: they come from the base, which ``trainer_state.json`` names with its fingerprint.
Where few parameters are trainable (an adapter, or the projector alone) ``model/`` is a bundle, so that the checkpoint
can be used as it is; ``consolidation`` makes a bundle from the others.
"""

import errno
import json
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointUploadMode
from torch import nn

from llava_ray.errors import CheckpointError
from llava_ray.model.assembly import LlavaParts
from llava_ray.model.formats.layout import COMPLETE, TRAINER_STATE
from llava_ray.model.formats.manifest import Manifest
from llava_ray.model.saving import save_bundle
from llava_ray.train.final_model import describe_training, find_contents, gather_tensors
from llava_ray.train.settings import LoopSettings
from llava_ray.train.universal import load_for_other_world_size

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

ZERO_TAG, MODEL_FOLDER = "zero", "model"
# The sections of the resolved settings that determine the model.
_MODEL_SETTINGS = {"model", "data", "train", "lora"}

# Parts of the messages with which torch's file writer reports a full disk.
_FAILED_WRITES = ("PytorchStreamWriter", "file write failed", "iostream error", "inline_container.cc")

# Ray uploads in the background without backpressure: more unfinished uploads than this could fill the local disk.
_MAX_UNFINISHED_UPLOADS = 2

_RECORD_SECONDS = 0.02  # between two looks whether the other ranks' records have come


class Checkpointer:
    """Save and restore one rank's part of the training state."""

    def __init__(self, engine: "DeepSpeedEngine", parts: LlavaParts, settings: LoopSettings) -> None:
        """Initialise for this rank, and delete files that a killed upload may have left on the local disk."""
        self.engine = engine
        self.parts = parts
        slim_states(engine.module)
        self.settings = settings
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        name = settings.config.run.name
        self.local = Path(tempfile.gettempdir()) / f"llava_ray-{name}-{settings.plan_hash}-rank{self.rank}"
        shutil.rmtree(self.local, ignore_errors=True)

    def restore(self) -> int:
        """Load the committed checkpoint, if there is one, and return the step to resume at."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return 0
        with checkpoint.as_directory() as folder:
            state = json.loads(Path(folder, TRAINER_STATE).read_text())
            if state["plan_hash"] != self.settings.plan_hash:
                raise CheckpointError(
                    f"{checkpoint.path} was made with plan {state['plan_hash']}, this run's is "
                    f"{self.settings.plan_hash}: the data or their order changed; restore them, or start over with "
                    "--run.restart True"
                )
            check_same_base(state, self.parts.manifest, checkpoint.path)
            if state["world_size"] == self.world_size or self.engine.zero_optimization_stage() == 0:
                self.engine.load_checkpoint(folder, tag=ZERO_TAG, custom_load_fn=load_trainable)
            else:
                load_for_other_world_size(self.engine, Path(folder), ZERO_TAG)
            self.restore_randomness(Path(folder), state)
        if self.engine.global_steps != state["step"]:
            raise CheckpointError(
                f"{checkpoint.path}: the engine is at step {self.engine.global_steps}, trainer_state.json says "
                f"{state['step']}; delete this checkpoint to resume from the one before"
            )
        return int(state["step"])

    def save_dry_run(self) -> None:
        """Save a throw-away checkpoint before the first step, so that a full or read-only disk is found now."""
        self.write(self.local / "dry-run", step=0)
        shutil.rmtree(self.local, ignore_errors=True)

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint is due after ``step`` steps."""
        return step % self.settings.config.train.save_steps == 0 or step == self.settings.until

    def save(self, step: int, held_out_metrics: dict[str, float]) -> None:
        """Save a checkpoint after ``step`` steps; ``held_out_metrics`` holds the held-out metrics."""
        while self.local.exists() and len(list(self.local.iterdir())) >= _MAX_UNFINISHED_UPLOADS:
            time.sleep(0.2)
        folder = self.local / f"step-{step:08d}"
        self.write(folder, step)
        # Order matters: the ledger is on storage before Ray can commit the checkpoint. A kill between the two leaves
        # ledger rows that the resumed run rewrites; the other order would leave steps without rows. Ray commits when
        # every rank has reported, so it is enough that one waits for the rows of all.
        while self.rank == 0 and not ray.get(self.settings.journal.flush.remote(step)):
            time.sleep(_RECORD_SECONDS)
        ray.train.report(
            {"step": step, "num_steps": self.settings.num_steps} | held_out_metrics,
            checkpoint=Checkpoint.from_directory(str(folder)),
            checkpoint_dir_name=folder.name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )

    def write(self, folder: Path, step: int) -> None:
        """Write this rank's files of a checkpoint. Raises CheckpointError when the disk is full or read-only."""
        try:
            folder.mkdir(parents=True)
            self.engine.save_checkpoint(
                str(folder), tag=ZERO_TAG, client_state={"step": step}, exclude_frozen_parameters=True
            )
            torch.save(_random_state(), folder / f"rng_rank{self.rank}.pt")
            self.write_model(folder / MODEL_FOLDER, step)
            if self.rank == 0:
                (folder / TRAINER_STATE).write_text(json.dumps(self.describe(step), indent=1))
                # Written last: its presence shows that rank 0 wrote everything before it.
                (folder / COMPLETE).touch()
        except (OSError, RuntimeError) as error:
            if not _disk_trouble(error):
                raise
            free = shutil.disk_usage(self.local.anchor).free / 2**30
            raise CheckpointError(
                f"cannot write the checkpoint of step {step} to {folder} ({free:.1f} GiB free there): {error}; "
                "free some space or set TMPDIR, then start the run again: it resumes from the last complete checkpoint"
            ) from error

    def write_model(self, folder: Path, step: int) -> None:
        """Write the model as a bundle where few of its parameters are trainable; collective."""
        include = find_contents(self.settings.config)
        if include != "all":
            tensors = gather_tensors(self.engine, self.parts, include)
            if self.rank == 0:
                place = f"{self.settings.run_folder}/{folder.parent.name}/{folder.name}"
                training = describe_training(self.settings, step)
                save_bundle(folder, self.parts, tensors, include=include, training=training, place=place)

    def describe(self, step: int) -> dict[str, Any]:
        """Return the contents of trainer_state.json: the position in the run, the model and its base."""
        config = self.settings.config
        return {
            "step": step,
            "plan_hash": self.settings.plan_hash,
            "data_hash": self.settings.data_hash,
            "world_size": self.world_size,
            "seed": config.train.seed,
            "zero_stage": config.train.zero_stage,
            "training": describe_training(self.settings, step),
            "config": config.model_dump(mode="json", include=_MODEL_SETTINGS),
            "manifest": self.parts.manifest.model_dump(mode="json"),
        }

    def restore_randomness(self, folder: Path, state: dict[str, Any]) -> None:
        """Restore this rank's RNG states, or derive new ones where the number of ranks changed."""
        if state["world_size"] == self.world_size:
            _set_random_state(torch.load(folder / f"rng_rank{self.rank}.pt", weights_only=False))
        else:
            seed_all(state["seed"], state["step"], self.rank)


def check_same_base(state: dict[str, Any], found: Manifest, checkpoint: str) -> None:
    """Raise CheckpointError if the frozen weights are not those that the checkpoint was trained with."""
    made_with = Manifest.model_validate(state["manifest"])
    for part in ("language_model", "vision_tower"):
        then, now = getattr(made_with, part), getattr(found, part)
        if then.fingerprint != now.fingerprint:
            raise CheckpointError(
                f"{checkpoint} was made with the {part.replace('_', ' ')} {then.base} (fingerprint "
                f"{then.fingerprint[:12]}), but {now.base} holds other weights now ({now.fingerprint[:12]}); "
                "restore the old ones, or start over with --run.restart True"
            )


def slim_states(module: nn.Module) -> None:
    """Remove from every later ``state_dict`` the entries that no checkpoint needs.

    DeepSpeed leaves frozen parameters out by name. What remains are the second names of tied parameters (a head of
    the embeddings' size) and the scales of quantised ones, which are stored under names of their own.
    """
    needed = {name for name, _ in module.named_parameters()} | {name for name, _ in module.named_buffers()}
    needed |= {name for name, parameter in module.named_parameters(remove_duplicate=False) if parameter.requires_grad}

    def drop(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        del module, metadata
        for name in [name for name in state if name.removeprefix(prefix) not in needed]:
            del state[name]

    module.register_state_dict_post_hook(drop)


def load_trainable(src: dict[str, torch.Tensor], dst: nn.Module) -> None:
    """Load a state without frozen parameters. Raises CheckpointError if a trainable tensor is missing.

    DeepSpeed calls it with the keyword arguments ``src`` and ``dst``.
    """
    missing = set(dst.load_state_dict(src, strict=False).missing_keys)
    lost = missing - {name for name, parameter in dst.named_parameters() if not parameter.requires_grad}
    lost -= _tied_names(dst)
    if lost:
        raise CheckpointError(f"the checkpoint lacks {sorted(lost)[:5]} ({len(lost)} in all): it is not this model's")


def _tied_names(module: nn.Module) -> set[str]:
    """Return the second names of tied parameters, which no checkpoint repeats."""
    return {name for name, _ in module.named_parameters(remove_duplicate=False)} - {
        name for name, _ in module.named_parameters()
    }


def _disk_trouble(error: BaseException) -> bool:
    """Return whether the disk caused an error: torch wraps a full disk in a RuntimeError of its file writer."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
    return any(words in str(error) for words in _FAILED_WRITES)


def _random_state() -> dict[str, Any]:
    """Return the states of every random number generator a step may use."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, Any]) -> None:
    """Restore the states that ``_random_state`` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


def seed_all(*parts: int) -> None:
    """Seed every generator from several numbers, e.g. (seed, step, rank)."""
    seed = int(np.random.SeedSequence(parts).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
