"""Sampling of answers: each is on the disk before the next batch, and a killed run generates none again."""

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from evals.files import as_json
from llava_ray.config.data import MAX_IMAGE_PIXELS
from llava_ray.config.preferences import PreferencesConfig
from llava_ray.errors import ConfigError, ImageError
from llava_ray.generate.answers import Decoding, stream_answers
from llava_ray.images.reading import check_image, read_bytes
from llava_ray.model.formats.manifest import library_versions
from llava_ray.model.loading import read_pretrained_blueprint
from llava_ray.runtime import connected
from llava_ray.shared_storage import Places
from pipelines.evaluation_asking import size_pool
from pipelines.preference_jobs import SamplingJob
from pipelines.preference_questions import PromptSource

_SECONDS_BETWEEN_LINES = 5.0
_SAME = ("model_hash", "template", "image_aspect_ratio", "sampling")


def sample_answers(config: PreferencesConfig, samplings: Sequence[SamplingJob]) -> None:
    """Sample every answer that is not on the disk yet. Raises ConfigError, ModelError."""
    with ExitStack() as stack:
        for sampling in samplings:
            stack.enter_context(sampling.file)
            _check_settings(sampling)
            _forget_repaired(sampling)
        if any(sampling.waiting() for sampling in samplings):
            with connected(config.cluster, _places(config, samplings)):
                for sampling in samplings:
                    _sample(config, sampling)
        for sampling in samplings:
            sampling.file.arrange([key for prompt in sampling.prompts for key in sampling.keys(prompt)])


def _places(config: PreferencesConfig, samplings: Sequence[SamplingJob]) -> Places:
    """Return the paths that all nodes have to see."""
    settings = config.preferences
    data = [settings.benchmark.partition("=")[2] if settings.benchmark else settings.image_folder or settings.data_path]
    models = [sampling.model.path for sampling in samplings]
    return Places.of([], [*models, settings.model_base, settings.vision_tower, *data])


def _sample(config: PreferencesConfig, sampling: SamplingJob) -> None:
    """Sample one model's waiting answers of one kind."""
    waiting = sampling.waiting()
    by_id, settings, spoken = {prompt.id: prompt for prompt in waiting}, sampling.settings, time.monotonic()
    decoding = Decoding(sampling.max_new_tokens, settings.temperature, settings.batch_size, settings.top_p)
    questions = [sampling.question(prompt) for prompt in waiting]
    pool = size_pool(config.actors)
    for batch in stream_answers(sampling.model.location, questions, decoding, pool, tolerant=True):
        sampling.file.append([row for answer in batch for row in sampling.save(by_id[answer.id], answer)])
        if time.monotonic() - spoken > _SECONDS_BETWEEN_LINES:
            spoken = time.monotonic()
            print(_progress(sampling), flush=True)
    print(_progress(sampling), flush=True)


def _progress(sampling: SamplingJob) -> str:
    """Format the progress of a model's answers."""
    total = len(sampling.prompts) * sampling.settings.num_samples
    what = "" if sampling.kind == "sample" else f", {sampling.kind.replace('_', ' ')}"
    return f"{sampling.model.name}{what}: {min(total, len(sampling.file.rows)):,}/{total:,} answers"


def _check_settings(sampling: SamplingJob) -> None:
    """Save how answers are sampled. Raises ConfigError if the file's were sampled otherwise, or to other prompts."""
    settings = sampling.settings
    blueprint = read_pretrained_blueprint(**vars(sampling.model.location))
    noise = f", noise {settings.noise_steps}" if sampling.kind == "noised_image" else ""
    limits = f"temperature {settings.temperature:g}, top_p {settings.top_p:g}, seed {settings.seed}{noise}"
    made = {
        "model": sampling.model.path,
        "model_hash": sampling.model.fingerprint,
        "template": blueprint.config.version,
        "image_aspect_ratio": blueprint.image_spec.aspect_ratio,
        "sampling": f"{limits}, max_new_tokens {sampling.max_new_tokens}",
        **library_versions(),
    }
    path = sampling.file.path.with_suffix(".provenance.json")
    kept = json.loads(path.read_text(encoding="utf-8")) if sampling.file.rows and path.exists() else made
    differing = [key for key in _SAME if kept.get(key) != made[key]]
    prompts = {key: prompt.prompt[-1]["content"] for prompt in sampling.prompts for key in sampling.keys(prompt)}
    other = next(
        (key for key, row in sampling.file.rows.items() if prompts.get(key, row["prompt"]) != row["prompt"]), ""
    )
    if differing or other:
        what = f"made with another {', '.join(differing)}" if differing else f"to another question {other!r}"
        raise ConfigError(f"{sampling.file.path} has answers {what}: choose another preferences.output, or delete it")
    path.write_bytes(as_json(made if kept is made else kept))


def _forget_repaired(sampling: SamplingJob) -> None:
    """Forget that an image was unreadable where it can be read by now, so that its question is asked again."""
    for prompt in sampling.prompts:
        row = sampling.file.rows.get(sampling.key(prompt, 0), {})
        if row.get("unreadable") and _is_readable(sampling.images[prompt.id]):
            for key in sampling.keys(prompt):
                sampling.file.rows.pop(key, None)


def _is_readable(images: Sequence[str | bytes]) -> bool:
    try:
        for image in images:
            content = image if isinstance(image, bytes) else read_bytes(image)
            check_image(content, "an image", max_pixels=MAX_IMAGE_PIXELS)
    except ImageError:
        return False
    return True


def drop_unreadable(source: PromptSource, samplings: Sequence[SamplingJob], most: float) -> PromptSource:
    """Reject the questions with an image that could not be read. Raises DataError for too many of them."""
    found: dict[str, str] = {}
    for sampling in samplings:
        for prompt in sampling.prompts:
            if reason := sampling.unreadable(prompt):
                found.setdefault(prompt.id, reason)
    for name, reason in found.items():
        source.reject("image_unreadable", f"question {name!r}: {reason}")
    source.check_rejected(most)
    return replace(source, prompts=[prompt for prompt in source.prompts if prompt.id not in found])
