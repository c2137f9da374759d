"""Calls to actors that may be killed and come back: said again until they are heard, for a while.

Only what may be said twice is called so. What spends money never is.
"""

import asyncio
import time
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError
from tenacity import AsyncRetrying, Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from llava_ray.errors import LlavaRayError

_PATIENCE_S = 120.0
_POLICY: dict[str, Any] = {
    "retry": retry_if_exception_type(RayActorError),
    "stop": stop_after_delay(_PATIENCE_S),
    "wait": wait_random_exponential(multiplier=0.05, max=2.0),
    "reraise": True,
}


async def call_async(actor: ActorHandle, method: str, *arguments: Any) -> Any:
    """Call an actor from another one. Raises RayActorError if it does not come back."""
    return await AsyncRetrying(sleep=asyncio.sleep, **_POLICY)(_called, actor, method, *arguments)


def call_sync(actor: ActorHandle, method: str, *arguments: Any) -> Any:
    """Call an actor from the driver. Raises RayActorError if it does not come back, and our own errors as they are."""
    return Retrying(sleep=time.sleep, **_POLICY)(lambda: heard(getattr(actor, method).remote(*arguments)))


def heard(answer: ray.ObjectRef) -> Any:
    """Return an actor's answer. Raises our own errors as they were raised there, through however many actors."""
    try:
        return ray.get(answer)
    except RayTaskError as error:
        cause: BaseException | None = error
        while isinstance(cause, RayTaskError):
            cause = cause.cause
        if isinstance(cause, LlavaRayError):
            raise cause from error
        raise


async def _called(actor: ActorHandle, method: str, *arguments: Any) -> Any:
    return await getattr(actor, method).remote(*arguments)
