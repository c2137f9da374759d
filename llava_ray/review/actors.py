"""Calls to actors that may be killed and restarted: repeated until they succeed, for a limited time.

Only idempotent methods are called this way, never one that spends money.
"""

import asyncio
import time
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError
from tenacity import AsyncRetrying, Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from llava_ray.errors import LlavaRayError

_RETRY_S = 120.0
_POLICY: dict[str, Any] = {
    "retry": retry_if_exception_type(RayActorError),
    "stop": stop_after_delay(_RETRY_S),
    "wait": wait_random_exponential(multiplier=0.05, max=2.0),
    "reraise": True,
}


async def call_async(actor: ActorHandle, method: str, *arguments: Any) -> Any:
    """Call an actor from another one. Raises RayActorError if it is not restarted in time."""
    return await AsyncRetrying(sleep=asyncio.sleep, **_POLICY)(_called, actor, method, *arguments)


def call_sync(actor: ActorHandle, method: str, *arguments: Any) -> Any:
    """Call an actor from the driver. Raises RayActorError if it is not restarted, and the actor's own errors."""
    return Retrying(sleep=time.sleep, **_POLICY)(lambda: get_result(getattr(actor, method).remote(*arguments)))


def get_result(reference: ray.ObjectRef) -> Any:
    """Wait for an actor's result. Raises our own errors as raised there, through any number of actors."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        cause: BaseException | None = error
        while isinstance(cause, RayTaskError):
            cause = cause.cause
        if isinstance(cause, LlavaRayError):
            raise cause from error
        raise


async def _called(actor: ActorHandle, method: str, *arguments: Any) -> Any:
    return await getattr(actor, method).remote(*arguments)
