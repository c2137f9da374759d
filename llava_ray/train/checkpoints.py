"""Complete, resumable checkpoints: ZeRO shards, RNG states, position; committed by Ray only when every rank reported.

A checkpoint folder holds ``zero/`` (each rank's shards), ``rng_rank{r}.pt``, ``trainer_state.json`` and ``COMPLETE``.
Frozen parameters are not in it: they come from the base, which ``trainer_state.json`` names with its fingerprint.
Where few parameters are trainable (an adapter, or the projector alone) ``model/`` is a bundle, so that the checkpoint
can be used as it is; ``consolidation`` makes a bundle from the others.
"""

import json
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train import Checkpoint
from torch import nn

from llava_ray.errors import CheckpointError
from llava_ray.model.assembly import LlavaParts
from llava_ray.model.formats.layout import COMPLETE, TRAINER_STATE
from llava_ray.model.formats.manifest import Manifest
from llava_ray.model.saving import save_bundle
from llava_ray.train.disk_errors import naming_disk
from llava_ray.train.final_model import describe_training, find_contents, gather_tensors
from llava_ray.train.randomness import random_state, seed_all, set_random_state
from llava_ray.train.score_history import KEPT_BY, ScoreHistory
from llava_ray.train.settings import LoopSettings
from llava_ray.train.staging import Write, stageable_bytes, staging
from llava_ray.train.universal import load_for_other_world_size
from llava_ray.train.uploads import CheckpointUploads

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

ZERO_TAG, MODEL_FOLDER = "zero", "model"
# The sections of the resolved settings that determine the model.
_MODEL_SETTINGS = {"model", "data", "train", "lora"}


def folder_name(step: int) -> str:
    """Return the name of the folder of the checkpoint after ``step`` steps."""
    return f"step-{step:08d}"


class Checkpointer:
    """Save and restore one rank's part of the training state."""

    def __init__(self, engine: "DeepSpeedEngine", parts: LlavaParts, settings: LoopSettings) -> None:
        """Initialise for this rank, and delete files that a killed upload may have left on the local disk."""
        self.engine = engine
        self.parts = parts
        slim_states(engine.module)
        self.settings = settings
        self.scores = ScoreHistory(settings.config.held_out)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        name = settings.config.run.name
        self.local = Path(tempfile.gettempdir()) / f"llava_ray-{name}-{settings.plan_hash}-rank{self.rank}"
        shutil.rmtree(self.local, ignore_errors=True)
        self.uploads = CheckpointUploads(settings.journal, self.rank)

    def restore(self) -> int:
        """Load the committed checkpoint, if there is one, and return the step to resume at."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return 0
        state = self.load(checkpoint)
        self.scores = ScoreHistory(self.settings.config.held_out, state.get("scores", ()))
        return int(state["step"])

    def restore_step(self, step: int) -> None:
        """Load the checkpoint after ``step`` steps of this run, once it is on storage; collective."""
        self.uploads.wait()
        dist.barrier()
        storage = ray.train.get_context().get_storage()
        place = f"{storage.experiment_fs_path}/{folder_name(step)}"
        self.load(Checkpoint(place, filesystem=storage.storage_filesystem))

    def load(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Load a checkpoint's training state and return its ``trainer_state.json``; collective."""
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
        return dict(state)

    def save_dry_run(self) -> None:
        """Save a throw-away checkpoint before the first step, so that a full or read-only disk is found now."""
        self.write(self.local / "dry-run", step=0)
        shutil.rmtree(self.local, ignore_errors=True)

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint is due after ``step`` steps."""
        return step % self.settings.config.train.save_steps == 0 or step == self.settings.until

    def save(self, step: int, held_out_metrics: dict[str, float]) -> None:
        """Save a checkpoint after ``step`` steps; ``held_out_metrics`` holds the held-out metrics.

        The state is copied to host memory; a thread of Ray's then writes and commits it while training goes on. One
        save is on its way at most: this waits for the one before, and raises its error.
        """
        self.uploads.wait()
        folder = self.local / folder_name(step)
        writes = self.stage(folder, step, stageable_bytes(ray.train.get_context().get_local_world_size()))
        metrics = {"step": step, "num_steps": self.settings.num_steps} | held_out_metrics
        if self.settings.config.held_out.keep_best:
            metrics[KEPT_BY] = self.scores.rank_of(step)
        self.uploads.start(folder, step, writes, metrics)

    def write(self, folder: Path, step: int) -> None:
        """Write this rank's files of a checkpoint. Raises CheckpointError when the disk is full or read-only."""
        writes = self.stage(folder, step, 0.0)
        with naming_disk(folder, step, "set TMPDIR"):
            for write in writes:
                write()

    def stage(self, folder: Path, step: int, most_bytes: float) -> list[Write]:
        """Copy this rank's part of a checkpoint, at most so many bytes, and return what writes it; collective.

        What does not fit is written at once. Raises CheckpointError when the disk is full or read-only.
        """
        with naming_disk(folder, step, "set TMPDIR"):
            folder.mkdir(parents=True)
            with staging(self.engine, most_bytes) as writes:
                self.engine.save_checkpoint(
                    str(folder), tag=ZERO_TAG, client_state={"step": step}, exclude_frozen_parameters=True
                )
        writes.append(partial(torch.save, random_state(), folder / f"rng_rank{self.rank}.pt"))
        include = find_contents(self.settings.config)
        if include != "all":  # where few parameters are trainable, the model is there as a bundle too
            tensors = gather_tensors(self.engine, self.parts, include)
            if self.rank == 0:
                place = f"{self.settings.run_folder}/{folder.name}/{MODEL_FOLDER}"
                training = describe_training(self.settings, step)
                save = partial(save_bundle, include=include, training=training, place=place)
                writes.append(partial(save, folder / MODEL_FOLDER, self.parts, tensors))
        if self.rank == 0:
            # Written last: its presence shows that rank 0 wrote everything before it.
            writes.append(partial(_complete, folder, json.dumps(self.describe(step), indent=1)))
        return writes

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
            **({"scores": self.scores.scores} if config.held_out.selects else {}),
            "manifest": self.parts.manifest.model_dump(mode="json"),
        }

    def restore_randomness(self, folder: Path, state: dict[str, Any]) -> None:
        """Restore this rank's RNG states, or derive new ones where the number of ranks changed."""
        if state["world_size"] == self.world_size:
            set_random_state(torch.load(folder / f"rng_rank{self.rank}.pt", weights_only=False))
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


def _complete(folder: Path, state: str) -> None:
    """Write rank 0's last files of a checkpoint."""
    (folder / TRAINER_STATE).write_text(state)
    (folder / COMPLETE).touch()
