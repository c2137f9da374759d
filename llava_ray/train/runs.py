"""A run's name, folder and committed position: the same name resumes, other settings under it are an error."""

import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from ray.train import Checkpoint, Result, UserCallback

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.model import MODEL_PATHS
from llava_ray.config.recipes import differing_keys
from llava_ray.data.storage import absolute_path, read_stored, write_stored
from llava_ray.errors import CheckpointError, ConfigError
from llava_ray.train.identity import NUM_DIGITS, Identity, comparable, identity_hash, recipe_of_name

SNAPSHOT = "checkpoint_manager_snapshot.json"
SNAPSHOT_COPY = f"{SNAPSHOT}.copy"


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run: ``storage_path/name``."""

    storage_path: str
    name: str

    @property
    def path(self) -> str:
        """Return the folder itself."""
        return f"{self.storage_path}/{self.name}"

    @property
    def bundle(self) -> str:
        """Return the path of the final model."""
        return f"{self.path}/model"

    @property
    def is_claimed(self) -> bool:
        """Return whether the run has a committed checkpoint or has finished, which a new run would overwrite."""
        files, inner = fsspec.core.url_to_fs(self.path)
        markers = (f"{inner}/finished.json", f"{inner}/{SNAPSHOT_COPY}")
        return any(map(files.exists, markers)) or bool(_named_checkpoints(files, f"{inner}/{SNAPSHOT}"))

    def noted_settings(self) -> dict[str, Any] | None:
        """Load the settings that the run was started with; None if none are saved. Raises ConfigError."""
        try:
            saved = json.loads(read_stored(f"{self.path}/resolved.json"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            saved = error
        if not isinstance(saved, dict):
            raise ConfigError(
                f"{self.path}/resolved.json holds no settings; choose another --run.name, or start over with "
                "--run.restart True"
            )
        return saved

    def finished(self, data_hash: str) -> dict[str, Any] | None:
        """Load the record of a finished run, or None. Raises ConfigError if it was trained on other data."""
        try:
            saved: dict[str, Any] = json.loads(read_stored(f"{self.path}/finished.json"))
        except FileNotFoundError:
            return None
        if saved["data_hash"] != data_hash:
            raise ConfigError(
                f"run {self.name!r} in {self.storage_path} is finished, but data.data_path now holds other data (hash "
                f"{saved['data_hash']} -> {data_hash}): choose another --run.name or start over with --run.restart True"
            )
        return saved


def find_run(config: FinetuneConfig, identity: Identity) -> RunFolder:
    """Return the folder of a run, which may exist already; write nothing.

    A generated name ends in a hash of the run's identity; a run named by the older rule, with a hash of the settings
    as they are written, is resumed. Raises ConfigError when the name is used with other settings.
    """
    assert config.run.name is not None
    run = RunFolder(absolute_path(config.run.storage_path), config.run.name)
    recipe = recipe_of_name(config)
    if recipe is not None:
        new = RunFolder(run.storage_path, f"{recipe}-{identity_hash(config, identity)}")
        run = new if new.is_claimed else _find_older(run, recipe, config, identity) or new
    saved = run.noted_settings() if run.is_claimed else None
    if saved is not None and not config.run.restart:
        changed = differing_keys(*comparable(saved, config, identity))
        if changed:
            raise ConfigError(
                f"run {run.name!r} in {run.storage_path} was made with other settings ({'; '.join(changed)}): give "
                "another --run.name, restore the old settings to resume it, or start over with --run.restart True"
            )
    return run


def _find_older(named: RunFolder, recipe: str, config: FinetuneConfig, identity: Identity) -> RunFolder | None:
    """Return the run of these settings that was named by the older rule; None if there is none.

    It is also searched by its saved settings, because settings added later changed the hash in its name.
    """
    if named.is_claimed:
        return named
    files, inner = fsspec.core.url_to_fs(named.storage_path)
    for place in sorted(files.glob(f"{inner}/{recipe}-{'[0-9a-f]' * NUM_DIGITS}/resolved.json")):
        run = RunFolder(named.storage_path, str(place).split("/")[-2])
        saved = run.noted_settings()
        is_older = saved is not None and "identity" not in saved and run.is_claimed
        if is_older and saved and not differing_keys(*comparable(saved, config, identity)):
            return run
    return None


def claim_run(run: RunFolder, config: FinetuneConfig, identity: Identity) -> None:
    """Save a run's settings in ``resolved.json`` as it starts; with run.restart first move an older folder aside.

    The name is taken only once a checkpoint is committed. Raises DataError when the folder cannot be written.
    """
    files, inner = fsspec.core.url_to_fs(run.path)
    if config.run.restart and files.exists(f"{inner}/resolved.json"):
        files.mv(inner, f"{inner}.replaced-{time.strftime('%Y%m%d-%H%M%S')}", recursive=True)
    saved = config.model_dump(mode="json") | {"identity": dict(identity)}
    write_stored(f"{run.path}/resolved.json", json.dumps(saved, indent=1).encode())


def absolute_paths(config: FinetuneConfig) -> dict[str, str]:
    """Return changes that make the paths of the model's folders absolute; hub ids stay as they are."""
    paths = {key: getattr(config.model, key.removeprefix("model.")) for key in MODEL_PATHS}
    return {key: str(Path(path).resolve()) for key, path in paths.items() if path and Path(path).exists()}


