"""The dry run of a sweep: trials, steps, memory of the largest trial, and an estimate of the time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.mixtures import learnt_paths, named_places
from llava_ray.config.schema import flat_settings
from llava_ray.config.space import Space, SweepConfig
from llava_ray.config.sweep_recipes import corners
from llava_ray.data.first_look import measure_first_samples
from llava_ray.errors import ConfigError
from llava_ray.invocation import command
from llava_ray.model.summary import ModelSummary, count_positions, summarize_model
from llava_ray.sweep.rounds import plan_rounds
from llava_ray.sweep.sampling import list_settings
from llava_ray.sweep.table import describe_settings
from llava_ray.train.planning.dry_run import count_of_run, find_device, steps_of_run, tell_memory
from llava_ray.train.planning.memory import GIB, Memory, estimate_memory
from llava_ray.train.planning.pace import Pace, find_pace, format_duration
from llava_ray.train.planning.sizing import measure_sizes, run_settings

_CHARACTERS_PER_TOKEN = 4
_VIEWS_OF_ANYRES = 5
_ASSUMED_TEXT = 64  # text tokens of a sample, where none can be read
_SCHEDULER_NAMES = {"asha": "ASHA", "hyperband": "HyperBand", "median": "the median rule"}


def describe_sweep(config: SweepConfig, space: Space, gpu_memory_gib: float | None = None) -> Iterator[str]:
    """Yield the description of a sweep, a line at a time.

    Raises ModelError for a model whose size cannot be known from here, ConfigError if the largest trial does not fit
    into the GPUs' memory.
    """
    yield from _list_missing(config)
    num_settings = config.sweep.num_trials
    if config.sweep.method != "optuna":
        num_settings = len(list_settings(space, config.sweep, config.base))
    num_trials = num_settings * config.sweep.num_seeds
    seeds = f" x {config.sweep.num_seeds} seeds" if config.sweep.num_seeds > 1 else ""
    yield f"Trials  {num_trials:,} ({config.sweep.method}: {num_settings:,} settings{seeds})"
    steps = steps_of_run(config, count_of_run(config))
    fewest = most = None
    if steps is None:
        yield f"Steps   known when the data have been prepared ({command('prepare')})"
    else:
        fewest, most = count_all_steps(config, num_settings, steps)
        yield f"Steps   {steps:,} of a whole run, {_describe_steps(config, steps, fewest, most)}"
    largest, summary, memory = find_largest_trial(config, space)
    named = describe_settings(largest)
    yield f"Largest trial: {named}"
    device = find_device(config, gpu_memory_gib)
    variant = config.base.replaced(largest)
    yield from tell_memory(memory, variant, device)
    yield from _describe_time(config, summary, fewest, most)
    if device.memory_gib is not None and memory.total > device.memory_gib * GIB:
        raise ConfigError(
            f"a trial with {named} needs {memory.total / GIB:.1f} GiB on each worker's GPU, {device.name} has "
            f"{device.memory_gib:g} GiB: leave those settings out of the space, or take larger GPUs"
        )


def _list_missing(config: SweepConfig) -> Iterator[str]:
    """Yield a warning for each file or folder of the recipe that does not exist yet."""
    named = {
        **named_places(config.data),
        "held_out.path": config.held_out.path,
        "held_out.images": config.held_out.images,
    }
    for key, path in named.items():
        if path and "://" not in path and not Path(path).expanduser().exists():
            yield f"Warning: {path} does not exist yet ({key})"


def count_all_steps(config: SweepConfig, num_settings: int, steps: int) -> tuple[int, int]:
    """Compute the fewest and the most steps of all trials together."""
    search = config.sweep
    grace = min(search.grace_steps or config.train.save_steps, steps)
    if search.scheduler == "halving":
        left, before, total = num_settings, 0, 0
        for one in plan_rounds(search, steps, grace):
            total += left * search.num_seeds * (one.until - before)
            left, before = max(1, int(one.share * num_settings + 1e-9)), one.until
        return total, total
    most = num_settings * search.num_seeds * steps
    # At least one trial runs to the end.
    return (
        most if search.scheduler == "none" else most - (num_settings * search.num_seeds - 1) * (steps - grace)
    ), most


def _describe_steps(config: SweepConfig, steps: int, fewest: int, most: int) -> str:
    """Describe the number of steps of all trials."""
    whole = f"{fewest:,} in all"
    if config.sweep.scheduler == "halving":
        rounds = plan_rounds(config.sweep, steps, min(config.sweep.grace_steps or config.train.save_steps, steps))
        return f"{whole} in {len(rounds)} rounds, to step {', '.join(str(one.until) for one in rounds)}"
    if fewest == most:
        return whole
    return f"{fewest:,} to {most:,} in all ({_SCHEDULER_NAMES[config.sweep.scheduler]} ends trials early)"


def find_largest_trial(config: SweepConfig, space: Space) -> tuple[dict[str, Any], ModelSummary, Memory]:
    """Return the corner of the space with the largest memory, its model and memory. Raises ModelError."""
    found: tuple[dict[str, Any], ModelSummary, Memory] | None = None
    cards: dict[str, ModelSummary] = {}
    for settings in corners(space):
        variant = config.base.replaced(settings)
        model = str([value for key, value in flat_settings(variant).items() if key.startswith(("model.", "lora."))])
        if model not in cards:
            cards[model] = summarize_model(variant)
        memory = estimate_memory(measure_sizes(cards[model]), run_settings(variant))
        if found is None or memory.total > found[2].total:
            found = settings, cards[model], memory
    assert found is not None  # a space has at least one dimension
    return found


def _describe_time(config: SweepConfig, summary: ModelSummary, fewest: int | None, most: int | None) -> Iterator[str]:
    """Yield an estimate of the sweep's time."""
    pace = find_pace(config.cluster)
    tokens = _tokens_per_sample(config, summary)
    if pace is None or fewest is None or most is None:
        steps = "the number of steps is known when the data have been prepared"
        yield f"Time    unknown: {steps if pace else 'which GPU it is (cluster.accelerator_type)'}"
        return
    step = _seconds_per_step(config, summary, tokens, pace)
    at_once = config.sweep.max_concurrent_trials or 1
    low, high = (format_duration(step * steps / at_once) for steps in (fewest, most))
    span = low if low == high else f"{low} to {high}"
    trials = f"{at_once:,} trials" if at_once > 1 else "one trial"
    yield (
        f"Time    about {span} at {pace.name}, {trials} at a time, {format_duration(step)} a step of {tokens:,.0f} "
        "tokens a sample, without start and evaluation of trials. It is a count of FLOPs: small models take longer."
    )


