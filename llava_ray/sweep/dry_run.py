"""What a sweep would be, before anything is started: trials, steps, memory of the largest, and about how long."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llava_ray.config.schema import flat_settings
from llava_ray.config.sections import FinetuneConfig
from llava_ray.config.space import Space, SweepConfig
from llava_ray.config.sweep_recipes import corners
from llava_ray.data.shards import is_prepared, open_prepared, read_rows
from llava_ray.errors import ConfigError, ModelError
from llava_ray.model.card import Card, count_positions, read_card
from llava_ray.sweep.rounds import plan_rounds
from llava_ray.sweep.sampling import list_settings
from llava_ray.sweep.table import describe
from llava_ray.train.dry_run import MAX_COUNTED_BYTES, count_samples, find_device, tell_memory
from llava_ray.train.memory import GIB, Memory, estimate
from llava_ray.train.pace import Pace, find_pace, in_words
from llava_ray.train.sizing import measure_sizes, run_settings

NUM_LOOKED_AT = 200  # samples whose length is taken for that of all
CHARACTERS_PER_TOKEN = 4
VIEWS_OF_ANYRES = 5
ASSUMED_TEXT = 64  # tokens beside an image, where no sample can be looked at
QUICKSTART = "cache/quickstart/"
TAKEN = {"asha": "ASHA", "hyperband": "HyperBand", "median": "the median rule"}


def describe_sweep(config: SweepConfig, space: Space, gpu_memory_gib: float | None = None) -> Iterator[str]:
    """Yield the sweep in words, a line at a time.

    Raises ModelError for a model whose size cannot be known from here, ConfigError if the largest trial does not fit
    into the GPUs' memory.
    """
    yield from tell_absent(config)
    num_settings = config.sweep.num_trials
    if config.sweep.method != "optuna":
        num_settings = len(list_settings(space, config.sweep, config.base))
    num_trials = num_settings * config.sweep.num_seeds
    seeds = f" x {config.sweep.num_seeds} seeds" if config.sweep.num_seeds > 1 else ""
    yield f"Trials  {num_trials:,} ({config.sweep.method}: {num_settings:,} settings{seeds})"
    steps = steps_of_run(config)
    fewest = most = None
    if steps is None:
        yield "Steps   known when the data have been prepared (python pipelines/prepare.py)"
    else:
        fewest, most = steps_in_all(config, num_settings, steps)
        yield f"Steps   {steps:,} of a whole run, {tell_steps(config, steps, fewest, most)}"
    check_models(config)
    largest, card, memory = largest_trial(config, space)
    named = describe(largest)
    yield f"Largest trial: {named}"
    device = find_device(config, gpu_memory_gib)
    variant = config.base.replaced(largest)
    yield from tell_memory(memory, variant, device)
    yield from tell_time(config, card, fewest, most)
    if device.memory_gib is not None and memory.total > device.memory_gib * GIB:
        raise ConfigError(
            f"a trial with {named} needs {memory.total / GIB:.1f} GiB on each worker's GPU, {device.name} has "
            f"{device.memory_gib:g} GiB: leave those settings out of the space, or take larger GPUs"
        )


def tell_absent(config: SweepConfig) -> Iterator[str]:
    """Name the files and folders of the recipe that are not there yet."""
    named = {
        "data.data_path": config.data.data_path,
        "data.image_folder": config.data.image_folder,
        "held_out.path": config.held_out.path,
        "held_out.images": config.held_out.images,
    }
    for key, path in named.items():
        if path and "://" not in path and not Path(path).expanduser().exists():
            yield f"Attention: there is no {path} here yet ({key})"


def check_models(config: FinetuneConfig) -> None:
    """Raise ModelError for a model that is named by a path to nothing; a hub id has one slash and no dot in front."""
    for key in ("model_name_or_path", "model_base", "vision_tower", "pretrain_mm_mlp_adapter"):
        name = getattr(config.model, key)
        if name and not Path(name).expanduser().exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
            made = (
                " python pipelines/quickstart_sweep.py makes it." if QUICKSTART in name else " Name one that is there."
            )
            raise ModelError(f"there is no {name} (model.{key}).{made}")


def steps_of_run(config: FinetuneConfig) -> int | None:
    """Return the steps of a whole run, if they can be known from here."""
    count = count_samples(config.data.data_path)
    train = config.train
    if count is None:
        return train.max_steps
    count = min(count, config.data.max_samples or count)
    steps = math.ceil(count / train.global_batch_size) * train.num_train_epochs
    return min(steps, train.max_steps or steps)


def steps_in_all(config: SweepConfig, num_settings: int, steps: int) -> tuple[int, int]:
    """Return the fewest and the most steps that the trials take together."""
    search = config.sweep
    grace = min(search.grace_steps or config.train.save_steps, steps)
    if search.scheduler == "halving":
        left, before, total = num_settings, 0, 0
        for one in plan_rounds(search, steps, grace):
            total += left * search.num_seeds * (one.until - before)
            left, before = max(1, int(one.share * num_settings + 1e-9)), one.until
        return total, total
    most = num_settings * search.num_seeds * steps
    # One trial goes to the end whatever the others do.
    return (
        most if search.scheduler == "none" else most - (num_settings * search.num_seeds - 1) * (steps - grace)
    ), most


def tell_steps(config: SweepConfig, steps: int, fewest: int, most: int) -> str:
    """Say how many steps all trials take."""
    whole = f"{fewest:,} in all"
    if config.sweep.scheduler == "halving":
        rounds = plan_rounds(config.sweep, steps, min(config.sweep.grace_steps or config.train.save_steps, steps))
        return f"{whole} in {len(rounds)} rounds, to step {', '.join(str(one.until) for one in rounds)}"
    if fewest == most:
        return whole
    return f"{fewest:,} to {most:,} in all ({TAKEN[config.sweep.scheduler]} ends trials early)"


def largest_trial(config: SweepConfig, space: Space) -> tuple[dict[str, Any], Card, Memory]:
    """Return the corner of the space that needs the most memory, its model and what it needs. Raises ModelError."""
    found: tuple[dict[str, Any], Card, Memory] | None = None
    cards: dict[str, Card] = {}
    for settings in corners(space):
        variant = config.base.replaced(settings)
        model = str([value for key, value in flat_settings(variant).items() if key.startswith(("model.", "lora."))])
        if model not in cards:
            cards[model] = read_card(variant)
        memory = estimate(measure_sizes(cards[model]), run_settings(variant))
        if found is None or memory.total > found[2].total:
            found = settings, cards[model], memory
    assert found is not None  # a space has at least one dimension
    return found


def tell_time(config: SweepConfig, card: Card, fewest: int | None, most: int | None) -> Iterator[str]:
    """Say about how long the sweep takes."""
    pace = find_pace(config.cluster)
    tokens = tokens_per_sample(config, card)
    if pace is None or fewest is None or most is None:
        steps = "the number of steps is known when the data have been prepared"
        yield f"Time    not known: {steps if pace else 'which GPU it is (cluster.accelerator_type)'}"
        return
    step = seconds_per_step(config, card, tokens, pace)
    at_once = config.sweep.max_concurrent_trials or 1
    low, high = (in_words(step * steps / at_once) for steps in (fewest, most))
    span = low if low == high else f"{low} to {high}"
    trials = f"{at_once:,} trials" if at_once > 1 else "one trial"
    yield (
        f"Time    about {span} at {pace.name}, {trials} at a time, {in_words(step)} a step of {tokens:,.0f} tokens a "
        "sample; starting trials and judging them come on top. It counts operations: small models take longer."
    )


def seconds_per_step(config: FinetuneConfig, card: Card, tokens: float, pace: Pace) -> float:
    """Return the time of an optimiser step: 6 operations a parameter that learns and token, 4 for one that does not."""
    parts = [part for part in card.parts if part.name != "vision_tower"]
    learning = sum(part.num_trainable for part in parts)
    frozen = sum(part.num_total for part in parts) - learning
    num_tokens = config.train.global_batch_size * tokens
    flops = num_tokens * (6 * learning + 4 * frozen)
    if config.data.vision_features == "inline":
        tower = sum(part.num_total for part in card.parts if part.name == "vision_tower")
        flops += 2 * tower * config.train.global_batch_size * count_positions(card.tower, card.image_side)
    workers = config.cluster.num_workers if config.cluster.accelerator_type else 1  # a CPU is measured as a whole
    return pace.seconds(flops / workers)


def tokens_per_sample(config: FinetuneConfig, card: Card) -> float:
    """Return about how many tokens a sample has, by the first ones that can be looked at from here."""
    looked_at = first_samples(config.data.data_path) or [(ASSUMED_TEXT * CHARACTERS_PER_TOKEN, 1)]
    views = VIEWS_OF_ANYRES if config.data.image_aspect_ratio == "anyres" else 1
    image = count_positions(card.tower, card.image_side) * views
    lengths = [
        min(characters / CHARACTERS_PER_TOKEN + images * image, config.train.model_max_length)
        for characters, images in looked_at
    ]
    return sum(lengths) / len(lengths)


def first_samples(data_path: str) -> list[tuple[int, int]]:
    """Return the numbers of characters and images of the first samples of a prepared folder or a small JSON file."""
    if "://" in data_path:
        return []
    if is_prepared(data_path):
        prepared = open_prepared(data_path)
        rows = range(min(NUM_LOOKED_AT, prepared.shards[0].num_rows)) if prepared.shards else range(0)
        if not rows:
            return []
        table = read_rows(prepared.path, prepared.shards[0].name, list(rows), ["turns", "widths"])
        return [
            (sum(len(turn["value"]) for turn in row["turns"]), len(row["widths"] or ())) for row in table.to_pylist()
        ]
    path = Path(data_path).expanduser()
    if not path.is_file() or path.stat().st_size > MAX_COUNTED_BYTES or path.suffix not in (".json", ".jsonl"):
        return []
    text = path.read_text(encoding="utf-8-sig")
    records = [json.loads(line) for line in text.split("\n") if line.strip()] if path.suffix == ".jsonl" else []
    return [_lengths(record) for record in (records or json.loads(text))[:NUM_LOOKED_AT] if isinstance(record, dict)]


def _lengths(record: dict[str, Any]) -> tuple[int, int]:
    turns: Sequence[Any] = record.get("conversations") or record.get("messages") or ()
    said = sum(len(str(turn.get("value") or turn.get("content") or "")) for turn in turns if isinstance(turn, dict))
    images = record.get("image") or record.get("images") or ()
    return said, 1 if isinstance(images, str) else len(images)
