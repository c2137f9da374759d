"""Boolean flags in all usual spellings: true, yes, on, 1 and their opposites, in any letter case."""

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import is_dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from llava_ray.errors import ConfigError
from llava_ray.reading import short_repr

_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_NOTHING = ("none", "null")
_EXPECTED = "true or false (yes, no, on, off, 1 and 0 are understood)"


def write_out_booleans(schema: type[BaseModel], flags: Sequence[str]) -> list[str]:
    """Return dotted flags with each boolean of ``schema`` written as True or False, as tyro expects.

    A boolean flag without a value is true. Raises ConfigError for a value that is neither.
    """
    spelt: list[str] = []
    for flag, values in _grouped(flags):
        key, equals, value = flag.removeprefix("--").partition("=")
        annotation = _annotation_of(schema, key)
        if bool not in _alternatives(annotation):
            spelt += [flag, *values]
        elif equals:
            spelt += [f"--{key}={_word_for(key, value, annotation)}", *values]
        else:
            first, *rest = values or ["true"]
            spelt += [f"--{key}", _word_for(key, first, annotation), *rest]
    return spelt


def _grouped(flags: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each flag with the values that follow it; arguments before all flags form a group of their own."""
    group: list[str] = []
    for argument in flags:
        if argument.startswith("--") and group:
            yield group[0], group[1:]
            group = []
        group.append(argument)
    if group:
        yield group[0], group[1:]


def _annotation_of(schema: type[BaseModel], key: str) -> Any:
    """Return the type of a dotted key, None where there is no such key."""
    annotation: Any = schema
    for part in key.split("."):
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return None
        field = annotation.model_fields.get(part)
        annotation = field.annotation if field else None
    return annotation


def _alternatives(annotation: Any) -> list[Any]:
    """Return the types of a union and the values of a literal as one flat list."""
    if annotation is None:
        return []
    parts = get_args(annotation)
    if get_origin(annotation) is Literal:
        return list(parts)
    if parts and not isinstance(annotation, type):
        return [one for part in parts for one in _alternatives(part)] + [None] * (type(None) in parts)
    return [annotation]


def parse_boolean(value: Any, annotation: Any) -> Any:
    """Convert a recipe's word or number for a boolean setting to true or false; return other values unchanged."""
    if not isinstance(value, str | int) or bool not in _alternatives(annotation):
        return value
    return _WORDS.get(str(value).lower(), value)


def _word_for(key: str, value: str, annotation: Any) -> str:
    """Return a boolean flag's value as tyro expects it. Raises ConfigError."""
    word, others = value.strip().lower(), _alternatives(annotation)
    if word in _WORDS:
        return str(_WORDS[word])
    if None in others and word in _NOTHING:
        return "None"
    named = [other for other in others if isinstance(other, str)]
    if word in named:
        return word
    raise ConfigError(f"{key!r} = {short_repr(value)}: expected {', '.join([*map(repr, named), _EXPECTED])}")


def strip_boolean_values(arguments: Sequence[str], names: Collection[str]) -> list[str]:
    """Return a command line in which each of the named boolean flags has no value, or its ``--no-`` form.

    For commands whose boolean flags take no value: ``--json yes`` is ``--json``, and ``--json=0`` is ``--no-json``.
    """
    bare: list[str] = []
    known = {name.replace("-", "_") for name in names}
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or name.replace("-", "_") not in known:
            bare.append(argument)
            continue
        if not equals:
            value = waiting.pop(0) if waiting and waiting[0].lower() in _WORDS else "true"
        if value.lower() not in _WORDS:
            raise ConfigError(f"--{name} = {short_repr(value)}: expected {_EXPECTED}")
        bare.append(f"--{name}" if _WORDS[value.lower()] else f"--no-{name}")
    return bare


def find_boolean_parameters(*callables: Callable[..., Any]) -> set[str]:
    """Return the names of all boolean parameters, fields of dataclass parameters included."""
    names: set[str] = set()
    for one in callables:
        for name, parameter in inspect.signature(one).parameters.items():
            annotation = getattr(parameter.annotation, "__origin__", parameter.annotation)  # of an Annotated
            if annotation is bool:
                names.add(name)
            elif isinstance(annotation, type) and is_dataclass(annotation):
                names |= find_boolean_parameters(annotation)
    return names
