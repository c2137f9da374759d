"""Recipes: a TOML file plus flags, resolved to one validated config.

Precedence: defaults, then the recipe, then flags. A LLaVA flag given bare (``--mm_projector_lr 2e-5``) is
accepted where its name is unique among the sections.
"""

import contextlib
import hashlib
import io
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
from pydantic import BaseModel, ValidationError

from llava_ray import invocation
from llava_ray.config.booleans import parse_boolean, write_out_booleans
from llava_ray.config.data import DataConfig
from llava_ray.config.evaluate import EvaluateConfig
from llava_ray.config.finetune import FinetuneConfig, PrepareConfig
from llava_ray.config.held_out import SELECTING, HeldOutConfig
from llava_ray.config.preference import follow_objective
from llava_ray.config.schema import ConfigSection, describe_all, describe_fault, dotted_keys, merge_settings
from llava_ray.config.shipped_recipes import find_recipe
from llava_ray.config.sources import LOOKED_AT, SourceConfig, read_sources_flag, split_sources_flag, write_sources_flag
from llava_ray.config.space import SweepConfig
from llava_ray.config.toml_files import read_toml_file
from llava_ray.errors import ConfigError
from llava_ray.reading import wrap_errors

Config = TypeVar("Config", FinetuneConfig, PrepareConfig, EvaluateConfig, SweepConfig)
Settings = TypeVar("Settings", bound=ConfigSection)

# Settings of where and how a run executes, not of what it computes: they may change between start and resume.
NOT_HASHED = ("run", "cluster", "tracking", "held_out", "score", "actors")

# Shown by --help; the flag itself is taken before (``_split_sources``).
_SOURCES_FLAG = tyro.constructors.ConstructorRegistry()


@_SOURCES_FLAG.primitive_rule
def _describe_sources(info: tyro.constructors.PrimitiveTypeInfo) -> Any:
    """Let tyro take a mixture's sources for one value, not for tables with flags of their own."""
    if info.type != tuple[SourceConfig, ...]:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=lambda texts: tuple(read_sources_flag(texts[0])),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda sources: [write_sources_flag(sources)],
    )


_SUBCOMMANDS = {"evaluate": ("run",)}  # the one that takes settings, where there are several

_MAX_SAID = 500  # characters of what is wrong with flags

# LLaVA's flags that have another form here, with the advice for each.
_REPLACED_FLAGS = {
    "per_device_train_batch_size": "use --train.global_batch_size (per-device batch x devices x accumulation)",
    "gradient_accumulation_steps": "use --train.global_batch_size (per-device batch x devices x accumulation)",
    "output_dir": "use --run.storage_path and --run.name",
    "deepspeed": "use --train.zero_stage 0, 1, 2 or 3",
    "dataloader_num_workers": "not needed: Ray Data decodes on the free CPUs",
    "is_multimodal": "not needed: each sample records whether it has images",
    "lora_weight_path": "start from the adapter's bundle: --model.model_name_or_path",
    "save_strategy": "use --train.save_steps",
    "evaluation_strategy": "not supported: evaluate a bundle after training",
}


def load_recipe(schema: type[Config], arguments: Sequence[str], *, ignore: Collection[str] = ()) -> Config:
    """Load ``[RECIPE] --section.key value …`` into a validated ``schema`` whose run has a name.

    ``ignore`` names sections of a recipe that this command does not use. Raises ConfigError for a recipe that cannot be
    read and for unknown, missing or invalid keys; ``--help`` prints every key and exits.
    """
    config = load_settings(schema, arguments, ignore=ignore)
    recipe = _recipe_of(arguments)
    stem = Path(recipe).stem if recipe else command_of(schema)
    return config if config.run.name else config.replaced({"run.name": f"{stem}-{settings_hash(config)}"})


def load_settings(schema: type[Settings], arguments: Sequence[str], *, ignore: Collection[str] = ()) -> Settings:
    """Read ``[RECIPE] --section.key value …`` into a validated ``schema``; as ``load_recipe``, without a run's name."""
    named = _recipe_of(arguments)
    recipe = find_recipe(named, command_of(schema)) if named else None
    values = read_toml(recipe) if recipe else {}
    if "train" in ignore:  # what it would decide of the data
        values = follow_objective(values)
    values = {key: value for key, value in values.items() if key not in ignore}
    flags = [_dotted_flag(schema, argument) for argument in arguments[1 if recipe else 0 :]]
    _check_known_keys(schema, values, recipe or "flags")
    flags, sources = split_sources_flag(flags)
    if sources is not None:
        values = merge_settings(values, {"data": {"sources": sources}})
        _check_known_keys(schema, values, "flags")
    parsed = _read_flags(schema, write_out_booleans(schema, flags), _with_missing(schema, values))
    with wrap_errors(recipe or "flags", "Fix them.", ConfigError):
        given = parsed.model_dump()
    return schema.parsed(given)