def _seconds_per_step(config: FinetuneConfig, summary: ModelSummary, tokens: float, pace: Pace) -> float:
    """Compute the seconds of an optimiser step: 6 FLOPs per trainable parameter and token, 4 per frozen one."""
    parts = [part for part in summary.parts if part.name != "vision_tower"]
    trainable = sum(part.num_trainable for part in parts)
    frozen = sum(part.num_total for part in parts) - trainable
    num_tokens = config.train.global_batch_size * tokens
    flops = num_tokens * (6 * trainable + 4 * frozen)
    if config.data.vision_features == "inline":
        tower = sum(part.num_total for part in summary.parts if part.name == "vision_tower")
        flops += 2 * tower * config.train.global_batch_size * count_positions(summary.tower, summary.image_side)
    workers = config.cluster.num_workers if config.cluster.accelerator_type else 1  # a CPU is measured as a whole
    return pace.seconds(flops / workers)


def _tokens_per_sample(config: FinetuneConfig, summary: ModelSummary) -> float:
    """Return about how many tokens a sample has, by the first ones that can be looked at from here."""
    first = next(iter(learnt_paths(config.data).values()))
    samples = measure_first_samples(first) or [(_ASSUMED_TEXT * _CHARACTERS_PER_TOKEN, 1)]
    views = _VIEWS_OF_ANYRES if config.data.image_aspect_ratio == "anyres" else 1
    image = count_positions(summary.tower, summary.image_side) * views
    lengths = [
        min(characters / _CHARACTERS_PER_TOKEN + images * image, config.train.model_max_length)
        for characters, images in samples
    ]
    return sum(lengths) / len(lengths)
