"""Reading of a request's images: from addresses to checked encoded images."""

import asyncio
import os
import stat
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

from llava_ray.deployments.media.addresses import Network
from llava_ray.deployments.media.data_uris import decode_data_uri
from llava_ray.deployments.media.fetching import FetchLimits, fetch, too_many_bytes
from llava_ray.deployments.refusal import RefusalError, from_record_error, refuse
from llava_ray.deployments.settings import ServeSettings
from llava_ray.errors import ImageError
from llava_ray.images.decoder_pool import DecodeLimits, DecoderPool

_SCHEME_CHARS = 100  # prefix of an address that is searched for its scheme, after leading spaces


class MediaReader:
    """Reads images within the service's settings."""

    def __init__(
        self,
        settings: ServeSettings,
        network: Network | None = None,
        decoder: DecoderPool | None = None,
        *,
        decode_whole: bool = True,
    ) -> None:
        """Initialise with the limits; ``network`` is the system's except in tests.

        ``decoder`` decodes each image completely, or its header only where the engine decodes it there later.
        """
        self.settings = settings
        self.decoder = decoder or make_decoder(settings)
        self.decode_whole = decode_whole
        self.network = network or Network()
        self.limits = FetchLimits(
            allowed_domains=settings.allowed_media_domains,
            max_bytes=settings.max_image_bytes,
            timeout_s=settings.media_timeout_s,
            max_redirects=settings.max_redirects,
            allow_private=settings.allow_private_media_addresses,
        )

    async def read_all(self, places: Sequence[str]) -> tuple[bytes, ...]:
        """Read the images of one request concurrently. Raises RefusalError for the first invalid one."""
        tasks = [asyncio.ensure_future(self.read(place, number)) for number, place in enumerate(places, start=1)]
        try:
            return tuple(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def read(self, place: str, number: int = 1) -> bytes:
        """Read an encoded image and check its size, format and frames. Raises RefusalError."""
        scheme = place[:_SCHEME_CHARS].lstrip()[:5].lower()
        if scheme == "data:":
            data = await asyncio.to_thread(decode_data_uri, place, self.settings.max_image_bytes)
        elif scheme == "file:":
            data = await asyncio.to_thread(self.read_local, place)
        else:
            data = await fetch(place, self.limits, self.network)
        await self.check(data, f"image {number}")
        return data

    def read_local(self, place: str) -> bytes:
        """Read a file under the allowed folder, with links resolved. Raises RefusalError."""
        folder = self.settings.allowed_local_media_path
        if folder is None:
            raise refuse(400, "file: addresses are not read here (allowed_local_media_path)", "media_local", "messages")
        outside = refuse(400, "no such image under the allowed folder", "media_local", "messages")
        try:
            url = urllib.parse.urlsplit(place)
            if url.netloc not in ("", "localhost"):
                raise outside
            path = Path(urllib.parse.unquote(url.path)).resolve(strict=True)
            if not path.is_relative_to(Path(folder).resolve()):
                raise outside
            return _read_regular(path, self.settings.max_image_bytes)
        except (OSError, ValueError):  # ValueError: a null byte, brackets that do not close
            raise outside from None

    async def check(self, data: bytes, name: str) -> None:
        """Check that data is an image within the limits. Raises RefusalError."""
        settings = self.settings
        try:
            await self.decoder.check(
                data,
                name,
                max_pixels=settings.max_image_pixels,
                max_frames=settings.max_image_frames,
                whole=self.decode_whole,
            )
        except ImageError as error:
            if error.reason == "image_too_large":
                limit = f"{settings.max_image_pixels:,} pixels (max_image_pixels)"
                raise refuse(
                    400, f"{name} has more than {limit}; send a smaller one", error.reason, "messages"
                ) from None
            raise RefusalError(from_record_error(error)) from None


def make_decoder(settings: ServeSettings) -> DecoderPool:
    """Build the pool of decoding processes of one replica, not started."""
    return DecoderPool(DecodeLimits(cpu_s=settings.image_decode_s))


def _read_regular(path: Path, max_bytes: int) -> bytes:
    """Read a regular file within the limit, never blocking on a pipe or device. Raises OSError, RefusalError."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(f"{path} is not a file")
        if found.st_size > max_bytes:
            raise too_many_bytes(found.st_size, max_bytes)
        return file.read(max_bytes)
