"""The dry run of an evaluation: questions, batches, memory and estimated time."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.benchmark import LETTER, LETTER_CN, SHORT, Benchmark, Question
from evals.catalogue import make_benchmark
from evals.published import format_count, whole_set
from evals.scoring import check_truths
from llava_ray.config.data import DataConfig
from llava_ray.config.evaluate import AskConfig, EvaluateConfig
from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.model import ModelConfig
from llava_ray.config.recipes import load_recipe
from llava_ray.errors import ConfigError, DataError
from pipelines.places import exists

if TYPE_CHECKING:
    from llava_ray.model.summary import ModelSummary
    from llava_ray.train.planning.pace import Pace

_CHARACTERS_PER_TOKEN = 4
_FEW_TOKENS, _MANY_TOKENS = 4, 150  # of an answer of a word or a letter, and of one in sentences
_PROCESS_GIB = 0.8  # Python, torch and Ray in an actor
_GPU_GIB = 1.5  # CUDA's context and what its allocator cannot use


@dataclass(frozen=True)
class BenchmarkPart:
    """The open questions of a benchmark."""

    benchmark: Benchmark
    questions: Sequence[Question]
    waiting: Sequence[Question]
    limit: int
    """Most new tokens."""

    @property
    def num_ranked(self) -> int:
        """Return the number of questions with options to rank."""
        return sum(bool(question.options) for question in self.waiting)


def describe_evaluation(arguments: Sequence[str], gpu_memory_gib: float | None = None) -> Iterator[str]:
    """Yield the description of an evaluation, a line at a time.

    Raises DataError for data that are not there or not whole, ModelError for a model whose size cannot be known from
    here, ConfigError if it does not fit into the GPU's memory.
    """
    config = load_recipe(EvaluateConfig, arguments)
    parts = _read_parts(config)
    for part in parts:
        yield from _tell_part(part, config)
    num_batches = _count_batches(parts, config)
    waiting = sum(len(part.waiting) for part in parts)
    yield f"In all    {waiting:,} questions to ask, batches: {num_batches:,} of up to {config.evaluate.batch_size}"
    if any(len(part.questions) < (whole_set(part.benchmark.name, len(part.questions)) or 0) for part in parts):
        yield "          Where not the whole set is asked, no published figure stands beside the score."
    yield from _tell_model(config, parts, num_batches, gpu_memory_gib)


def _read_parts(config: EvaluateConfig) -> list[BenchmarkPart]:
    """Read the questions that are not answered yet. Raises DataError."""
    asking, parts = config.evaluate, []
    folder = Path(config.run.storage_path, str(config.run.name))
    for entry in asking.benchmarks:
        name, _, data = entry.partition("=")
        benchmark = make_benchmark(name)
        if not Path(data).is_dir():
            raise DataError(f"there is no folder {data}; evals/README.md says what {benchmark.title} needs in it.")
        questions = benchmark.read(Path(data))[: asking.max_questions]
        check_truths(benchmark, questions)
        answered = set() if config.run.restart else _read_ids(folder / benchmark.name / "answers.jsonl")
        waiting = [question for question in questions if question.id not in answered]
        parts.append(BenchmarkPart(benchmark, questions, waiting, asking.max_new_tokens or benchmark.max_new_tokens))
    for entry in config.score.reviews:
        if not Path(entry.partition("=")[2]).is_file():
            raise DataError(f"score.reviews: there is no file {entry.partition('=')[2]}")
    return parts


def _read_ids(path: Path) -> set[str]:
    """Return the ids of answered questions in a file, without an incomplete last line."""
    if not path.exists():
        return set()
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return {str(json.loads(line)["question_id"]) for line in lines if line.strip()}


def _tell_part(part: BenchmarkPart, config: EvaluateConfig) -> Iterator[str]:
    """Describe a benchmark's open questions, and limits of its score."""
    num, name = len(part.questions), part.benchmark.name
    answered = num - len(part.waiting)
    how = f"at most {part.limit:,} new tokens each"
    if config.evaluate.ranking and part.num_ranked:
        how = f"{part.num_ranked:,} with options to rank by their {config.evaluate.ranking}, others {how}"
    suffix = f", {answered:,} of them answered already" if answered else ""
    yield f"{name:<16}{format_count(name, num, num)} questions{suffix}; {how}"
    files = [file for question in part.waiting for file in question.images if isinstance(file, Path)]
    absent = [file for file in files if not file.is_file()]
    if absent:
        yield f"{'':<16}{len(absent):,} images are not there, the first: {absent[0]}"
    if not any(question.truths for question in part.questions):
        yield f"{'':<16}without right answers here: a server scores the submission file"
    elif config.score.profile in part.benchmark.needs_judge and not _named_review(config, name):
        yield f"{'':<16}needs a judge's reviews to be scored (score.reviews)"


def _named_review(config: EvaluateConfig, name: str) -> bool:
    """Return whether a benchmark's reviews are configured."""
    return any(make_benchmark(entry.partition("=")[0]).name == name for entry in config.score.reviews)


def _count_batches(parts: Sequence[BenchmarkPart], config: EvaluateConfig) -> int:
    """Return the batches: questions with the same token limit share a stream, ranked ones another."""
    streams: Counter[tuple[int, bool]] = Counter()
    for part in parts:
        ranked = part.num_ranked if config.evaluate.ranking else 0
        streams[part.limit, True] += ranked
        streams[part.limit, False] += len(part.waiting) - ranked
    return sum(math.ceil(num / config.evaluate.batch_size) for num in streams.values())


