"""The base of all request schemas: no field is silently ignored."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from llava_ray.deployments.http.neutral_fields import Neutral, is_neutral


class ClosedModel(BaseModel):
    """A model that rejects unknown fields, NaN and infinity; its errors never repeat values."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True, use_attribute_docstrings=True
    )

    ignored: ClassVar[frozenset[str]] = frozenset()
    """Fields that have no effect."""
    neutral: ClassVar[Neutral] = {}
    """Fields with the values that have no effect."""

    @model_validator(mode="before")
    @classmethod
    def only_what_is_asked(cls, values: Any) -> Any:
        """Drop fields without effect, and nulls."""
        if isinstance(values, cls):
            return values
        if not isinstance(values, dict):
            raise ValueError("expected a JSON object")  # noqa: TRY004 - pydantic counts only ValueError as a refusal
        values = {name: value for name, value in values.items() if value is not None and name not in cls.ignored}
        values = {name: value for name, value in values.items() if not is_neutral(cls.neutral, name, value)}
        return cls.prepared(values)

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Describe the fields without effect too, which the schema would otherwise forbid."""
        schema = handler(core_schema)
        fields = handler.resolve_ref_schema(schema).setdefault("properties", {})
        for name in sorted(cls.ignored):
            fields.setdefault(name, {"description": "Accepted and of no effect."})
        for name, values in sorted(cls.neutral.items()):
            fields.setdefault(name, {"enum": list(values), "description": "Accepted and of no effect."})
        return schema

    @classmethod
    def prepared(cls, values: dict[str, Any]) -> Mapping[str, Any]:
        """Normalise alternative forms of the fields."""
        return values
