"""A sweep's folder, ``run.storage_path/run.name``: the same settings go on, others under its name are refused.

It holds ``resolved.json``, ``trials.json`` (the ledger), ``trials/`` with a run's folder for each trial, ``tune/``
(Tune's own state), ``best/model``, ``best.toml``, ``report.html`` and ``report.json``.
"""

import json
import time

from llava_ray.config.recipes import differing_keys
from llava_ray.config.space import Space, SweepConfig
from llava_ray.data.storage import absolute, read_file, write_file
from llava_ray.errors import ConfigError
from llava_ray.images.reading import open_filesystem

# May change between the starts of a sweep, beside what may in any run.
MAY_CHANGE = ("max_concurrent_trials", "max_retries")


def open_sweep(config: SweepConfig, space: Space) -> str:
    """Find or make the sweep's folder, note the settings in it and return its path. Raises ConfigError."""
    folder = f"{absolute(config.run.storage_path)}/{config.run.name}"
    settings = config.model_dump(mode="json") | {"space": space.model_dump(mode="json")["dimensions"]}
    try:
        old = json.loads(read_file(f"{folder}/resolved.json"))
    except FileNotFoundError:
        old = None
    if old is not None:
        changed = differing_keys(comparable(old), comparable(settings))
        if changed and not config.run.restart:
            raise ConfigError(
                f"sweep {config.run.name!r} in {config.run.storage_path} was made with other settings "
                f"({'; '.join(changed)}): give another --run.name, go back to the old settings to go on, or start over "
                "with --run.restart True"
            )
        if config.run.restart:
            filesystem, place = open_filesystem(folder)
            filesystem.mv(place, f"{place}.replaced-{time.strftime('%Y%m%d-%H%M%S')}", recursive=True)
    write_file(f"{folder}/resolved.json", json.dumps(settings, indent=1).encode())
    return folder


def comparable(settings: dict[str, object]) -> dict[str, object]:
    """Return settings without those that may change; what trials are judged by may not."""
    search = settings["sweep"]
    assert isinstance(search, dict)
    kept = {key: value for key, value in search.items() if key not in MAY_CHANGE}
    return settings | {"sweep": kept, "judged_by": settings["held_out"]}
