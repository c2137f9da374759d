#!/usr/bin/env python
"""Check raw records and write them as Parquet shards: once, for every run that follows.

python pipelines/prepare.py --data.data_path mix665k.json --data.image_folder images
python pipelines/prepare.py RECIPE --data.cache_dir s3://bucket/llava
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llava_ray.config.finetune import PrepareConfig
from llava_ray.config.mixtures import named_places
from llava_ray.config.recipes import load_recipe
from llava_ray.invocation import command
from pipelines.command import run_command
from pipelines.places import check_data_places

if TYPE_CHECKING:
    from llava_ray.data.shards import PreparedData

# Sections of a fine-tuning recipe that do not concern data.
_OTHER_SECTIONS = ("model", "train", "lora", "held_out", "preference", "grpo", "tracking")


def main(arguments: Sequence[str]) -> "PreparedData":
    """Prepare the data and print the results."""
    config = load_recipe(PrepareConfig, arguments, ignore=_OTHER_SECTIONS)
    check_data_places(config.data)
    from llava_ray.data.preparation import check_data, prepare_data
    from llava_ray.runtime import connected
    from llava_ray.shared_storage import Places

    check_data(config.data)
    shared = Places.of([config.data.cache_dir], list(named_places(config.data).values()))
    with connected(config.cluster, shared, storage_path=config.run.storage_path):
        prepared = prepare_data(config.data)
    for source, own in zip(config.data.sources, prepared.sources, strict=True):
        print(f"Source {source.name}")
        _print_prepared(own)
    if not prepared.sources:
        _print_prepared(prepared)
        print(f"Train on it: {command('finetune')} RECIPE --data.data_path {prepared.path}")
    return prepared


def _print_prepared(prepared: "PreparedData") -> None:
    """Print counts, reasons, sizes and paths."""
    from llava_ray.data.record_keys import describe_ignored

    num_records = prepared.num_samples + prepared.num_rejected
    print("Prepared before" if prepared.reused else "Prepared")
    print(f"  samples    {prepared.num_samples:>12,}")
    print(f"  rejected   {prepared.num_rejected:>12,}  ({prepared.num_rejected / num_records:.2%})")
    for reason, count in sorted(prepared.rejected_reasons.items(), key=lambda item: -item[1]):
        print(f"    {reason:<18}{count:>5,}")
    if prepared.reused and prepared.ignored_keys:  # otherwise printed during preparation
        print(f"  {describe_ignored(prepared.ignored_keys)}")
    print(f"  shards     {len(prepared.shards):>12,}")
    print(f"  size       {prepared.num_bytes / 1e6:>12,.1f} MB")
    print(f"  data hash  {prepared.data_hash[:12]:>12}")
    print(f"  folder     {prepared.path}")
    if prepared.num_rejected:
        print(f"  why        {prepared.rejected_path}")


if __name__ == "__main__":
    run_command(main)
