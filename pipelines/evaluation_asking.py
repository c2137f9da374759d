"""Generation of answers to several benchmarks in one Ray job; each answer is on the disk at once."""

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from evals.benchmark import Benchmark
from evals.benchmark import Question as BenchmarkQuestion
from evals.catalogue import make_benchmark
from evals.files import as_json
from evals.ranking import LogLikelihood, Ranking, find_best_letter, list_candidates, ranking_prompt
from llava_ray.config.evaluate import ActorsConfig, AskConfig, EvaluateConfig
from llava_ray.errors import ConfigError
from llava_ray.generate.answer_actor import ModelToLoad
from llava_ray.generate.answers import Actors, Decoding, GeneratedAnswer, stream_answers
from llava_ray.generate.answers_file import AnswersFile
from llava_ray.generate.questions import ModelQuestion
from llava_ray.model.formats.manifest import fingerprint_weights, library_versions
from llava_ray.model.loading import read_pretrained_blueprint
from llava_ray.placement import alive_nodes, pool_resources

_SEPARATOR = "\n"  # between a benchmark's name and a question's id
_SECONDS_BETWEEN_LINES = 5.0
_DATA_CPUS = 0.5  # CPUs of decoding, in addition to the actors
SAME_ANSWERS = ("model_hash", "template", "image_aspect_ratio", "generation", "max_new_tokens")


@dataclass(frozen=True)
class AskedBenchmark:
    """A benchmark to answer: its data, and its answers file."""

    benchmark: Benchmark
    data: Path
    questions: Sequence[BenchmarkQuestion]
    file: AnswersFile

    @cached_property
    def by_id(self) -> Mapping[str, BenchmarkQuestion]:
        """Return the questions by id."""
        return {question.id: question for question in self.questions}

    def key(self, name: str) -> str:
        """Return the id of a question in the job of all benchmarks."""
        return f"{self.benchmark.name}{_SEPARATOR}{name}"

    def unanswered(self) -> list[BenchmarkQuestion]:
        """Return the questions without an answer in the file."""
        return [question for question in self.questions if question.id not in self.file.rows]


def list_benchmarks(config: AskConfig, folder: Path) -> list[AskedBenchmark]:
    """Read every benchmark's questions. Raises ConfigError, DataError."""
    listed = []
    for entry in config.benchmarks:
        name, _, data = entry.partition("=")
        benchmark = make_benchmark(name)
        questions = benchmark.read(Path(data))[: config.max_questions]
        listed.append(
            AskedBenchmark(benchmark, Path(data), questions, AnswersFile(folder / benchmark.name / "answers.jsonl"))
        )
    return listed


def ask(config: EvaluateConfig, model: ModelToLoad, asked: Sequence[AskedBenchmark]) -> None:
    """Answer all open questions; those that are ranked, or have the same token limit, share one stream."""
    streams: dict[tuple[int, bool], list[ModelQuestion]] = defaultdict(list)
    for one in asked:
        for question in one.unanswered():
            made = as_asked(one, question, config.evaluate.ranking)
            streams[token_limit(config.evaluate, one), bool(made.candidates)].append(made)
    spoken = time.monotonic()
    for (limit, _), questions in streams.items():
        decoding = Decoding(limit, config.evaluate.temperature, config.evaluate.batch_size)
        for batch in stream_answers(model, questions, decoding, size_pool(config.actors)):
            save_answers(batch, asked, Path(model.model_path).name)
            if time.monotonic() - spoken > _SECONDS_BETWEEN_LINES:
                spoken = time.monotonic()
                print(_progress(asked), flush=True)
    print(_progress(asked), flush=True)


def save_answers(batch: Sequence[GeneratedAnswer], asked: Sequence[AskedBenchmark], model_id: str) -> None:
    """Write a batch's answers, in LLaVA's form, to the files of their benchmarks."""
    by_name = {one.benchmark.name: one for one in asked}
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for answer in batch:
        name, _, number = answer.id.partition(_SEPARATOR)
        question = by_name[name].by_id[number]
        asked_as = {"question_id": number, "prompt": question.prompt}
        text, metadata = answer.answer, {}
        if answer.likelihoods:
            weighed = [LogLikelihood(*pair) for pair in answer.likelihoods]
            text = find_best_letter(question, weighed)
            metadata = {"mean_log_likelihoods": [round(one.mean, 6) for one in weighed]}
        rows[name].append(asked_as | {"text": text, "answer_id": number, "model_id": model_id, "metadata": metadata})
    for name, some in rows.items():
        by_name[name].file.append(some)


