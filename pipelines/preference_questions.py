"""The questions to make preferences of: those of a benchmark, or the last questions of training records."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from evals.benchmark import Benchmark, Question
from evals.catalogue import make_benchmark
from evals.files import check_unique
from llava_ray.chat.conversation import IMAGE_TOKEN, Turn, split_system, with_markers
from llava_ray.config.preferences import PreferencesSection
from llava_ray.data.ordered_records import read_records
from llava_ray.data.records import Record
from llava_ray.data.storage import absolute_path
from llava_ray.data.validation import read_record
from llava_ray.errors import DataError, RecordError
from llava_ray.reading import is_file

_TOKENS_OF_RECORDS = 512
_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_MAX_REASONS = 3


@dataclass(frozen=True)
class PromptToAnswer:
    """A prompt that ends with a question, with its images and, where the data have it, the right answer."""

    id: str
    turns: tuple[Turn, ...]
    images: tuple[str | bytes, ...] = ()
    truths: tuple[str, ...] = ()
    source: str = ""
    """File and row, or the benchmark."""
    asked: Question | None = None
    """The benchmark's own question."""

    @property
    def prompt(self) -> list[dict[str, str]]:
        """Return the prompt in TRL's conversational form."""
        return [{"role": _ROLES[turn.role], "content": turn.value} for turn in self.turns]

    @property
    def question(self) -> str:
        """Return the last question without image markers."""
        return self.turns[-1].value.replace(IMAGE_TOKEN, "").strip()


@dataclass(frozen=True)
class PromptSource:
    """All prompts of a source, and what was rejected."""

    prompts: Sequence[PromptToAnswer]
    benchmark: Benchmark | None
    max_new_tokens: int
    total: int
    """The number of questions, rejected ones included."""
    rejected: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)

    def reject(self, reason: str, message: str) -> None:
        """Count a question that cannot be asked."""
        self.reasons[reason] += 1
        self.rejected.append(message)

    def check_rejected(self, most: float) -> None:
        """Check the share of rejected questions. Raises DataError, which names the first ones."""
        num = len(self.rejected)
        if num and num > most * self.total:
            listed = "; ".join(self.rejected[:_MAX_REASONS])
            raise DataError(
                f"{num:,} of {self.total:,} questions cannot be asked (preferences.max_rejected = {most:g}): {listed}; "
                "repair them, or raise it"
            )


def read_prompts_to_answer(settings: PreferencesSection) -> PromptSource:
    """Read the questions; those that cannot be asked are rejected with their reasons. Raises ConfigError, DataError."""
    source = _read_benchmark(settings) if settings.benchmark else _read_records(settings)
    for prompt in source.prompts:
        missing = next((image for image in prompt.images if _is_missing(image)), None)
        if missing is not None:
            source.reject("image_missing", f"question {prompt.id!r}: image {missing!r} does not exist")
    source.check_rejected(settings.max_rejected)
    prompts = [one for one in source.prompts if not any(map(_is_missing, one.images))]
    if not prompts:
        skipped = f" after preferences.skip_questions = {settings.skip_questions:,}" if settings.skip_questions else ""
        raise DataError(f"{settings.benchmark or settings.data_path} holds no questions to ask{skipped}.")
    return replace(source, prompts=prompts)


def _is_missing(image: str | bytes) -> bool:
    return isinstance(image, str) and "://" not in image and not is_file(Path(image))


def _read_benchmark(settings: PreferencesSection) -> PromptSource:
    name, _, folder = str(settings.benchmark).partition("=")
    benchmark = make_benchmark(name)
    if not Path(folder).is_dir():
        raise DataError(f"there is no folder {folder}; evals/README.md says what {benchmark.title} needs in it.")
    questions = benchmark.read(Path(folder))[settings.skip_questions :][: settings.max_questions]
    check_unique([question.id for question in questions], Path(folder), "question")
    prompts = []
    for question in questions:
        images = tuple(image if isinstance(image, bytes) else str(image.resolve()) for image in question.images)
        turns = (Turn("human", with_markers(question.prompt, len(images))),)
        prompts.append(PromptToAnswer(question.id, turns, images, question.truths, benchmark.name, question))
    longest = settings.max_new_tokens or benchmark.max_new_tokens
    source = PromptSource([one for one in prompts if _markers_fit(one)], benchmark, longest, len(prompts))
    for one in prompts:
        if not _markers_fit(one):
            num = one.turns[-1].value.count(IMAGE_TOKEN)
            source.reject("image_count", f"question {one.id!r} has {num} image markers and {len(one.images)} images")
    return source


def _markers_fit(prompt: PromptToAnswer) -> bool:
    markers = sum(turn.value.count(IMAGE_TOKEN) for turn in prompt.turns if turn.role != "system")
    return markers == len(prompt.images)


def _read_records(settings: PreferencesSection) -> PromptSource:
    path = str(settings.data_path)
    folder = settings.image_folder or _folder_of(path)
    prompts: list[PromptToAnswer] = []
    faults: list[RecordError] = []
    skip = settings.skip_questions
    last = None if settings.max_questions is None else skip + settings.max_questions
    for raw in islice(read_records(path, last), skip, None):
        try:
            record = raw if isinstance(raw, Record) else read_record(raw, absolute_path(folder))
            prompts.append(_to_prompt(record))
        except RecordError as error:
            faults.append(error)
    longest = settings.max_new_tokens or _TOKENS_OF_RECORDS
    source = PromptSource(prompts, None, longest, len(prompts) + len(faults))
    for fault in faults:
        source.reject(fault.reason, str(fault))
    check_unique([prompt.id for prompt in prompts], Path(path), "record")
    return source


def _folder_of(path: str) -> str:
    """Return the folder of the data: the path itself, if it is one."""
    return path if "://" not in path and Path(path).is_dir() else path.rpartition("/")[0] or "."


def _to_prompt(record: Record) -> PromptToAnswer:
    """Return a record's turns up to its last question, and what answers that, if anything does. Raises RecordError."""
    system, spoken = split_system(record.turns)
    answered = bool(spoken) and spoken[-1].role == "gpt"
    turns, truth = (tuple(spoken[:-1]), spoken[-1].value.strip()) if answered else (tuple(spoken), "")
    where = f"record {record.id!r} ({record.source})"
    if any(turn.needs_tools for turn in spoken):
        raise RecordError(f"{where} calls tools; preferences are of plain answers", reason="unsupported")
    before = (Turn("system", system),) if system else ()
    truths = (truth,) if truth else ()
    prompt = PromptToAnswer(record.id, (*before, *turns), record.images, truths, record.source)
    if not _markers_fit(prompt):
        raise RecordError(f"{where}: its answer holds image markers; images belong to questions", reason="image_count")
    return prompt


class ImageFolder:
    """Files of images that the data hold as bytes, named by their contents."""

    def __init__(self, folder: Path) -> None:
        """Initialise with the folder that the names are relative to."""
        self.folder = folder

    def name(self, image: str | bytes) -> str:
        """Return how preferences name an image: its path or address, or a file that is written here."""
        if isinstance(image, str):
            return image
        name = f"images/{hashlib.sha256(image).hexdigest()[:24]}"
        path = self.folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_name(f".{path.name}")
            fresh.write_bytes(image)
            fresh.replace(path)
        return name

    def path(self, image: str | bytes) -> Path:
        """Return the file of an image."""
        name = self.name(image)
        return Path(name) if isinstance(image, str) else self.folder / name
