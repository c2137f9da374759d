"""What the sources of a mixture need of a run, and the data and paths of each."""

from typing import Any

from llava_ray.config.data import DataConfig
from llava_ray.config.preference import PAIR_OBJECTIVES
from llava_ray.config.sources import describe_source
from llava_ray.config.train import TrainConfig


def check_run_sources(data: DataConfig, train: TrainConfig) -> None:
    """Reject sources that do not fit the run's rows or objective. Raises ValueError."""
    objective = train.objective
    kinds = []
    for number, source in enumerate(data.sources):
        name = describe_source(number, source)
        if (source.model_max_length or 0) > train.model_max_length:
            raise ValueError(
                f"{name}: model_max_length = {source.model_max_length} is above train.model_max_length = "
                f"{train.model_max_length}; lower the first or raise the second"
            )
        kinds.append(data.kind if source.kind == "auto" else source.kind)
        if kinds[-1] == "preferences" and objective not in PAIR_OBJECTIVES:
            raise ValueError(
                f"{name}: kind = 'preferences' with train.objective = {objective!r}, which learns from no pairs; "
                f"choose an objective over pairs ({', '.join(sorted(PAIR_OBJECTIVES))}), or leave the source out"
            )
    if kinds and objective in PAIR_OBJECTIVES and "preferences" not in kinds:
        raise ValueError(
            f"train.objective = {objective!r} learns from pairs, but no source has kind = 'preferences'; add one"
        )


def source_data(data: DataConfig, number: int, **changes: Any) -> DataConfig:
    """Return the settings of one source's data, as they would be of a run on it alone, with ``changes``."""
    source = data.sources[number]
    own = {
        "data_path": source.data_path,
        "image_folder": source.image_folder or data.image_folder,
        "kind": data.kind if source.kind == "auto" else source.kind,
        "on_too_long": source.on_too_long or data.on_too_long,
        "max_samples": source.max_samples,
        "sources": (),
        "epoch_samples": None,
    }
    return data.replaced(own | changes)


def named_places(data: DataConfig) -> dict[str, str | None]:
    """Return the paths of all data that a run learns from or is judged by, by their dotted keys."""
    if not data.sources:
        return {"data.data_path": data.data_path, "data.image_folder": data.image_folder}
    places = {"data.image_folder": data.image_folder}
    for number, source in enumerate(data.sources):
        for key in ("data_path", "image_folder", "held_out", "held_out_images"):
            places[f"data.sources.{number}.{key}"] = getattr(source, key)
    return places


def learnt_paths(data: DataConfig) -> dict[str, str]:
    """Return the path of each source by its dotted key: one, ``data.data_path``, where there is no mixture."""
    if not data.sources:
        return {"data.data_path": data.data_path}
    return {f"data.sources.{number}.data_path": source.data_path for number, source in enumerate(data.sources)}


def held_out_paths(data: DataConfig) -> dict[str, str]:
    """Return the path of each source's held-out samples by its dotted key."""
    named = {f"data.sources.{number}.held_out": source.held_out for number, source in enumerate(data.sources)}
    return {key: path for key, path in named.items() if path is not None}
