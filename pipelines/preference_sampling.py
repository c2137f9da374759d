"""Sampling of answers: each is on the disk before the next batch, and a killed run generates none again."""

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evals.files import as_json
from llava_ray.config.preferences import PreferencesConfig, PreferencesSection
from llava_ray.errors import ConfigError, ImageError
from llava_ray.generate.answer_actor import ModelToLoad
from llava_ray.generate.answers import Decoding, GeneratedAnswer, locate_model, stream_answers
from llava_ray.generate.answers_file import AnswersFile
from llava_ray.generate.questions import ModelQuestion
from llava_ray.images.reading import check_image, read_bytes
from llava_ray.config.sections import MAX_IMAGE_PIXELS
from llava_ray.model.formats.manifest import library_versions
from llava_ray.model.loading import read_pretrained_blueprint
from llava_ray.runtime import connected
from llava_ray.shared_storage import Places
from pipelines.evaluation_asking import model_hash, size_pool
from pipelines.preference_pairs import AnswerKind, CandidateAnswer, draw
from pipelines.preference_questions import PromptSource, PromptToAnswer

_SECONDS_BETWEEN_LINES = 5.0
_UNFIT = re.compile(r"[^A-Za-z0-9._-]+")
_SAME = ("model_hash", "template", "image_aspect_ratio", "sampling")


@dataclass(frozen=True)
class SampledModel:
    """A model that answers, with its identity."""

    number: int
    path: str
    fingerprint: str
    location: ModelToLoad

    @property
    def name(self) -> str:
        """Return the last part of its path."""
        return Path(self.path).name

    @property
    def folder(self) -> str:
        """Return the name of the folder of its answers."""
        return f"{_UNFIT.sub('-', self.name)}-{_UNFIT.sub('-', self.fingerprint)[:16]}"


@dataclass(frozen=True)
class SamplingJob:
    """The answers of one model of one kind: to the images, to noised or to swapped ones."""

    model: SampledModel
    kind: AnswerKind
    settings: PreferencesSection
    max_new_tokens: int
    prompts: Sequence[PromptToAnswer]
    images: Mapping[str, tuple[str | bytes, ...]]
    """The images that each question is asked with."""
    file: AnswersFile

    @property
    def seed_words(self) -> tuple[object, ...]:
        """Return what, beside question and number, decides an answer's seed."""
        return (self.settings.seed, *(() if self.kind == "sample" else (self.kind,)))

    def key(self, prompt: PromptToAnswer, sample: int) -> str:
        """Return the id of an answer."""
        return f"{prompt.id}/{sample}"

    def seed(self, prompt: PromptToAnswer, sample: int) -> int:
        """Return the seed of an answer."""
        return draw(*self.seed_words, prompt.id, sample)

    def question(self, prompt: PromptToAnswer) -> ModelQuestion:
        """Return a prompt for the actors, with a seed for each sample."""
        step = self.settings.noise_steps
        return ModelQuestion(
            prompt.id,
            prompt.turns[-1].value,
            list(self.images[prompt.id]) or None,
            history=prompt.turns[:-1],
            seeds=[self.seed(prompt, sample) for sample in range(self.settings.num_samples)],
            noise=(step, draw(*self.seed_words, prompt.id, "noise")) if self.kind == "noised_image" else None,
        )

    def waiting(self) -> list[PromptToAnswer]:
        """Return the prompts of the batches that lack an answer, whole batches, so that each is what it would be."""
        size, rows = self.settings.batch_size, self.file.rows
        batches = [self.prompts[start : start + size] for start in range(0, len(self.prompts), size)]
        return [
            prompt
            for batch in batches
            if any(self.key(one, n) not in rows for one in batch for n in range(self.settings.num_samples))
            for prompt in batch
        ]

    def save(self, prompt: PromptToAnswer, answer: GeneratedAnswer) -> list[dict[str, Any]]:
        """Return the rows of a prompt's answers, or of the reason why it has none."""
        common = {"prompt": prompt.prompt[-1]["content"], "model_id": self.model.name}
        rows = []
        for sample in range(self.settings.num_samples):
            key = self.key(prompt, sample)
            row = {"question_id": key, **common, "answer_id": key, "seed": self.seed(prompt, sample)}
            if answer.unreadable:
                rows.append(row | {"text": "", "unreadable": answer.unreadable})
            else:
                text, ended = answer.samples[sample]
                rows.append(row | {"text": text, "ended": ended})
        return rows

    def answers(self, prompt: PromptToAnswer) -> list[CandidateAnswer]:
        """Return a prompt's answers as candidates."""
        settings, found = self.settings, []
        for sample in range(settings.num_samples):
            row = self.file.rows[self.key(prompt, sample)]
            origin = {
                "model": self.model.name,
                "fingerprint": self.model.fingerprint,
                "sample": sample,
                "seed": row["seed"],
                "temperature": settings.temperature,
                "top_p": settings.top_p,
                **({"noise_steps": settings.noise_steps} if self.kind == "noised_image" else {}),
            }
            text, ended = str(row["text"]), bool(row.get("ended"))
            found.append(CandidateAnswer(text, self.kind, self.model.number, sample, origin, ended))
        return found

    def unreadable(self, prompt: PromptToAnswer) -> str:
        """Return the reason why a prompt has no answers, or ""."""
        return str(self.file.rows[self.key(prompt, 0)].get("unreadable", ""))


