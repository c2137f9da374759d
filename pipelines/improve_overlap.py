"""Questions that are held out and asked for preferences too: a gain would be measured on what was learnt."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from evals.benchmark import Question
from llava_ray.config.improve import ImproveConfig
from llava_ray.errors import ConfigError, DataError
from pipelines.preference_questions import PromptSource, PromptToAnswer

_MAX_NAMED = 3


@dataclass(frozen=True)
class AskedQuestions:
    """The questions of all rounds together."""

    total: int
    """Without those that preferences.skip_questions leaves out."""
    shared_images: int
    """Held-out questions about an image that rounds ask other questions about."""


def check_apart(config: ImproveConfig, source: PromptSource, held_out: Sequence[Question]) -> AskedQuestions:
    """Check that no held-out question is asked for preferences. Raises ConfigError, DataError, which name them."""
    held_folder, asked = config.improve.benchmark.partition("=")[2], config.preferences.benchmark
    if asked and Path(asked.partition("=")[2]).resolve() == Path(held_folder).resolve():
        raise ConfigError(
            f"improve.benchmark and preferences.benchmark name the same folder {held_folder}: a gain would be measured "
            "on questions that were learnt from; hold other questions out"
        )
    contents = _ImageContents()
    by_sizes: dict[tuple[object, ...], list[Question]] = defaultdict(list)
    for question in held_out:
        by_sizes[_plain(question.prompt), *map(contents.size, question.images)].append(question)
    found = []
    for prompt in source.prompts:
        alike = by_sizes.get((_plain(prompt.question), *map(contents.size, prompt.images)), [])
        shown = [contents.identify(image) for image in prompt.images] if alike else []
        same = next((one for one in alike if [contents.identify(image) for image in one.images] == shown), None)
        if same is not None:
            found.append(f"{prompt.id!r} is held out as {same.id!r}")
    if found:
        raise DataError(
            f"{len(found):,} of the {len(source.prompts):,} questions asked for preferences are held out too "
            f"({'; '.join(found[:_MAX_NAMED])}{'; …' if len(found) > _MAX_NAMED else ''}): a gain would be measured on "
            "questions that were learnt from; take them out of one of the two"
        )
    return AskedQuestions(source.total, _count_shared(source.prompts, held_out))


def _plain(text: str) -> str:
    """Return a question without the space around its words and its instruction of a format."""
    lines = text.replace("<image>", " ").strip().splitlines()
    if len(lines) > 1 and lines[-1].startswith("Answer "):
        lines = lines[:-1]
    return " ".join(" ".join(lines).lower().split())


def _count_shared(prompts: Iterable[PromptToAnswer], held_out: Iterable[Question]) -> int:
    """Count held-out questions about a file that is asked about too."""
    asked = {image for prompt in prompts for image in prompt.images if isinstance(image, str)}
    return sum(any(isinstance(i, Path) and str(i.resolve()) in asked for i in one.images) for one in held_out)


class _ImageContents:
    """Identities of images: equal contents are the same image, wherever they lie."""

    def __init__(self) -> None:
        self.sizes: dict[str, int | str] = {}
        self.identities: dict[str, str] = {}

    def size(self, image: Path | str | bytes) -> int | str:
        """Return the size in bytes; an address, or the name of what is not there, as it is."""
        if isinstance(image, bytes):
            return len(image)
        name = str(image)
        if name not in self.sizes:
            try:
                self.sizes[name] = Path(name).stat().st_size
            except OSError:
                self.sizes[name] = name
        return self.sizes[name]

    def identify(self, image: Path | str | bytes) -> str:
        """Return a hash of the contents; an address, or the name of what is not there, as it is."""
        if isinstance(image, bytes):
            return hashlib.sha256(image).hexdigest()
        name = str(image)
        if name not in self.identities:
            try:
                with Path(name).open("rb") as file:
                    self.identities[name] = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError:
                self.identities[name] = name
        return self.identities[name]