def committed_step(storage_path: str, name: str) -> int:
    """Return the step at which the next start of the workers resumes, 0 for a fresh run.

    Reads the snapshot that Ray itself resumes from, not a file of ours, which could be one step off after a kill.
    """
    state = committed_state(storage_path, name)
    return 0 if state is None else int(state["step"])


def committed_state(storage_path: str, name: str) -> dict[str, Any] | None:
    """Return ``trainer_state.json`` of the checkpoint from which the next start resumes; None without one."""
    try:
        checkpoint = Result.from_path(f"{storage_path}/{name}").checkpoint
    except RuntimeError:  # no folder or no snapshot yet
        return None
    if checkpoint is None:
        return None
    with checkpoint.filesystem.open_input_stream(f"{checkpoint.path}/trainer_state.json") as stream:
        return dict(json.loads(stream.read()))


class SnapshotKeeper(UserCallback):
    """Copy Ray's snapshot after each commit: Ray rewrites it in place, and a torn one would stop every resume."""

    def __init__(self, run: RunFolder) -> None:
        """Store the run's folder."""
        self.run = run

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        """Copy the snapshot once it names the new checkpoint."""
        del run_context, metrics
        if checkpoint is not None:
            files, inner = fsspec.core.url_to_fs(self.run.path)
            write_stored(f"{self.run.path}/{SNAPSHOT_COPY}", files.cat_file(f"{inner}/{SNAPSHOT}"))


def repair_run(run: RunFolder) -> None:
    """Restore a torn snapshot from its copy, and delete uncommitted checkpoint folders, before a start.

    Raises CheckpointError when neither the snapshot nor its copy can be read.
    """
    files, inner = fsspec.core.url_to_fs(run.path)
    snapshot, copy = f"{inner}/{SNAPSHOT}", f"{inner}/{SNAPSHOT_COPY}"
    committed = _named_checkpoints(files, snapshot)
    if not committed and files.exists(copy):
        committed = _named_checkpoints(files, copy)
        if not committed:
            raise CheckpointError(
                f"{run.path}/{SNAPSHOT} and its copy are unreadable; restore one from a backup, or start over "
                "with --run.restart True (the old folder is moved aside)"
            )
        files.cp_file(copy, snapshot)
    elif not committed and files.exists(snapshot):  # the first one was torn: nothing had been committed before it
        files.rm(snapshot)
    # A checkpoint counts only once the snapshot names it: other folders are uploads that a kill interrupted.
    for folder in files.glob(f"{inner}/step-*"):
        if Path(folder).name not in committed:
            with contextlib.suppress(FileNotFoundError):
                files.rm(folder, recursive=True)


def _named_checkpoints(files: fsspec.AbstractFileSystem, path: str) -> set[str]:
    """Return the checkpoint folders that a snapshot names; none if it is missing or torn."""
    try:
        snapshot = json.loads(files.cat_file(path))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return set()
    return {result["checkpoint_dir_name"] for result in snapshot.get("checkpoint_results", [])}
