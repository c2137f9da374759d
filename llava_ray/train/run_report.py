"""The report of a finished run on a mixture: written beside its metrics, from them and the ledger."""

import json
from collections import Counter
from pathlib import Path

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.errors import ConfigError
from llava_ray.report.charts import check_plotting
from llava_ray.report.mixture import mixture_report
from llava_ray.report.pieces import Link, Links
from llava_ray.report.rendering import write_report
from llava_ray.train.runs import RunFolder
from llava_ray.train.step_file import read_rows


def write_run_report(config: FinetuneConfig, run: RunFolder) -> str | None:
    """Write ``report.html`` of a run on a mixture and return its path; None without one, or where it has no place.

    A report is not worth a run: where charts cannot be drawn, the reason is printed.
    """
    if not config.data.sources or "://" in run.path:
        return None
    try:
        check_plotting()
    except ConfigError as error:
        print(f"No report is written: {error}", flush=True)  # noqa: T201 - for the person who started the run
        return None
    links = Links([Link(name, name) for name in ("resolved.json", "metrics.jsonl", "ledger.jsonl", "model/llava.json")])
    report = mixture_report(run.name, read_rows(f"{run.path}/metrics.jsonl"), count_drawn(config, run), links)
    return str(write_report(f"{run.path}/report.html", report))


def count_drawn(config: FinetuneConfig, run: RunFolder) -> dict[str, int]:
    """Count the samples of each source in the ledger, in the order of the recipe."""
    counts: Counter[str] = Counter()
    with Path(f"{run.path}/ledger.jsonl").open() as lines:
        for line in lines:
            counts.update(name.partition("/")[0] for name in json.loads(line)["samples"])
    return {source.name: counts[source.name] for source in config.data.sources}