def as_asked(one: AskedBenchmark, question: BenchmarkQuestion, ranking: Ranking | None = None) -> ModelQuestion:
    """Convert a benchmark's question for the actors."""
    images = [image if isinstance(image, bytes) else str(image.resolve()) for image in question.images]
    if ranking is None or not question.options:
        return ModelQuestion(one.key(question.id), question.prompt, images or None)
    shown = ranking_prompt(question, ranking)
    return ModelQuestion(one.key(question.id), shown, images or None, list_candidates(question, ranking))


def size_pool(given: ActorsConfig) -> Actors:
    """Return the pool of actors: one per GPU, or as many as leave CPUs for decoding."""
    total = pool_resources("train")
    room = total["CPU"] - _DATA_CPUS
    alone = given.num_actors and not total["GPU"] and len(alive_nodes()) == 1
    shared = max(1.0, room // given.num_actors) if given.num_actors and alone else 1.0
    cpus = shared if given.cpus_per_actor == "auto" else given.cpus_per_actor
    fitting = int(total["GPU"]) or max(1, int(room / cpus))
    return Actors(given.num_actors or fitting, cpus)


def _progress(asked: Sequence[AskedBenchmark]) -> str:
    """Format the progress of each benchmark."""
    return "  ".join(f"{one.benchmark.name} {len(one.file.rows):,}/{len(one.questions):,}" for one in asked)


def token_limit(config: AskConfig, one: AskedBenchmark) -> int:
    """Return the longest answer of a benchmark in tokens."""
    return config.max_new_tokens or one.benchmark.max_new_tokens


def check_ranking(config: AskConfig, asked: Sequence[AskedBenchmark]) -> None:
    """Check that a benchmark has options if they are to be ranked. Raises ConfigError."""
    if config.ranking and not any(question.options for one in asked for question in one.questions):
        names = ", ".join(one.benchmark.name for one in asked)
        raise ConfigError(f"evaluate.ranking needs questions with options, and {names} has none: leave it out")


def describe_answers(config: AskConfig, model: ModelToLoad) -> dict[str, Any]:
    """Describe the generation of answers: model and its hash, template, generation settings, versions."""
    ranked = f", likeliest {config.ranking}" if config.ranking else ""
    blueprint = read_pretrained_blueprint(**vars(model))
    return {
        "model": model.model_path,
        "model_hash": model_hash(model.model_path),
        "template": blueprint.config.version,
        "image_aspect_ratio": blueprint.image_spec.aspect_ratio,
        "generation": f"temperature {config.temperature:g}, batch {config.batch_size}{ranked}",
        **library_versions(),
    }


def model_hash(path: str) -> str:
    """Hash a model's files to 16 hex digits that change with training; a hub id is its own hash."""
    folder = Path(path)
    if not folder.is_dir():
        return path
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    digest = hashlib.sha256("".join(f"{file.relative_to(folder)} {file.stat().st_size}\n" for file in files).encode())
    for weights in sorted({file.parent for file in files if file.suffix == ".safetensors"}):
        digest.update(fingerprint_weights(weights).encode())
    return digest.hexdigest()[:16]


def check_answer_settings(path: Path, made: Mapping[str, Any], *, has_answers: bool) -> None:
    """Save the description of the answers. Raises ConfigError if the folder has answers of another model or setting."""
    kept = json.loads(path.read_text(encoding="utf-8")) if has_answers and path.exists() else None
    if kept is None:
        path.write_bytes(as_json(dict(made)))
        return
    differing = [key for key in SAME_ANSWERS if kept.get(key) != made[key]]
    if differing:
        raise ConfigError(
            f"{path.parent} has answers made with another {', '.join(differing)}: choose another --run.name, or set "
            "them aside with --run.restart True"
        )
