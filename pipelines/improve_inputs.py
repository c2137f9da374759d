"""The inputs of the loop, read and checked before anything starts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evals.benchmark import Question
from evals.catalogue import make_benchmark
from evals.scoring import check_truths
from llava_ray.config.improve import ImproveConfig
from llava_ray.config.preferences import PreferencesSection
from llava_ray.errors import ConfigError, DataError
from pipelines.improve_overlap import AskedQuestions, check_apart
from pipelines.improve_settings import preference_settings
from pipelines.places import check_files, check_models, exists
from pipelines.preference_questions import read_prompts_to_answer
from pipelines.prerequisites import find_maker


@dataclass(frozen=True)
class LoopInputs:
    """What the rounds ask, and what is held out."""

    held_out: Sequence[Question]
    asked: AskedQuestions


def read_loop_inputs(config: ImproveConfig) -> LoopInputs:
    """Read the questions of all rounds and the held-out ones. Raises ConfigError, DataError."""
    _check_improve_places(config)
    preference_settings(config, 1, 0, config.model.model_name_or_path, {})  # raises what only the whole can
    improve, section = config.improve, config.preferences
    name, _, folder = improve.benchmark.partition("=")
    benchmark = make_benchmark(name)
    held_out = benchmark.read(Path(folder))[: improve.max_held_out]
    if improve.profile in benchmark.needs_judge:
        raise ConfigError(
            f"improve.benchmark: {benchmark.title} needs a judge under improve.profile = {improve.profile!r}; hold out "
            "one that a rule scores"
        )
    if lacking := benchmark.lacks(improve.profile):
        raise ConfigError(f"improve.benchmark under improve.profile = {improve.profile!r}: {lacking}")
    check_truths(benchmark, held_out)
    if not held_out or not held_out[0].truths:
        raise DataError(f"improve.benchmark: {folder} holds no questions with answers, so that nothing is measured")
    most = None if section.max_questions is None else section.max_questions * improve.rounds
    values = section.model_dump() | {"models": ("all",), "max_questions": most, "num_samples": 2, "temperature": 1.0}
    source = read_prompts_to_answer(PreferencesSection.parsed(values))
    return LoopInputs(held_out, check_apart(config, source, held_out))


def _check_improve_places(config: ImproveConfig) -> None:
    """Check that the models and the data exist. Raises ConfigError."""
    if "://" in config.improve.output:
        raise ConfigError("the rounds' results are in a local or mounted folder: set improve.output to one")
    models = {
        f"model.{key}": getattr(config.model, key) for key in ("model_name_or_path", "model_base", "vision_tower")
    }
    if not exists(config.model.model_name_or_path) and (maker := find_maker(config.model.model_name_or_path)):
        missing = config.model.model_name_or_path
        raise ConfigError(f"model.model_name_or_path = {missing!r} is not there yet: run {maker} first, which makes it")
    section = config.preferences
    others = {f"preferences.models, {number}": path for number, path in enumerate(section.models, start=1)}
    check_models(models | others)
    check_files({"improve.benchmark": config.improve.benchmark.partition("=")[2]})
    check_files({"preferences.benchmark": section.benchmark.partition("=")[2] if section.benchmark else None})
    check_files(
        {f"preferences.{key}": getattr(section, key) for key in ("data_path", "image_folder", "words", "rubric")}
    )
    check_files({"held_out.path": config.held_out.path, "held_out.images": config.held_out.images})


def check_template(config: ImproveConfig) -> None:
    """Check that the rounds speak the template that the model was trained with. Raises ConfigError, ModelError."""
    from llava_ray.model.loading import read_pretrained_blueprint

    model = config.model
    parts = {"model_base": model.model_base, "vision_tower": model.vision_tower, "version": model.version}
    given = read_pretrained_blueprint(model.model_name_or_path, **parts)
    stated = given.layout.settings.get("version")
    if stated is not None and stated != model.version:
        raise ConfigError(
            f"model.version = {model.version!r}, but {model.model_name_or_path} was trained with the conversation "
            f"template {stated!r}: set model.version to that"
        )
