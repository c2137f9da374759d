"""Moderation of requests by an OpenAI-compatible endpoint; without a verdict they are rejected."""

import asyncio
import base64
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp

from llava_ray.deployments.refusal import refuse
from llava_ray.deployments.settings import ServeSettings

_ENVIRONMENT = "LLAVA_RAY_MODERATION_KEY"

# Signatures of image formats, for the media type of data URIs.
_SIGNATURES = {
    b"\xff\xd8\xff": "image/jpeg",
    b"\x89PNG": "image/png",
    b"GIF8": "image/gif",
    b"RIFF": "image/webp",
    b"BM": "image/bmp",
    b"II*\0": "image/tiff",
    b"MM\0*": "image/tiff",
}


class Moderator:
    """A client of the moderation endpoint."""

    def __init__(self, settings: ServeSettings, environment: Mapping[str, str] = os.environ) -> None:
        """Initialise for the endpoint of the settings, if there is one."""
        self.url = settings.moderation_url
        self.model = settings.moderation_model
        self.timeout = aiohttp.ClientTimeout(total=settings.moderation_timeout_s)
        self.key = environment.get(_ENVIRONMENT)

    async def check(self, texts: Sequence[str], images: Sequence[bytes]) -> None:
        """Check texts and images. Raises RefusalError: 400 if flagged, 503 without a verdict."""
        if self.url is None or not (images or any(text.strip() for text in texts)):
            return
        try:
            body = await asyncio.to_thread(_moderation_body, self.model, texts, images)
            flagged = await self.ask(body)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError, TypeError):
            raise refuse(
                503,
                "the moderation service did not respond, and requests are rejected without its verdict",
                "moderation_unavailable",
            ) from None
        if flagged:
            raise refuse(400, "rejected by moderation; change the question", "content_policy_violation", "messages")

    async def ask(self, body: bytes) -> bool:
        """Return whether any result is flagged. Raises the client's errors, and ValueError for a bad response."""
        headers = {"content-type": "application/json"}
        if self.key:
            headers["authorization"] = f"Bearer {self.key}"
        address = f"{(self.url or '').rstrip('/')}/moderations"
        async with (
            aiohttp.ClientSession(timeout=self.timeout) as session,
            session.post(address, data=body, headers=headers, allow_redirects=False) as response,
        ):
            if response.status != 200:
                raise ValueError(f"moderation answered {response.status}")
            results = (await response.json())["results"]
            verdicts = [result["flagged"] for result in results]
            if not verdicts or not all(isinstance(verdict, bool) for verdict in verdicts):
                raise ValueError("moderation gave no verdict")
            return any(verdicts)


def _moderation_body(model: str, texts: Sequence[str], images: Sequence[bytes]) -> bytes:
    """Format the request: every non-empty text, and every image as a data URI of its bytes."""
    entries: list[dict[str, Any]] = [{"type": "text", "text": text} for text in texts if text.strip()]
    entries += [{"type": "image_url", "image_url": {"url": _data_uri(data)}} for data in images]
    return json.dumps({"model": model, "input": entries}).encode()


def _data_uri(data: bytes) -> str:
    """Format an encoded image as a data URI."""
    kind = next(
        (kind for beginning, kind in _SIGNATURES.items() if data.startswith(beginning)), "application/octet-stream"
    )
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