def _tell_model(
    config: EvaluateConfig, parts: Sequence[BenchmarkPart], num_batches: int, gpu_memory_gib: float | None
) -> Iterator[str]:
    """Yield the model's size, an actor's memory and the estimated time. Raises ModelError or ConfigError."""
    from llava_ray.model.summary import summarize_model
    from llava_ray.train.planning.dry_run import find_device
    from llava_ray.train.planning.pace import find_pace

    asking = config.evaluate
    run = FinetuneConfig(model=_read_model_config(asking), data=DataConfig(data_path="-"), cluster=config.cluster)
    card = summarize_model(run)
    pace, device = find_pace(config.cluster), find_device(run, gpu_memory_gib)
    on_cpu = pace is not None and config.cluster.accelerator_type is None and gpu_memory_gib is None
    width = 4 if on_cpu else 2
    needed = _memory(card, config, parts, width) | (
        {"process": _PROCESS_GIB} if on_cpu else {"CUDA, allocator": _GPU_GIB}
    )
    num_actors = config.actors.num_actors
    actors = f"{num_actors:,} actors" if num_actors else "an actor for as many CPUs" if on_cpu else "an actor a GPU"
    yield f"Model     {asking.model_path}, {sum(part.num_total for part in card.parts):,} parameters"
    yield f"Memory of each actor ({actors}, {'fp32 on the CPU' if on_cpu else 'bf16 on a GPU'}):"
    yield from (f"  {name:<28}{value:>8.2f} GiB" for name, value in needed.items())
    total = sum(needed.values())
    yield f"  {'total, about':<28}{total:>8.2f} GiB"
    if device.memory_gib is not None and not on_cpu:
        yield f"  {device.name:<28}{device.memory_gib:>8.2f} GiB"
    yield _tell_time(card, config, parts, num_batches, pace if gpu_memory_gib is None or not on_cpu else None, width)
    if device.memory_gib is not None and not on_cpu and total > device.memory_gib:
        raise ConfigError(
            f"the model needs about {total:.1f} GiB on a GPU, {device.name} has {device.memory_gib:g} GiB: lower "
            "evaluate.batch_size, or take a larger one"
        )


def _read_model_config(asking: AskConfig) -> ModelConfig:
    """Return the settings under which the model is asked: those that its folder states; of a hub id what is given."""
    from llava_ray.model.formats.part_sources import find_layout
    from llava_ray.model.loading import pretrained_config

    if exists(asking.model_path):
        _, layout = find_layout(asking.model_path, weights=False)
        return pretrained_config(layout, asking.model_path, asking.model_base, asking.vision_tower, asking.version)
    return ModelConfig(
        model_name_or_path=asking.model_path, model_base=asking.model_base, vision_tower=asking.vision_tower
    )


def _memory(
    card: "ModelSummary", config: EvaluateConfig, parts: Sequence[BenchmarkPart], width: int
) -> dict[str, float]:
    """Estimate an actor's memory in GiB: weights, KV cache of the longest batch, and activations."""
    text: Any = card.language_model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_width = text.to_dict().get("head_dim") or text.hidden_size // text.num_attention_heads
    prompt = max((_prompt_tokens(q, card) for part in parts for q in part.waiting), default=0.0)
    longest = prompt + max((part.limit for part in parts), default=0)
    batch = config.evaluate.batch_size
    cache = batch * longest * 2 * text.num_hidden_layers * heads * head_width * width
    activations = batch * prompt * (4 * text.hidden_size + 2 * text.intermediate_size) * width
    activations += batch * text.vocab_size * 4
    weights = sum(part.num_total for part in card.parts) * width
    gib = {"weights": weights, "keys and values": cache, "activations of a batch": activations}
    return {name: value / 2**30 for name, value in gib.items()}


def _tell_time(
    card: "ModelSummary",
    config: EvaluateConfig,
    parts: Sequence[BenchmarkPart],
    num_batches: int,
    pace: "Pace | None",
    width: int,
) -> str:
    """Format the estimated time of the questions."""
    from llava_ray.train.planning.pace import format_duration

    if pace is None:
        return "Time      not known: which GPU answers is not known here (cluster.accelerator_type)"
    language = sum(part.num_total for part in card.parts if part.name != "vision_tower")
    tower = sum(part.num_total for part in card.parts if part.name == "vision_tower")
    reading = sum(
        2 * language * _prompt_tokens(q, card) + 2 * tower * _image_tokens(card) * len(q.images)
        for part in parts
        for q in part.waiting
    )
    batch = config.evaluate.batch_size
    token = pace.seconds(2 * language * batch, language * width)  # of a whole batch
    few, most = (
        sum(math.ceil(len(part.waiting) / batch) * _expected_tokens(part, longest=longest) for part in parts)
        for longest in (False, True)
    )
    actors = config.actors.num_actors or 1
    low, high = (format_duration((pace.seconds(reading) + token * num) / actors) for num in (few, most))
    share = f"{actors:,} actors" if actors > 1 else "one actor"
    return (
        f"Time      about {low} ({high} if every answer takes all its tokens), {share} at {pace.name}; starting and "
        "loading come on top. It counts operations: small models take longer."
    )


def _expected_tokens(part: BenchmarkPart, *, longest: bool) -> int:
    """Estimate the tokens of a batch's answers: few for words or letters, many for sentences."""
    short = all(question.prompt.endswith((SHORT, LETTER, LETTER_CN)) for question in part.waiting[:100])
    return part.limit if longest else min(part.limit, _FEW_TOKENS if short else _MANY_TOKENS)


def _prompt_tokens(question: Question, card: "ModelSummary") -> float:
    """Estimate the tokens of a question and its images."""
    return len(question.prompt) / _CHARACTERS_PER_TOKEN + _image_tokens(card) * len(question.images)


def _image_tokens(card: "ModelSummary") -> int:
    """Return the tokens of an image in one view."""
    from llava_ray.model.summary import count_positions

    return count_positions(card.tower, card.image_side)
