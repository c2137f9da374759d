"""Asks an OpenAI-compatible endpoint whether a request may be answered; without a verdict it may not."""

import os
from collections.abc import Mapping
from typing import Any

import aiohttp

from llava_ray.deployments.refusal import refuse
from llava_ray.deployments.settings import ServeSettings

ENVIRONMENT = "LLAVA_RAY_MODERATION_KEY"


class Moderator:
    """Holds the endpoint's address and key."""

    def __init__(self, settings: ServeSettings, environment: Mapping[str, str] = os.environ) -> None:
        """Moderate if the settings name an endpoint."""
        self.url = settings.moderation_url
        self.model = settings.moderation_model
        self.timeout = aiohttp.ClientTimeout(total=settings.moderation_timeout_s)
        self.key = environment.get(ENVIRONMENT)

    async def check(self, texts: list[str], images: list[str]) -> None:
        """Pass, or raise RefusalError: 400 for what is flagged, 503 where there is no verdict."""
        if self.url is None:
            return
        entries: list[dict[str, Any]] = [{"type": "text", "text": text} for text in texts if text.strip()]
        entries += [{"type": "image_url", "image_url": {"url": image}} for image in images]
        if not entries:
            return
        try:
            flagged = await self.ask({"model": self.model, "input": entries})
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError, TypeError):
            raise refuse(
                503,
                "the moderation service gives no verdict, and nothing is answered without one",
                "moderation_unavailable",
            ) from None
        if flagged:
            raise refuse(400, "refused by moderation; ask something else", "content_policy_violation", "messages")

    async def ask(self, body: dict[str, Any]) -> bool:
        """Return whether any result is flagged. Raises whatever keeps it from being known."""
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        address = f"{(self.url or '').rstrip('/')}/moderations"
        async with (
            aiohttp.ClientSession(timeout=self.timeout) as session,
            session.post(address, json=body, headers=headers, allow_redirects=False) as response,
        ):
            if response.status != 200:
                raise ValueError(f"moderation answered {response.status}")
            results = (await response.json())["results"]
            verdicts = [result["flagged"] for result in results]
            if not verdicts or not all(isinstance(verdict, bool) for verdict in verdicts):
                raise ValueError("moderation gave no verdict")
            return any(verdicts)
