"""The base class of settings sections: closed, frozen, validated again when changed."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from llava_ray.errors import ConfigError
from llava_ray.reading import INT_BITS, MAX_SHOWN, short_repr

Fraction = Annotated[float, Field(ge=0, le=1)]
_MAX_FAULTS = 10


class ConfigSection(BaseModel):
    """Settings that reject unknown keys and assignment."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def fits_in_64_bits(cls, value: Any) -> Any:
        """Reject integers beyond 64 bits: they would pass validation and overflow later, far from their source."""
        if isinstance(value, int) and value.bit_length() > INT_BITS:
            raise ValueError("expected a number of at most 64 bits")
        return value

    def replaced(self, changes: Mapping[str, Any]) -> Self:
        """Return a copy with dotted keys changed, validated again, e.g. ``{"train.learning_rate": 1e-5}``.

        Raises ConfigError for an unknown key or an invalid value.
        """
        return self.parsed(merge_settings(self.model_dump(), nest_keys(changes)))

    @classmethod
    def parsed(cls, values: Mapping[str, Any], source: str = "") -> Self:
        """Validate ``values``; raise ConfigError that names each key, what was found and what was expected."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            where = f"{source}: " if source else ""
            raise ConfigError(where + describe_all(cls, error.errors())) from error


def describe_all(schema: type[BaseModel], details: Sequence[ErrorDetails]) -> str:
    """Format pydantic's errors, the first few of many."""
    lines = [describe_fault(schema, detail) for detail in details[:_MAX_FAULTS]]
    return "; ".join(lines) + (f"; and {len(details) - _MAX_FAULTS} more" if len(details) > _MAX_FAULTS else "")


def describe_fault(schema: type[BaseModel], detail: ErrorDetails) -> str:
    """Format one pydantic error: the key, the value found, and the remedy."""
    path = ".".join(str(part) for part in detail["loc"])[:MAX_SHOWN]
    if detail["type"] == "extra_forbidden":
        leaves = _keys_beside(schema, detail["loc"])
        near = difflib.get_close_matches(path.rpartition(".")[2], leaves, n=1)
        hint = f"did you mean {leaves[near[0]]!r}?" if near else "--help lists all keys"
        return f"unknown key {path!r}; {hint}"
    if detail["type"] == "missing":
        path = ".".join(filter(None, [path, *detail.get("ctx", {}).values()]))
        return f"{path!r} is required and was not given; set it in the recipe or as --{path}"
    message = detail["msg"].removeprefix("Value error, ")
    return f"{path!r} = {short_repr(detail['input'])}: {message[:MAX_SHOWN]}" if path else message


def _keys_beside(schema: type[BaseModel], path: Sequence[int | str]) -> dict[str, str]:
    """Return what may stand in an unknown key's place: all settings by their last parts, or the keys of its table."""
    for place, part in enumerate(path):
        if isinstance(part, int):  # a table of a list
            table = _table_of(schema, path[:place])
            return {name: name for name in table.model_fields} if table else {}
    return {key.rpartition(".")[2]: key for key in dotted_keys(schema)}


def _table_of(schema: type[BaseModel], path: Sequence[int | str]) -> type[BaseModel] | None:
    """Return the schema of the tables in a list of tables, None where the path leads to none."""
    annotation: Any = schema
    for part in path:
        fields = getattr(annotation, "model_fields", {})
        annotation = fields[part].annotation if part in fields else None
    return next((one for one in get_args(annotation) if isinstance(one, type) and issubclass(one, BaseModel)), None)


def dotted_keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield every settable key of ``schema`` in dotted form."""
    for name, field in schema.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from dotted_keys(annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def nest_keys(dotted: Mapping[str, Any]) -> dict[str, Any]:
    """Turn ``{"a.b": 1}`` into ``{"a": {"b": 1}}``."""
    tree: dict[str, Any] = {}
    for key, value in dotted.items():
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def merge_settings(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Merge ``changes`` into ``base``, section by section."""
    result = dict(base)
    for key, value in changes.items():
        below = result.get(key)
        result[key] = merge_settings(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return result


def flat_settings(config: BaseModel) -> dict[str, Any]:
    """Return every setting of ``config`` by its dotted key."""
    values: dict[str, Any] = {}
    for key in dotted_keys(type(config)):
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        values[key] = value
    return values
