"""A sweep's folder, ``run.storage_path/run.name``: the same settings resume, others are an error.

It holds ``resolved.json``, ``trials.json`` (the ledger), ``trials/`` with a run's folder for each trial, ``tune/``
(Tune's own state), ``best/model``, ``best.toml``, ``report.html`` and ``report.json``.
"""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from llava_ray.config.model import MODEL_PATHS
from llava_ray.config.recipes import differing_keys
from llava_ray.config.schema import flat_settings
from llava_ray.config.space import Space, SweepConfig
from llava_ray.data.storage import absolute_path, file_size, read_stored, relative_path, write_stored
from llava_ray.errors import ConfigError
from llava_ray.images.reading import open_filesystem
from llava_ray.sweep.ledger import LEDGER
from llava_ray.train.identity import DATA, DATA_PATHS, identify_model
from llava_ray.train.identity import comparable as alike

# Settings that may change between the starts of a sweep, in addition to those of any run.
_MAY_CHANGE = ("max_concurrent_trials", "max_retries")


def open_sweep(config: SweepConfig, space: Space) -> str:
    """Find or create the sweep's folder, save the settings in it and return its path. Raises ConfigError.

    Its name is taken once a trial has started.
    """
    folder = f"{absolute_path(config.run.storage_path)}/{config.run.name}"
    identity = _identify_sweep(config)
    settings = config.model_dump(mode="json") | {"space": space.model_dump(mode="json")["dimensions"]}
    try:
        old = json.loads(read_stored(f"{folder}/resolved.json"))
    except FileNotFoundError:
        old = None
    if old is not None and config.run.restart:
        filesystem, place = open_filesystem(folder)
        filesystem.mv(place, f"{place}.replaced-{time.strftime('%Y%m%d-%H%M%S')}", recursive=True)
    elif old is not None and file_size(f"{folder}/{LEDGER}") is not None:
        changed = _find_changed(old, config, settings, identity)
        if changed:
            raise ConfigError(
                f"sweep {config.run.name!r} in {config.run.storage_path} was made with other settings "
                f"({'; '.join(changed)}): choose another --run.name, restore the old settings to resume it, or start "
                "over with --run.restart True"
            )
    write_stored(f"{folder}/resolved.json", json.dumps(settings | {"identity": identity}, indent=1).encode())
    return folder


def _identify_sweep(config: SweepConfig) -> dict[str, str]:
    """Return a sweep's identity, equal in a copied project: models' fingerprints, and paths relative to the project."""
    named = flat_settings(config)
    models = {key: identify_model(str(named[key])) for key in MODEL_PATHS if named[key]}
    data = [
        relative_path(str(Path.cwd()), absolute_path(path)) if path else ""
        for path in (named[key] for key in DATA_PATHS)
    ]
    return models | {DATA: hashlib.sha256("\0".join(data).encode()).hexdigest()}


def _find_changed(
    old: dict[str, Any], config: SweepConfig, settings: dict[str, Any], identity: dict[str, str]
) -> list[str]:
    """Return a line for each setting that differs from the saved ones."""
    known = dict(old.get("identity") or {})
    if known.get(DATA) != identity[DATA]:
        known.pop(DATA, None)  # the differing paths are reported instead
    then, now = alike(old | {"identity": known}, config, identity)
    return differing_keys(_comparable(then), _comparable(now | {"space": settings["space"]}))


def _comparable(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings without those that may change; the held-out samples may not."""
    search = settings["sweep"]
    assert isinstance(search, dict)
    fixed = {key: value for key, value in search.items() if key not in _MAY_CHANGE}
    return settings | {"sweep": fixed, "judged_by": settings["held_out"]}
