"""Staged checkpoints on their way to storage: a thread of Ray's writes, copies and then commits them, one at a time."""

import contextlib
import shutil
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.actor import ActorHandle
from ray.train import Checkpoint, CheckpointUploadMode

from llava_ray.errors import CheckpointError, LlavaRayError
from llava_ray.reading import describe_error
from llava_ray.train.disk_errors import naming_disk
from llava_ray.train.staging import Write

_RECORD_SECONDS = 0.02  # between two looks whether the other ranks' records have come


class CheckpointUploads:
    """Write and commit one rank's checkpoints."""

    def __init__(self, journal: ActorHandle, rank: int) -> None:
        """Start with no checkpoint on its way; ``journal`` is the recorder, whose ledger goes first."""
        self.journal = journal
        self.rank = rank
        self.ended = threading.Event()  # of the one that is on its way
        self.ended.set()
        self.failure: LlavaRayError | None = None

    def start(self, folder: Path, step: int, writes: list[Write], metrics: dict[str, float]) -> None:
        """Hand a staged checkpoint of ``step`` to Ray: ``writes`` fill ``folder``, ``metrics`` go with it."""
        self.ended = threading.Event()
        ray.train.report(
            metrics,
            checkpoint=Checkpoint.from_directory(str(folder)),
            checkpoint_dir_name=folder.name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=partial(self.upload, writes, step, self.ended),
            delete_local_checkpoint_after_upload=True,
        )

    def wait(self) -> None:
        """Wait until no save is on its way. Raises the error of the last one if it failed."""
        self.ended.wait()
        if self.failure is not None:
            raise self.failure

    def upload(
        self, writes: list[Write], step: int, ended: threading.Event, local: Checkpoint, name: str
    ) -> Checkpoint:
        """Write a staged checkpoint and copy it to the run's storage; Ray calls this in a thread and then commits it.

        Raises CheckpointError when a disk is full or read-only; what was written is deleted.
        """
        folder = Path(local.path)
        try:
            storage = ray.train.get_context().get_storage()
            with naming_disk(folder, step, "set TMPDIR"):
                for write in writes:
                    write()
            # Order matters: the ledger is on storage before Ray can commit the checkpoint. A kill between the two
            # leaves ledger rows that the resumed run rewrites; the other order would leave steps without rows. Ray
            # commits when every rank has reported, so it is enough that one waits for the rows of all.
            while self.rank == 0 and not ray.get(self.journal.flush.remote(step)):
                time.sleep(_RECORD_SECONDS)
            with naming_disk(Path(storage.experiment_fs_path, name), step, "choose another run.storage_path"):
                stored: Checkpoint = storage.persist_current_checkpoint(local, name)
        except LlavaRayError as error:
            self.failure = error
            self._delete(folder, storage.storage_filesystem, f"{storage.experiment_fs_path}/{name}")
            raise
        except Exception as error:
            # Ray ends this worker for it, or calls this again; until then a save that waits must not wait for ever.
            self.failure = CheckpointError(
                f"the checkpoint after step {step} could not be stored: {describe_error(error)}. The run resumes from "
                "the last complete checkpoint"
            )
            raise
        else:
            self.failure = None
            writes.clear()
            return stored
        finally:
            ended.set()

    def _delete(self, local: Path, files: Any, stored: str) -> None:
        """Delete this rank's files of a checkpoint that could not be written, here and on storage."""
        for file in [file.relative_to(local) for file in local.rglob("*") if file.is_file()]:
            with contextlib.suppress(OSError):  # not copied; other ranks write into the same folder
                files.delete_file(f"{stored}/{file}")
        shutil.rmtree(local, ignore_errors=True)
