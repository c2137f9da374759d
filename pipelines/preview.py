#!/usr/bin/env python
"""Show how a model will see your data before training: tokens, supervised ones, images, losses.

python pipelines/preview.py --model BUNDLE --data mix.json --image_folder images
python pipelines/preview.py --tokenizer DIR --version vicuna_v1 --data mix.json --json
"""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import tyro

from llava_ray.config.booleans import find_boolean_parameters, strip_boolean_values
from llava_ray.config.preview import PreviewSettings, open_recipe
from llava_ray.invocation import command
from pipelines.command import run_command
from pipelines.places import check_files, check_models

WHEN_STOPPED = "Stopped; nothing was written."
_NUM_IN_REPORT = 200


def main(arguments: Sequence[str]) -> Path | None:
    """Write the report and return its path, or print the JSON lines."""
    settings = tyro.cli(
        PreviewSettings,
        args=strip_boolean_values(arguments, find_boolean_parameters(PreviewSettings)),
        use_underscores=True,
        prog=command("preview"),
    )
    check_files({"data": settings.data})
    settings = open_recipe(settings)
    check_models({key: getattr(settings, key) for key in ("model", "tokenizer", "model_base", "vision_tower")})
    check_files({key: getattr(settings, key) for key in ("data", "image_folder")})
    from llava_ray.data.ordered_records import read_records
    from llava_ray.data.record_keys import describe_ignored
    from llava_ray.preview.losses import model_viewer
    from llava_ray.preview.report import Findings, describe_findings, make_line, make_preview_report, paint_samples
    from llava_ray.preview.samples import Rejection, SampleView, token_viewer
    from llava_ray.report.charts import check_plotting
    from llava_ray.report.rendering import write_report

    viewer, judge = model_viewer(settings) if settings.model else (token_viewer(settings), None)
    records = read_records(settings.data, settings.max_samples or (None if settings.json else _NUM_IN_REPORT))
    seen = (viewer.view(record) for record in records)
    views = judge.add_losses(seen) if judge else seen
    if settings.json:
        counts, ignored = Counter[str](), Counter[str]()
        for view in views:
            print(make_line(view), flush=True)
            counts["all"] += 1
            ignored.update(view.ignored if isinstance(view, SampleView) else ())
            counts["rejected"] += isinstance(view, Rejection)
            counts["without"] += isinstance(view, SampleView) and bool(view.no_loss)
        without = f", {counts['without']:,} without a finite loss" if counts["without"] else ""
        print(f"{counts['all']:,} conversations, {counts['rejected']:,} rejected{without}", file=sys.stderr)
        if ignored:
            print(describe_ignored(ignored), file=sys.stderr)
        print(*viewer.warnings(), sep="\n", end="\n" * bool(viewer.warnings()), file=sys.stderr)
        return None
    check_plotting()
    findings = Findings(settings, viewer, list(views))
    path = write_report(Path(settings.output) / "report.html", make_preview_report(findings))
    if sys.stdout.isatty():
        print(paint_samples(findings))
    print(describe_findings(findings), f"Report: {path}", sep="\n")
    return path


if __name__ == "__main__":
    run_command(main, when_stopped=WHEN_STOPPED)
