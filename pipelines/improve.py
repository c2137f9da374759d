#!/usr/bin/env python
"""Improve a model in rounds: evaluate, make preferences of its own answers, tune on them, evaluate again.

python pipelines/improve.py RECIPE --model.model_name_or_path MODEL --improve.benchmark pope=data/pope …
python pipelines/improve.py RECIPE … --dry-run

A round starts from the model of the last one that was significantly better on the held-out questions. The loop stops
where a gain is not significant, where the rounds are done, or where the budget is used up. Exit code 0: done. 3:
partial, since the budget is used up or it was stopped; the same command goes on, pays nothing twice and repeats no
stage. 1: an error; what is finished stays. 130, 143: stopped by Ctrl-C or SIGTERM.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_ray.config.improve import ImproveConfig
from llava_ray.config.recipes import load_settings
from llava_ray.errors import LlavaRayError
from llava_ray.worker_forks import prepare_forks, start_forks
from pipelines.command import exit_unless_complete, run_command, split_dry_run

if TYPE_CHECKING:
    from llava_ray.runtime import Resources


@dataclass(frozen=True)
class ImprovedModel:
    """The result of the loop."""

    model: str
    """The best model's folder."""
    complete: bool
    """Whether the loop has ended; otherwise the same call goes on."""
    mlflow_run_id: str
    summary: Mapping[str, Any] = field(repr=False)
    """The contents of summary.json."""
    ran: tuple[str, ...] = ()
    """The stages that were not finished before."""
    signal: int = 0


def improve_model(config: ImproveConfig) -> ImprovedModel:
    """Run the rounds in the folder ``config.improve.output``; stages that are finished there are skipped.

    A running Ray cluster is used, or one is started where a stage needs it. Raises ConfigError for settings that
    cannot be used or differ from those of the folder's rounds, DataError, ModelError, JudgeError and TrainingError as
    the stages do; what was finished stays, and is in summary.json and the report.
    """
    from pipelines.improve_inputs import check_template, read_loop_inputs

    inputs = read_loop_inputs(config)
    from llava_ray.report.charts import check_plotting
    from llava_ray.tracking import TrackedRun, default_tracking_uri, describe_page
    from pipelines.improve_loop import ImprovedRounds, place_of_best, run_rounds
    from pipelines.improve_results import log_improvement, summarize_rounds, write_improvement
    from pipelines.improve_settings import claim_loop
    from pipelines.improve_stages import RoundStages

    check_plotting()
    check_template(config)
    folder, tracking = Path(config.improve.output), config.tracking
    claim_loop(config, folder)
    uri = tracking.tracking_uri or default_tracking_uri(str(folder.parent))
    key = str(folder.resolve())
    run = TrackedRun(uri, tracking.experiment_name, folder.name, key, tracking.parent_run_id)
    found, failed = ImprovedRounds(), ""
    with _connecting(config) as connect:
        stages = RoundStages(config, inputs.asked.total, {"tracking_uri": uri, "parent_run_id": run.run_id}, connect)
        status = "FAILED"
        try:
            run_rounds(stages, found)
            status = "FINISHED"
        except LlavaRayError as error:
            failed = f"{stages.current}: {type(error).__name__}: {error}"
            raise
        except KeyboardInterrupt:
            found.partial, status = f"{stages.current}: it was stopped", "KILLED"
            raise
        finally:
            summary = summarize_rounds(config, inputs.asked, found, failed)
            write_improvement(config, summary, found, inputs.held_out)
            log_improvement(run, config, summary, status=status)
    print(f"  mlflow   {describe_page(uri, run.run_id)}")
    assert found.best is not None
    model = place_of_best(folder) if place_of_best(folder).exists() else Path(found.best.model)
    return ImprovedModel(str(model), summary["complete"], run.run_id, summary, tuple(stages.ran), found.signal)


@contextmanager
def _connecting(config: ImproveConfig) -> "Iterator[Callable[[], Resources]]":
    """Yield a function that connects to Ray at its first call, until the block ends."""
    from llava_ray.runtime import connected
    from llava_ray.shared_storage import Places

    section, held_out = config.preferences, config.improve.benchmark.partition("=")[2]
    data = [section.benchmark.partition("=")[2] if section.benchmark else section.image_folder or section.data_path]
    read = [config.model.model_name_or_path, *section.models, held_out, *data]
    taken: list[Resources] = []
    with ExitStack() as stack:

        def connect() -> "Resources":
            if not taken:
                places = Places.of([config.improve.output, config.data.cache_dir], read)
                folder = config.improve.output
                taken.append(stack.enter_context(connected(config.cluster, places, storage_path=folder)))
            return taken[0]

        yield connect


def describe_improvement(config: ImproveConfig) -> dict[str, Any]:
    """Print how much each round asks, judges and learns, without starting anything."""
    from pipelines.improve_inputs import read_loop_inputs
    from pipelines.improve_settings import preference_settings
    from pipelines.preferences import describe_preferences

    inputs = read_loop_inputs(config)
    steps = config.train.max_steps
    summary = {
        "held-out questions": len(inputs.held_out),
        "rounds, at most": config.improve.rounds,
        "objective": config.train.objective,
        "steps of a tuning": steps if steps is not None else f"{config.train.num_train_epochs} pass(es)",
    }
    for name, value in summary.items():
        print(f"  {name:<26} {value:,}" if isinstance(value, int) else f"  {name:<26} {value}")
    print("Round 1:")
    first = preference_settings(config, 1, inputs.asked.total, config.model.model_name_or_path, {})
    return summary | describe_preferences(first)


def main(arguments: Sequence[str]) -> ImprovedModel | None:
    """Run the rounds, or print what they would do."""
    asked, others = split_dry_run(arguments)
    config = load_settings(ImproveConfig, others)
    if asked.dry_run:
        describe_improvement(config)
        return None
    prepare_forks(config)
    import pipelines.improve_results
    import pipelines.improve_stages  # noqa: F401 - imported before the workers' server is forked

    start_forks()
    return print_improvement(improve_model(config), config)


def print_improvement(improved: ImprovedModel, config: ImproveConfig) -> ImprovedModel:
    """Print what each round gained, and where the results are."""
    from pipelines.improve_loop import describe_gain

    summary = improved.summary
    for one in summary["rounds"]:
        kept = "kept" if one["accepted"] else "not kept"
        print(
            f"Round {one['round']}: {one['preferences']['written']:,} preferences; {describe_gain(one['gain'])}; {kept}"
        )
    print(f"Best: round {summary['best']['round']}, held-out {summary['best']['score']:.2f}")
    print(f"  model    {improved.model}\n  report   {config.improve.output}/report.html")
    if improved.complete:
        print(f"  stopped: {summary['stopped_because']}")
    else:
        print(f"  partial: {summary['partial_because']}; the same command goes on")
    return improved


def main_with_exit_code(arguments: Sequence[str]) -> None:
    """Run, and exit with a code that says how far it came."""
    improved = main(arguments)
    if improved is not None:
        exit_unless_complete(complete=improved.complete, number=improved.signal)


if __name__ == "__main__":
    run_command(main_with_exit_code)
