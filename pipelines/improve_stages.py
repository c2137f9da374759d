"""The stages of a round: each leaves a note of what it made beside it, and is skipped while that is still there.

A note has the hashes of the stage's own files and of the model it began with: where they differ, the stage runs again,
which by itself goes on from what is done, or says what contradicts it.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from evals.catalogue import make_benchmark
from evals.comparison import StoredResult, read_result
from llava_ray.config.improve import ImproveConfig
from llava_ray.errors import DataError
from llava_ray.runtime import Resources
from llava_ray.train.finished_run import FinishedRun
from pipelines.evaluation_asking import model_hash
from pipelines.evaluation_run import run_evaluation
from pipelines.improve_settings import evaluation_settings, preference_settings, tuning_settings
from pipelines.preference_results import PREFERENCES_FILE
from pipelines.preferences import PreferencesMade, make_preferences
from pipelines.review_results import write_review_json

StageName = Literal["evaluate", "preferences", "tune"]


@dataclass(frozen=True)
class HeldOutResult:
    """A model with its held-out result."""

    model: str
    model_hash: str
    folder: Path
    """Of the benchmark's answers, grades and result."""
    note: Mapping[str, Any]

    def read(self) -> StoredResult:
        """Load the grades."""
        return read_result(self.folder)


@dataclass(frozen=True)
class RoundPreferences:
    """The preferences of a round; ``summary`` is the contents of their summary.json."""

    path: Path
    summary: Mapping[str, Any]
    note: Mapping[str, Any]
    complete: bool = True
    signal: int = 0


@dataclass
class RoundStages:
    """Runs the stages of rounds, each once."""

    config: ImproveConfig
    total_questions: int
    tracking: dict[str, Any]
    """The tracking settings that all stages share: the store, and the parent's run."""
    connect: Callable[[], Resources]
    """Connects to Ray at the first call."""
    ran: list[str] = field(default_factory=list)
    """The stages that were not finished before."""

    @property
    def current(self) -> str:
        """Return the stage that runs, or ran last."""
        return (self.ran or ["before the first stage"])[-1]

    @property
    def folder(self) -> Path:
        """Return the folder of all rounds."""
        return Path(self.config.improve.output)

    def place(self, number: int) -> Path:
        """Return the folder of a round; that of round 0 has the evaluation of the model to start from."""
        return self.folder / f"round-{number}"

    def evaluate(self, number: int, model: str) -> HeldOutResult:
        """Ask a model the held-out questions. Raises DataError where its answers have no score."""
        place, identity = self.place(number), model_hash(model)
        folder = place / "evaluate" / make_benchmark(self.config.improve.benchmark.partition("=")[0]).name
        note = _read_note(place, "evaluate")
        made_of = {"model": identity, **_hash_files(folder)}
        if not (made_of.items() <= note.items() and "score" in note and _is_scored(folder)):
            self._begin(number, "evaluate", "held-out questions")
            started = time.monotonic()
            self.connect()
            done = run_evaluation(evaluation_settings(self.config, model, place, self.tracking))
            (summary,) = done.summaries
            if summary["score"] is None:
                raise DataError(f"{folder}: no held-out score: {summary.get('withheld', 'too few answers')}")
            note = {"model": identity, **_hash_files(folder), "score": summary["score"]}
            note |= {"mlflow_run_id": done.mlflow_run_id, "seconds": _since(started)}
            _write_note(place, "evaluate", note)
        return HeldOutResult(model, identity, folder, note)

    def prefer(self, number: int, start: HeldOutResult) -> RoundPreferences:
        """Make a round's preferences of its model's answers; without a note they are not complete."""
        folder = self.place(number) / "preferences"
        path, note = folder / PREFERENCES_FILE, _read_note(self.place(number), "preferences")
        if {"model": start.model_hash, "hash": _hash_file(path)}.items() <= note.items():
            summary = _read_object(folder / "summary.json")
            if summary.get("complete"):
                return RoundPreferences(path, summary, note)
        self._begin(number, "preferences", f"rule {self.config.preferences.rule}")
        started = time.monotonic()
        self.connect()
        made: PreferencesMade = make_preferences(
            preference_settings(self.config, number, self.total_questions, start.model, self.tracking)
        )
        if not made.complete:
            return RoundPreferences(path, made.summary, {}, complete=False, signal=made.signal)
        note = {"model": start.model_hash, "hash": _hash_file(path), "mlflow_run_id": made.mlflow_run_id}
        _write_note(self.place(number), "preferences", note := note | {"seconds": _since(started)})
        return RoundPreferences(path, made.summary, note)

    def tune(self, number: int, start: HeldOutResult, preferences: RoundPreferences) -> Mapping[str, Any]:
        """Tune a round's model on its preferences, and return the note with the new one's ``bundle``."""
        note = _read_note(self.place(number), "tune")
        made_of = {"model": start.model_hash, "preferences": preferences.note["hash"]}
        bundle = Path(note.get("bundle", ""))
        same = made_of.items() <= note.items() and bundle.is_dir()
        if same and model_hash(str(bundle)) == note.get("bundle_hash"):
            return note
        self._begin(number, "tune", f"{self.config.train.objective}, {preferences.summary['written']:,} preferences")
        started = time.monotonic()
        finished = self._finetune(number, start.model)
        note = made_of | {
            "bundle": finished.folder.bundle,
            "bundle_hash": model_hash(finished.folder.bundle),
            "data_hash": finished.data_hash,
            "num_steps": finished.num_steps,
            "metrics": finished.metrics,
            "mlflow_run_id": finished.mlflow_run_id,
            "seconds": _since(started),
        }
        _write_note(self.place(number), "tune", note)
        return note

    def _finetune(self, number: int, model: str) -> FinishedRun:
        from llava_ray.data.preparation import prepare_data
        from llava_ray.train.preflight import check_run
        from llava_ray.train.trainer import finetune

        config = tuning_settings(self.config, number, model, self.tracking)
        check_run(config)
        resources = self.connect()
        return finetune(config, prepare_data(config.data), resources)

    def _begin(self, number: int, stage: StageName, what: str) -> None:
        print(f"\n== round {number}, {stage}: {what}", flush=True)
        self.ran.append(f"round {number}, {stage}")


def _since(started: float) -> float:
    return round(time.monotonic() - started, 1)


def _note_path(place: Path, stage: StageName) -> Path:
    return place / f"{stage}.json"


def _read_note(place: Path, stage: StageName) -> dict[str, Any]:
    return _read_object(_note_path(place, stage))


def _write_note(place: Path, stage: StageName, note: Mapping[str, Any]) -> None:
    write_review_json(_note_path(place, stage), note)


def _read_object(path: Path) -> dict[str, Any]:
    """Read an object; an empty one where there is none, or no whole one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _hash_file(path: Path) -> str:
    """Return 16 hex digits of a file's contents; "" where there is none."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError:
        return ""


def _hash_files(folder: Path) -> dict[str, str]:
    """Return the hashes of an evaluation's answers and grades; a result of other files was changed by hand."""
    return {name: _hash_file(folder / f"{name}.jsonl") for name in ("answers", "grades")}


def _is_scored(folder: Path) -> bool:
    """Return whether the grades can be read."""
    try:
        return read_result(folder).summary.get("score") is not None
    except (DataError, AttributeError):
        return False
