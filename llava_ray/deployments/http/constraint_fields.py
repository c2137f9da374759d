"""The request fields that restrict an answer: OpenAI's ``response_format``, and vLLM's."""

import json
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from llava_ray.deployments.http.closed_model import ClosedModel
from llava_ray.deployments.http.complaints import wrong_field
from llava_ray.deployments.http.neutral_fields import Neutral
from llava_ray.generate.engine import Constraint

ANY_OBJECT = {"type": "object"}
_MAX_CHOICES = 1000

_Schema = dict[str, Any] | str
_Choices = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1, max_length=_MAX_CHOICES)]
_Text = Annotated[str, Field(min_length=1)]


class JsonSchemaFormat(ClosedModel):
    """A named JSON Schema. It is held whether or not it is ``strict``."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    strict: bool = False
    content: dict[str, Any] = Field(alias="schema")


class ResponseFormat(ClosedModel):
    """OpenAI's ``response_format``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def schema_of_its_type(self) -> Self:
        """Require the schema where it is used, and only there."""
        if (self.type == "json_schema") != (self.json_schema is not None):
            is_missing = self.json_schema is None
            words = (
                "missing; expected an object with name and schema" if is_missing else 'only with type = "json_schema"'
            )
            raise wrong_field("json_schema", words)
        return self


class StructuredOutputs(ClosedModel):
    """vLLM's ``structured_outputs``: one of its fields."""

    neutral: ClassVar[Neutral] = {
        "disable_any_whitespace": (False,),
        "disable_additional_properties": (False,),
        "json_object": (False,),
    }

    schema_: _Schema | None = Field(default=None, alias="json")
    regex: _Text | None = None
    choice: _Choices | None = None
    grammar: _Text | None = None
    json_object: bool | None = None


class ConstraintFields(ClosedModel):
    """The fields that restrict an answer, of which a request may have one."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: _Schema | None = None
    """As in vLLM before 0.12, and the next three; it is ``structured_outputs.json`` there now."""
    guided_regex: _Text | None = None
    guided_choice: _Choices | None = None
    guided_grammar: _Text | None = None

    @model_validator(mode="after")
    def one_constraint(self) -> Self:
        """Reject a second constraint."""
        fields = [one.field.partition(".")[0] for one in self._constraints()]
        if len(fields) > 1:
            other = "another of its fields" if fields[0] == fields[1] else fields[0]
            raise wrong_field(fields[1], f"not together with {other}: an answer is restricted by one of them")
        return self

    def constraint(self) -> Constraint | None:
        """Return what the answer may be; None for any text."""
        return next(self._constraints(), None)

    def _constraints(self) -> Iterator[Constraint]:
        if self.response_format is not None and self.response_format.json_schema is not None:
            schema = self.response_format.json_schema.content
            yield Constraint("json", json.dumps(schema), "response_format.json_schema.schema")
        elif self.response_format is not None and self.response_format.type == "json_object":
            yield Constraint("json", json.dumps(ANY_OBJECT), "response_format")
        wanted = self.structured_outputs
        if wanted is not None:
            if wanted.json_object:
                yield Constraint("json", json.dumps(ANY_OBJECT), "structured_outputs.json_object")
            values = {"json": wanted.schema_, "regex": wanted.regex, "choice": wanted.choice, "grammar": wanted.grammar}
            for name, value in values.items():
                yield from _one(name, value, f"structured_outputs.{name}")
        yield from _one("json", self.guided_json, "guided_json")
        yield from _one("regex", self.guided_regex, "guided_regex")
        yield from _one("choice", self.guided_choice, "guided_choice")
        yield from _one("grammar", self.guided_grammar, "guided_grammar")


def _one(kind: Any, value: Any, field: str) -> Iterator[Constraint]:
    if value is not None:
        yield Constraint(kind, value if isinstance(value, str) else json.dumps(value), field)
