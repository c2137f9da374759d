"""One MLflow trace per request: times and counts, never a text or an image."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from prometheus_client.core import Metric

from llava_ray.deployments.adapters.service import AdapterService
from llava_ray.deployments.gateway import Gateway
from llava_ray.deployments.http.responses import Choice
from llava_ray.deployments.messages import Task
from llava_ray.deployments.model_source import ModelSource
from llava_ray.deployments.refusal import RefusalError
from llava_ray.deployments.replica import AnswerPiece
from llava_ray.generate.engine import ModelCard

_EXPERIMENT = "llava_ray serving"


class TracedGateway:
    """A gateway that traces its answers; MLflow's own threads send the traces in the background."""

    def __init__(self, gateway: Gateway, tracking_uri: str) -> None:
        """Connect to MLflow. Raises MLflow's error if it cannot be reached, at the start and not in a request."""
        import mlflow  # takes seconds to import, and only tracing needs it

        self.gateway = gateway
        self.mlflow = mlflow
        mlflow.set_tracking_uri(tracking_uri)
        self.experiment_id: str = mlflow.set_experiment(_EXPERIMENT).experiment_id

    @property
    def sources(self) -> tuple[ModelSource, ...]:
        """Return the models."""
        return self.gateway.sources

    @property
    def adapters(self) -> AdapterService:
        """Return the adapters that are loaded while the service runs."""
        return self.gateway.adapters

    async def run(self, task: Task, session: str) -> AsyncGenerator[list[AnswerPiece], None]:
        """Stream an answer and trace it. Raises RefusalError."""
        start, first, end = time.monotonic(), None, "cancelled"
        choices = [Choice() for _ in range(task.num_choices)]
        span = self.mlflow.start_span_no_context(
            "answer", span_type="CHAT_MODEL", attributes=_describe_request(task), experiment_id=self.experiment_id
        )
        try:
            async with aclosing(self.gateway.run(task, session)) as batches:
                async for pieces in batches:
                    first = first or time.monotonic()
                    for index, chunk in pieces:
                        choices[index].add(chunk)
                    yield pieces
            end = choices[0].finish_reason or "stop"
        except RefusalError as error:
            end = error.refused.code
            raise
        finally:
            attributes = {
                "end": end,
                "prompt_tokens": choices[0].num_prompt_tokens,
                "generation_tokens": sum(choice.num_tokens for choice in choices),
                "time_to_first_token_s": None if first is None else round(first - start, 4),
            }
            span.set_attributes(attributes)
            span.end(status="OK" if end in ("stop", "length") else "ERROR")

    async def card(self, source: ModelSource) -> ModelCard:
        """Return a model's capabilities."""
        return await self.gateway.card(source)

    async def ready(self) -> dict[str, bool]:
        """Return whether each model can take a request now."""
        return await self.gateway.ready()

    async def collect(self) -> dict[str, list[Metric]]:
        """Return the metrics of each process."""
        return await self.gateway.collect()


def _describe_request(task: Task) -> dict[str, Any]:
    """Describe a request without its contents."""
    return {
        "request_id": task.request_id,
        "model": task.model,
        "num_turns": len(task.turns),
        "num_images": len(task.media),
        "num_choices": task.num_choices,
        "stream": task.stream,
        "max_tokens": task.sampling.max_tokens,
        "temperature": task.sampling.temperature,
    }


def traced(gateway: Gateway, tracking_uri: str | None) -> Gateway:
    """Return the gateway, with traces if there is a tracking server."""
    return gateway if tracking_uri is None else TracedGateway(gateway, tracking_uri)