def _read_flags(schema: type[Settings], flags: Sequence[str], default: Any) -> Settings:
    """Apply flags to settings that are not validated yet. Raises ConfigError for a flag with an invalid value."""
    output = io.StringIO()
    try:
        with wrap_errors("flags", "--help lists them all.", ConfigError), contextlib.redirect_stderr(output):
            parsed: Settings = tyro.cli(
                schema,
                args=flags,
                default=default,
                config=(tyro.conf.FlagConversionOff,),
                registry=_SOURCES_FLAG,
                use_underscores=True,
                prog=invocation.command(command_of(schema), *_SUBCOMMANDS.get(command_of(schema), ()), "[RECIPE]"),
            )
    except SystemExit as left:
        if not left.code:
            raise  # --help
        words = " ".join(re.sub(r"\x1b\[[\d;]*m|[─-╿]", " ", output.getvalue()).split())
        raise ConfigError(f"flags: {words[:_MAX_SAID]}") from left
    return parsed


def command_of(schema: type[ConfigSection]) -> str:
    """Return the command that takes these settings."""
    return schema.__name__.removesuffix("Config").lower()


def _recipe_of(arguments: Sequence[str]) -> str | None:
    """Return the recipe at the start of a command line, None without one."""
    return arguments[0] if arguments and not arguments[0].startswith("-") else None


def settings_hash(config: ConfigSection) -> str:
    """Return 8 hex digits of all settings in ``config`` that decide what is computed and are not the default."""
    # Sorted keys and JSON values: the hash must not depend on the order of fields or the version of pydantic. Without
    # defaults: it stays when a later version adds a setting.
    settings = hashed_settings(config.model_dump(mode="json", exclude_defaults=True))
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def hashed_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a dump that decide what is computed: ``held_out`` only where a score decides it."""
    hashed = {name: values for name, values in settings.items() if name not in NOT_HASHED}
    held_out, defaults = settings.get("held_out") or {}, HeldOutConfig()
    selecting = {
        key: held_out[key] for key in SELECTING if held_out.get(key, getattr(defaults, key)) != getattr(defaults, key)
    }
    if selecting:
        hashed["held_out"] = selecting
    sources = (settings.get("data") or {}).get("sources")
    if sources and not isinstance(sources, str):  # a text where a message is to name other data
        kept = [{key: value for key, value in source.items() if key not in LOOKED_AT} for source in sources]
        hashed["data"] = {**settings["data"], "sources": kept}
    return hashed


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return ``key: old -> new`` for each hashed setting that differs between two resolved configs."""
    before, after = ({"held_out": {}} | hashed_settings(settings) for settings in (old, new))
    return _list_differences(before, after, "")


def _list_differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str) -> list[str]:
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = (_by_key(settings.get(key)) for settings in (old, new))
        if before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            lines += _list_differences(before, after, f"{prefix}{key}.")
        else:
            lines.append(f"{prefix}{key}: {before!r} -> {after!r}")
    return lines


def _by_key(value: Any) -> Any:
    """Return a list of tables as a table of tables, so that a difference names the one that has it."""
    is_tables = isinstance(value, list | tuple) and value and all(isinstance(one, dict) for one in value)
    return {str(number): one for number, one in enumerate(value)} if is_tables else value


def read_toml(path: str) -> dict[str, Any]:
    """Return a recipe's tables; raise ConfigError when it cannot be read or is not TOML."""
    return read_toml_file(Path(path), "recipe")


def _dotted_flag(schema: type[BaseModel], argument: str) -> str:
    """Add the section to a bare LLaVA flag: ``--bits`` becomes ``--lora.bits``."""
    if not argument.startswith("--") or argument == "--help":
        return argument
    name, equals, value = argument[2:].partition("=")
    if name in _REPLACED_FLAGS:
        raise ConfigError(f"--{name}: {_REPLACED_FLAGS[name]}")
    homes = [key for key in dotted_keys(schema) if key.rpartition(".")[2] == name]
    if "." not in name and len(homes) == 1:
        name = homes[0]
    if name not in set(dotted_keys(schema)):
        raise ConfigError(describe_fault(schema, {"loc": tuple(name.split(".")), "type": "extra_forbidden"}))  # type: ignore[typeddict-item]
    return f"--{name}{equals}{value}"


def _check_known_keys(schema: type[BaseModel], values: dict[str, Any], source: str) -> None:
    """Raise ConfigError for any fault of ``values`` except missing keys, which flags may still supply."""
    try:
        schema.model_validate(values)
    except ValidationError as error:
        details = [one for one in error.errors() if one["type"] != "missing" or _is_in_list(one["loc"])]
        if details:
            raise ConfigError(f"{source}: {describe_all(schema, details)}") from error


def _is_in_list(path: Sequence[int | str]) -> bool:
    """Return whether a key is of a table in a list, which no flag supplies."""
    return any(isinstance(part, int) for part in path)


def _with_missing(schema: type[BaseModel], values: dict[str, Any]) -> Any:
    """Build ``schema`` unvalidated, with tyro's marker where a required key has no value yet."""
    fields: dict[str, Any] = {}
    for name, field in schema.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            fields[name] = _with_missing(annotation, values.get(name, {}))
        elif schema is DataConfig and name == "sources":
            fields[name] = tuple(SourceConfig.model_validate(source) for source in values.get(name, ()))
        elif name in values:
            value = parse_boolean(values[name], annotation)
            fields[name] = tuple(value) if isinstance(value, list) else value  # the schema has tuples, TOML has lists
        else:
            needed = field.is_required() or (schema is DataConfig and name == "data_path" and not values.get("sources"))
            fields[name] = tyro.MISSING if needed else field.get_default()
    return schema.model_construct(**fields)
