"""The subcommands of `evaluate`. Each imports what it needs: scoring and comparing need no torch and no Ray."""

import json as json_format
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from evals.benchmark import Profile
from evals.published import format_count
from pipelines.command import split_dry_run

_First = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
_Second = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="B")]


def run_score(  # noqa: PLR0913 - flags
    benchmark: str,
    data: Path,
    answers: Path,
    *,
    profile: Profile = "robust",
    reviews: Path | None = None,
    output: Path | None = None,
    tracking_uri: str | None = None,
    json: bool = False,
) -> None:
    """Score an answers file, ours or LLaVA's, without a model.

    Args:
        benchmark: Its name: vqav2, gqa, vizwiz, science_qa, textvqa, pope, mme, mmbench, mmbench_cn, seed_bench,
            llava_bench, mm_vet, mmmu, chartqa, docvqa, ai2d, realworldqa, hallusion_bench,
            mmbench_v11, mmbench_v11_cn, mmstar, mmmu_pro, mmmu_pro_4, mmmu_pro_vision, mathvista, ocrbench, blink,
            chair, amber_generative, amber_discriminative, mmhal_bench, object_halbench, custom.
        data: Folder with the benchmark's official files; evals/README.md shows each.
        answers: JSON lines with question_id and text (or answer), or a JSON list or object of the same.
        profile: Whose rule: LLaVA's tables', the benchmark authors', or ours, which never guesses.
        reviews: The judge's replies, JSON lines with question_id and content, for benchmarks that need a judge.
        output: Folder for result, report and submission files.
        tracking_uri: Keep it in this MLflow too.
        json: Print one JSON object and nothing else.
    """
    from evals.tables import format_headline, format_interval
    from pipelines.evaluation_results import ScoreRequest, log_evaluation, score_answers_file, write_results

    scored = score_answers_file(ScoreRequest(benchmark, data, answers, profile, reviews))
    summary = scored.summary
    if output is not None:
        write_results(output, [scored])
    if tracking_uri is not None:
        log_evaluation(tracking_uri, str((output or answers).resolve()), [summary], output)
    if json:
        print(json_format.dumps(summary, ensure_ascii=False))
        return
    print(f"{summary['benchmark']} ({summary['profile']}): {summary['metric']} {format_headline(summary)}")
    print(f"  95 % interval  {format_interval(summary)}")
    print(
        f"  {'questions':<14} {format_count(summary['benchmark'], summary['num_questions'], summary['num_questions'])}"
    )
    for key in ("num_scored", "missing", "duplicate", "extra", "unparsed", "failed"):
        print(f"  {key:<14} {summary[key]:,}")
    if "withheld" in summary:
        print(f"  No headline: {summary['withheld']}.", file=sys.stderr)
    if output is not None:
        print(f"  report         {output}/report.html")


def run_compare(first: _First, second: _Second, *, json: bool = False) -> None:
    """Compare results A and B, question by question, with the 95 % interval of the difference.

    Args:
        first: Folder of a result, as score and run write it.
        second: Folder of another result of the same benchmark and profile.
        json: Print one JSON object and nothing else.
    """
    from evals.comparison import compare_results as compare_results
    from evals.comparison import read_result

    found = compare_results(read_result(first), read_result(second))
    if json:
        print(json_format.dumps(found, ensure_ascii=False))
        return
    ends = found["confidence_interval"]
    span = f"{ends[0]:+.2f} to {ends[1]:+.2f}" if ends else "not known from one cluster"
    print(f"{found['benchmark']} ({found['profile']}): A - B = {found['difference']:+.2f}, 95 % interval {span}")
    asked = format_count(found["benchmark"], found["num_compared"], found["num_compared"])
    print(f"  {asked} questions: A better in {found['better']:,}, B in {found['worse']:,}")
    print(f"  The difference is {'' if found['significant'] else 'not '}significant.")
    for line in found["settings_that_differ"]:
        print(f"  Attention: the two were made with a different {line}.", file=sys.stderr)


def run_with_settings() -> None:
    """Ask a model the questions of several benchmarks and score its answers: a recipe, settings, --dry-run.

    ``run --help`` lists the settings.
    """
    raise AssertionError("main takes `run` before the others: its settings are a recipe's")


def run(arguments: Sequence[str]) -> list[dict[str, object]]:
    """Run a model on several benchmarks and score its answers; the same command resumes.

    With ``--dry-run`` only say what would be asked.
    """
    asked, arguments = split_dry_run(arguments)
    if asked.dry_run:
        from pipelines.evaluation_dry_run import describe_evaluation

        for line in describe_evaluation(arguments, asked.gpu_memory_gib):
            print(line)
        return []
    from pipelines.evaluation_run import evaluate

    return evaluate(arguments)