def list_models(settings: PreferencesSection) -> list[SampledModel]:
    """Return the models with their identities. Raises ModelError."""
    found = []
    for number, path in enumerate(settings.models):
        location = locate_model(path, settings.model_base, settings.vision_tower, settings.version)
        found.append(SampledModel(number, path, model_hash(location.model_path), location))
    return found


def list_samplings(config: PreferencesConfig, source: PromptSource, folder: Path) -> list[SamplingJob]:
    """Return what is to be sampled: each model's answers, and those to images that are noised or swapped."""
    settings = config.preferences
    kinds: list[AnswerKind] = ["sample"] if settings.chosen == "sample" or _rejects_samples(settings) else []
    if settings.rule in ("noised_image", "swapped_image"):
        kinds.append("noised_image" if settings.rule == "noised_image" else "swapped_image")
    own = {prompt.id: prompt.images for prompt in source.prompts}
    found = []
    for model in list_models(settings):
        for kind in kinds:
            images = swap_images(source.prompts, settings.seed) if kind == "swapped_image" else own
            prompts = source.prompts if kind == "sample" else [one for one in source.prompts if images.get(one.id)]
            file = AnswersFile(folder / "answers" / model.folder / f"{kind}.jsonl")
            found.append(SamplingJob(model, kind, settings, source.max_new_tokens, prompts, images, file))
    return found


def _rejects_samples(settings: PreferencesSection) -> bool:
    """Return whether rejected answers are samples."""
    return settings.rule in ("benchmark", "answer")


def swap_images(prompts: Sequence[PromptToAnswer], seed: int) -> dict[str, tuple[str | bytes, ...]]:
    """Return other images for each prompt with images: those of another prompt with as many, chosen by the seed.

    A prompt has none if no other has as many and other ones.
    """
    by_number: dict[int, list[PromptToAnswer]] = {}
    for prompt in prompts:
        by_number.setdefault(len(prompt.images), []).append(prompt)
    found: dict[str, tuple[str | bytes, ...]] = {}
    for num, alike in by_number.items():
        order = sorted(alike, key=lambda prompt: draw(seed, "swap", prompt.id)) if num else []
        for place, prompt in enumerate(order):
            others = (order[(place + step) % len(order)].images for step in range(1, len(order)))
            found[prompt.id] = next((images for images in others if set(images).isdisjoint(prompt.images)), ())
    return found


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
            sampling.file.arrange([key for prompt in sampling.prompts for key in _keys(sampling, prompt)])


def _keys(sampling: SamplingJob, prompt: PromptToAnswer) -> Iterator[str]:
    return (sampling.key(prompt, sample) for sample in range(sampling.settings.num_samples))


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
    """Save how answers are sampled. Raises ConfigError if the file has answers sampled otherwise, or to other prompts."""
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
    prompts = {key: prompt.prompt[-1]["content"] for prompt in sampling.prompts for key in _keys(sampling, prompt)}
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
            for key in _keys(sampling, prompt):
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
