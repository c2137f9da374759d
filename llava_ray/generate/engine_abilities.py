"""Abilities that an engine may have besides ``engine.Engine``."""

from pathlib import Path
from typing import Protocol, runtime_checkable

from llava_ray.images.views import ImageDecoder


@runtime_checkable
class DecodesElsewhere(Protocol):
    """An engine whose images can be decoded in another process, so that a malicious one cannot crash it."""

    def use_decoder(self, decoder: ImageDecoder) -> None:
        """Decode the images of all later requests with ``decoder``."""
        ...


@runtime_checkable
class LoadsAdapters(Protocol):
    """An engine that loads and removes LoRA adapters while it answers requests.

    A name is never used for two adapters: whatever an engine keeps by name stays true.
    """

    async def load_adapter(self, name: str, folder: str | Path) -> None:
        """Load an adapter's folder; requests may name it afterwards. No other request is disturbed.

        Raises ModelError for an adapter that cannot be served; nothing has changed then.
        """
        ...

    async def unload_adapter(self, name: str) -> None:
        """Remove an adapter and free its memory; do nothing without it. Raises ModelError while a request uses it."""
        ...
