"""The run of an evaluation: benchmarks are answered in one job, then scored; the same command resumes."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.catalogue import make_benchmark
from evals.published import format_count
from evals.tables import format_headline, format_interval
from llava_ray.config.evaluate import EvaluateConfig
from llava_ray.config.recipes import load_recipe
from llava_ray.errors import ConfigError
from pipelines.evaluation_results import (
    PROVENANCE,
    ScoredAnswers,
    ScoreRequest,
    log_evaluation,
    score_answers_file,
    write_results,
)
from pipelines.places import check_files, check_models

if TYPE_CHECKING:
    from llava_ray.shared_storage import Places
    from pipelines.evaluation_asking import AskedBenchmark


@dataclass(frozen=True)
class EvaluatedBenchmarks:
    """The result of an evaluation."""

    folder: Path
    summaries: list[dict[str, Any]]
    mlflow_run_id: str


def evaluate(arguments: Sequence[str]) -> list[dict[str, Any]]:
    """Answer open questions, score everything, write the report; return the summaries."""
    config = load_recipe(EvaluateConfig, arguments)
    _check_places(config)
    print(config.model_dump_json(indent=1, exclude_defaults=True), flush=True)
    return run_evaluation(config).summaries


def run_evaluation(config: EvaluateConfig) -> EvaluatedBenchmarks:
    """Answer open questions, score everything, write the report, and log it.

    A running Ray cluster is used, or one is started where anything is to be answered. Raises ConfigError, DataError,
    ModelError.
    """
    from llava_ray.generate.answers import locate_model
    from llava_ray.runtime import connected
    from pipelines.evaluation_asking import (
        ask,
        check_answer_settings,
        check_ranking,
        describe_answers,
        list_benchmarks,
        token_limit,
    )

    asking = config.evaluate
    model = locate_model(asking.model_path, asking.model_base, asking.vision_tower, asking.version)
    made = describe_answers(asking, model)
    folder = _run_folder(config)
    with ExitStack() as stack:
        asked = list_benchmarks(asking, folder)
        check_ranking(asking, asked)
        for one in asked:
            stack.enter_context(one.file)
            limit = {"max_new_tokens": token_limit(asking, one)}
            check_answer_settings(one.file.path.parent / PROVENANCE, made | limit, has_answers=bool(one.file.rows))
        if any(one.unanswered() for one in asked):
            with connected(config.cluster, _shared_places(config), storage_path=config.run.storage_path):
                ask(config, model, asked)
        for one in asked:
            one.file.arrange([question.id for question in one.questions])
    return _report(config, folder, asked)


def _check_places(config: EvaluateConfig) -> None:
    """Check that the model and the benchmarks' files exist. Raises ConfigError."""
    asking = config.evaluate
    check_models({f"evaluate.{key}": getattr(asking, key) for key in ("model_path", "model_base", "vision_tower")})
    for name, _, folder in (entry.partition("=") for entry in asking.benchmarks):
        check_files({f"evaluate.benchmarks, {name}": folder})
    for name, _, file in (entry.partition("=") for entry in config.score.reviews):
        check_files({f"score.reviews, {name}": file})


def _shared_places(config: EvaluateConfig) -> "Places":
    """Return the paths that all nodes have to see: model and images. Answers are written by the driver."""
    from llava_ray.shared_storage import Places

    asking = config.evaluate
    folders = [folder for _, _, folder in (entry.partition("=") for entry in asking.benchmarks)]
    return Places.of([], [asking.model_path, asking.model_base, asking.vision_tower, *folders])


def _run_folder(config: EvaluateConfig) -> Path:
    """Return the run's folder, with its settings in it. Raises ConfigError."""
    if "://" in config.run.storage_path:
        raise ConfigError("`evaluate run` keeps answers in a local or mounted folder: set run.storage_path to one")
    folder = Path(config.run.storage_path, str(config.run.name))
    if config.run.restart and folder.exists():
        folder.rename(folder.with_name(f"{folder.name}.{int(time.time())}"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "resolved.json").write_text(config.model_dump_json(indent=1) + "\n")
    return folder


def _report(config: EvaluateConfig, folder: Path, asked: "Sequence[AskedBenchmark]") -> EvaluatedBenchmarks:
    """Score everything, write reports and submissions, log them to MLflow, and print their paths."""
    from llava_ray.tracking import default_tracking_uri, describe_page

    reviews = {
        make_benchmark(name).name: Path(file) for name, _, file in (r.partition("=") for r in config.score.reviews)
    }
    scored: list[ScoredAnswers] = []
    for one in asked:
        name = one.benchmark.name
        request = ScoreRequest(name, one.data, one.file.path, config.score.profile, reviews.get(name))
        scored.append(score_answers_file(request, config.evaluate.max_questions, without_judge=True))
    write_results(folder, scored, own_folders=True)
    summaries = [one.summary for one in scored]
    uri = config.tracking.tracking_uri or default_tracking_uri(config.run.storage_path)
    tracking = config.tracking
    key, parent = str(folder.resolve()), tracking.parent_run_id
    run_id = log_evaluation(uri, key, summaries, folder, tracking.experiment_name, parent)
    for summary in summaries:
        num = format_count(summary["benchmark"], summary["num_questions"], summary["num_questions"])
        figures = f"{format_headline(summary):>9}  {format_interval(summary)}  ({summary['metric']}, {num} questions)"
        print(f"{summary['benchmark']:<16} {figures}")
        if "withheld" in summary:
            print(f"  {summary['withheld']}")
    print(f"  report   {folder}/report.html\n  mlflow   {describe_page(uri, run_id)}")
    return EvaluatedBenchmarks(folder, summaries, run_id)
