"""Pydantic AI, unmodified, as a client: typed answers and tools, of a tiny random model."""

import asyncio
from collections.abc import Iterator
from typing import Any, Literal

import pydantic
import pytest
from pictures import picture
from pydantic_ai import Agent, BinaryContent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from tool_service import Service, service

pytestmark = pytest.mark.slow


class Shape(pydantic.BaseModel):
    """What the model is to say."""

    colour: Literal["red", "blue"]
    corners: Literal[3, 4]


@pytest.fixture(scope="module")
def hermes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with service(tmp_path_factory.mktemp("hermes"), "hermes") as running:
        yield running


def ask(hermes: Service, kind: Any, output: Any) -> Any:
    provider = OpenAIProvider(base_url=str(hermes.openai.base_url), api_key="none")
    agent = Agent(kind("tiny", provider=provider), output_type=output, retries=0)
    image = BinaryContent(picture(), media_type="image/png")
    return asyncio.run(agent.run(["Which shape?", image], model_settings={"seed": 3, "max_tokens": 300}))


@pytest.mark.parametrize("kind", [OpenAIChatModel, OpenAIResponsesModel])
@pytest.mark.parametrize("form", [NativeOutput, ToolOutput])
def test_answers_are_of_their_type(hermes: Service, kind: Any, form: Any) -> None:
    result = ask(hermes, kind, form(Shape))
    assert isinstance(result.output, Shape)
    assert result.usage().input_tokens > 10
