"""Conversion of a checkpoint to a bundle: trained tensors from any ZeRO stage's shards, frozen ones from the base."""

import contextlib
import io
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.errors import CheckpointError, ModelError
from llava_ray.model.assembly import LlavaParts
from llava_ray.model.formats.layout import COMPLETE, TRAINER_STATE, check_whole
from llava_ray.model.formats.layouts import read_layout
from llava_ray.model.formats.manifest import read_manifest, write_manifest
from llava_ray.model.formats.saved_weights import replacing
from llava_ray.model.freezing import freeze
from llava_ray.model.saving import save_bundle
from llava_ray.model.tensors.tensor_files import read_json_object
from llava_ray.reading import short_repr
from llava_ray.train.checkpoints import MODEL_FOLDER, ZERO_TAG, check_same_base
from llava_ray.train.engine import assemble_for


def consolidate(checkpoint_folder: str | Path, output: str | Path) -> None:
    """Write the model of a checkpoint (``step-…`` in a run's folder) as a bundle, atomically.

    Only for checkpoints that you trust: DeepSpeed's files are pickles, and loading a pickle executes code.
    Raises CheckpointError for a folder that is no checkpoint, is incomplete, or lacks a trained tensor; BundleError
    or ModelError where its base is missing or changed, or ``output`` cannot be written.
    """
    folder = Path(checkpoint_folder)
    state = _read_state(folder)
    if (folder / MODEL_FOLDER).is_dir():  # of an adapter or a projector: already a complete bundle
        check_whole(read_layout(folder / MODEL_FOLDER))
        with replacing(Path(output)) as target:
            shutil.copytree(folder / MODEL_FOLDER, target, dirs_exist_ok=True)
            write_manifest(target, read_manifest(folder / MODEL_FOLDER), output)
        return
    config = FinetuneConfig.parsed(state["config"], f"{folder / TRAINER_STATE}")
    parts = assemble_for(config)
    check_same_base(state, parts.manifest, str(folder))
    freeze(parts.llava, parts.tower, config.model, parts.new_token_ids)
    _copy_trained(parts, _read_tensors(folder, state), folder)
    save_bundle(output, parts, training=state.get("training") or {})


def _read_state(folder: Path) -> dict[str, Any]:
    """Load a complete checkpoint's trainer_state.json. Raises CheckpointError naming any missing file."""
    if not (folder / TRAINER_STATE).is_file() and not (folder / ZERO_TAG).is_dir():
        raise CheckpointError(
            f"{folder} is no checkpoint: it holds no {TRAINER_STATE}; expected a folder such as "
            "runs/NAME/step-00000100."
        )
    try:
        state: dict[str, Any] = read_json_object(folder / TRAINER_STATE)
        world_size, stage = state["world_size"], state["zero_stage"]
    except (ModelError, KeyError) as error:
        raise _half_written(folder, TRAINER_STATE) from error
    if type(world_size) is not int or stage not in (0, 1, 2, 3) or not isinstance(state.get("config"), dict):
        raise CheckpointError(
            f"{folder / TRAINER_STATE} does not say how its run was set up (world_size "
            f"{short_repr(world_size)}, zero_stage "
            f"{short_repr(stage)}, config); it was edited or damaged: use another checkpoint of the run."
        )
    needed = {COMPLETE: 1, ZERO_TAG: 1, "rng_rank*.pt": world_size}
    needed[f"{ZERO_TAG}/*_model_states.pt"] = world_size if stage == 3 else 1
    if stage:
        needed[f"{ZERO_TAG}/*_optim_states.pt"] = world_size
    for pattern, number in needed.items():
        if len(list(folder.glob(pattern))) != number:
            raise _half_written(folder, pattern)
    return state


def _half_written(folder: Path, name: str) -> CheckpointError:
    """Return the error for a checkpoint that lacks a file, or one rank's file."""
    return CheckpointError(
        f"{folder} is half-written: {name} is missing, torn or not of every worker (a run was stopped while it was "
        "saved, or not all of it was copied); use another checkpoint of the run, or start the run again, which clears "
        "such folders away."
    )


def _read_tensors(folder: Path, state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the trained tensors, gathered, one at a time; files are memory-mapped. Raises CheckpointError."""
    try:
        if state["zero_stage"] == 3:
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

            with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
                tensors = get_fp32_state_dict_from_zero_checkpoint(str(folder), ZERO_TAG, True, lazy_mode=True)
        else:
            # Below stage 3 rank 0 holds whole parameters; the others' files are optimiser state.
            file = folder / ZERO_TAG / "mp_rank_00_model_states.pt"
            tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=False)["module"]
    except Exception as error:  # unpickling damaged files raises almost anything
        raise CheckpointError(
            f"{folder / ZERO_TAG} cannot be read ({error}); use another checkpoint of the run."
        ) from error
    for name, tensor in tensors.items():
        yield name, tensor.contiguous()


def _copy_trained(parts: LlavaParts, tensors: Iterator[tuple[str, Tensor]], folder: Path) -> None:
    """Copy the trained tensors into the assembled base. Raises CheckpointError for a missing or mismatched one."""
    parameters = dict(parts.llava.named_parameters(remove_duplicate=False)) | dict(parts.llava.named_buffers())
    missing = {name for name, parameter in parts.llava.named_parameters() if parameter.requires_grad}
    for name, tensor in tensors:
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise CheckpointError(f"{folder} holds {name} {tuple(tensor.shape)}, which is not this model's.")
        with torch.no_grad():
            parameters[name].copy_(tensor)
        missing.discard(name)
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} trained tensors, the first is {min(missing)}; use another checkpoint."
        )
