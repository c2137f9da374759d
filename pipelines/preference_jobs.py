"""Jobs of sampling: each model's answers to each question, and those to images that are noised or swapped."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_ray.config.preferences import PreferencesConfig, PreferencesSection
from llava_ray.errors import ConfigError
from llava_ray.generate.answer_actor import ModelToLoad
from llava_ray.generate.answers import GeneratedAnswer, locate_model
from llava_ray.generate.answers_file import AnswersFile
from llava_ray.generate.questions import ModelQuestion
from pipelines.evaluation_asking import model_hash
from pipelines.preference_pairs import AnswerKind, CandidateAnswer, draw
from pipelines.preference_questions import PromptSource, PromptToAnswer

_UNFIT = re.compile(r"[^A-Za-z0-9._-]+")


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

    def keys(self, prompt: PromptToAnswer) -> list[str]:
        """Return the ids of a prompt's answers."""
        return [self.key(prompt, sample) for sample in range(self.settings.num_samples)]

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
            if any(key not in rows for one in batch for key in self.keys(one))
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
    """Return the models with their identities. Raises ConfigError for the same one twice, ModelError."""
    found: dict[str, SampledModel] = {}
    for number, path in enumerate(settings.models):
        location = locate_model(path, settings.model_base, settings.vision_tower, settings.version)
        model = SampledModel(number, path, model_hash(location.model_path), location)
        if (first := found.setdefault(model.fingerprint, model)) is not model:
            raise ConfigError(f"preferences.models: {path} and {first.path} are the same model; leave one of them out")
    return list(found.values())


def list_samplings(config: PreferencesConfig, source: PromptSource, folder: Path) -> list[SamplingJob]:
    """Return what is to be sampled: each model's answers, and those to images that are noised or swapped."""
    settings = config.preferences
    kinds: list[AnswerKind] = ["sample"] if settings.chosen == "sample" or _rejects_samples(settings) else []
    if settings.rule in ("noised_image", "swapped_image"):
        kinds.append("noised_image" if settings.rule == "noised_image" else "swapped_image")
    own = {prompt.id: prompt.images for prompt in source.prompts}
    # A question whose image cannot be perturbed is not asked at all.
    other = own | (swap_images(source.prompts, settings.seed) if settings.rule == "swapped_image" else {})
    found = []
    for model in list_models(settings):
        for kind in kinds:
            images = other if kind == "swapped_image" else own
            prompts = [one for one in source.prompts if kinds[-1] == "sample" or other[one.id]]
            file = AnswersFile(folder / "answers" / model.folder / f"{kind}.jsonl", "--preferences.output")
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
