"""The request fields of tools: functions that an answer may call, and the calls of earlier answers."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from llava_ray.deployments.http.closed_model import ClosedModel
from llava_ray.deployments.http.complaints import excerpt, wrong_field
from llava_ray.generate.engine import ToolChoice

_MAX_TOOLS = 128
_Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class FunctionDefinition(ClosedModel):
    """A function: its name, what it does, and the JSON Schema of its arguments."""

    name: _Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    """Accepted; arguments are held by the schema where a call is required."""


class Tool(ClosedModel):
    """A tool, which is a function."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(ClosedModel):
    """A function by its name."""

    name: _Name


class NamedTool(ClosedModel):
    """A tool by its name."""

    type: Literal["function"]
    function: FunctionName


class CalledFunction(ClosedModel):
    """A function's name and its arguments, a JSON object as text."""

    name: _Name
    arguments: str

    @model_validator(mode="after")
    def arguments_are_an_object(self) -> Self:
        """Reject arguments that are no JSON object."""
        try:
            value = json.loads(self.arguments or "{}")
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise wrong_field("arguments", "expected a JSON object as text")
        return self


class CalledTool(ClosedModel):
    """A call in an assistant's message."""

    ignored = frozenset({"index"})

    id: str = Field(min_length=1, max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction


def as_choice(value: Any) -> Any:
    """Check a choice by word, so that a wrong one is told with the known ones."""
    if isinstance(value, str) and value not in ("none", "auto", "required"):
        raise wrong_field("", f'{excerpt(value)} is no choice: expected "none", "auto", "required" or a function')
    if not isinstance(value, str | dict):
        raise wrong_field("", 'expected "none", "auto", "required", or {"type": "function", "function": {"name": …}}')
    return value if isinstance(value, str) else NamedTool.model_validate(value)


class ToolFields(ClosedModel):
    """The fields of tools in a chat."""

    tools: tuple[Tool, ...] = Field(default=(), max_length=_MAX_TOOLS)
    tool_choice: Annotated[str | NamedTool | None, BeforeValidator(as_choice)] = None
    """Default: auto where there are tools."""
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def tools_fit_together(self) -> Self:
        """Reject two tools of one name, and choices of what is not there."""
        names = [tool.function.name for tool in self.tools]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise wrong_field(
                    f"tools.{index}.function.name", f"{excerpt(name)} is the name of an earlier tool, too"
                )
        choice = self.tool_choice
        if not names and (isinstance(choice, NamedTool) or choice == "required"):
            raise wrong_field("tool_choice", "only allowed with tools")
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            raise wrong_field("tool_choice", f"{excerpt(choice.function.name)} is none of the tools")
        return self

    @property
    def offered_tools(self) -> str:
        """Return the tools that may be called, as a JSON list; empty without any."""
        if not self.tools or self.tool_choice == "none":
            return ""
        tools = [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in self.tools]
        return json.dumps(tools, ensure_ascii=False)

    @property
    def choice(self) -> ToolChoice:
        """Return what an answer may or must call."""
        chosen, parallel = self.tool_choice, self.parallel_tool_calls
        if isinstance(chosen, NamedTool):
            return ToolChoice("named", chosen.function.name, parallel)
        return ToolChoice("required" if chosen == "required" else "auto", "", parallel)
