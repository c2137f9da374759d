"""Adapters from addresses: their files downloaded into a folder, the least recently used of which are deleted."""

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from yarl import URL

from llava_ray.deployments.adapters.places import PARAM, AdapterRef, adapter_too_large, check_url, is_allowed_url
from llava_ray.deployments.refusal import RefusalError, refuse

_CHUNK = 256 * 1024
_REDIRECTS = (301, 302, 303, 307, 308)
_ABSENT = (403, 404, 410)  # object stores answer 403 for names that do not exist
_FORGOTTEN_S = 3600.0  # unfinished downloads that are so old are of processes that ended

_PEFT = "adapter_config.json"
_BUNDLE = "llava.json"
# The files of the known kinds of folders; all but the first of each kind may be absent: the reader says what misses.
_FILES = {
    _BUNDLE: (
        "projector.safetensors",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
    ),
    _PEFT: ("adapter_model.safetensors", "adapter_model.bin", "config.json", "non_lora_trainables.bin"),
}


@dataclass(frozen=True)
class DownloadLimits:
    """The limits of downloads: addresses, bytes of one adapter and of all, time and redirects."""

    allowed_urls: Sequence[str]
    max_bytes: int
    cache_bytes: int
    timeout_s: float
    max_redirects: int


class AdapterDownloads:
    """A folder of downloaded adapters. Several processes may share it."""

    def __init__(self, folder: str | Path, limits: DownloadLimits) -> None:
        """Initialise with the folder, which is made when it is needed."""
        self.folder = Path(folder).expanduser()
        self.limits = limits

    async def find(self, adapter: AdapterRef) -> Path:
        """Return the folder of an adapter, downloaded now or earlier. Raises RefusalError."""
        check_url(adapter.place, self.limits.allowed_urls)
        path = self.folder / adapter.revision
        try:
            if not path.is_dir():
                await self._download(adapter, path)
            os.utime(path)
            await asyncio.to_thread(self._evict, path)
        except TimeoutError:
            raise refuse(
                504,
                f"lora_path: the download took more than {self.limits.timeout_s:g} s (adapter_timeout_s)",
                "adapter_timeout",
                PARAM,
            ) from None
        except (aiohttp.ClientError, ValueError) as error:
            raise refuse(
                422,
                f"lora_path: the address could not be read from ({type(error).__name__})",
                "adapter_unreachable",
                PARAM,
            ) from None
        except OSError as error:
            raise refuse(
                503, f"the adapter cannot be stored (adapter_cache_dir): {error.strerror}", "adapter_storage"
            ) from None
        return path

    async def _download(self, adapter: AdapterRef, path: Path) -> None:
        """Download an adapter's files beside their place, then move them there. Raises RefusalError and others."""
        self.folder.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(dir=self.folder, prefix=".new-"))
        try:
            async with (
                asyncio.timeout(self.limits.timeout_s),
                aiohttp.ClientSession(
                    cookie_jar=aiohttp.DummyCookieJar(),
                    auto_decompress=False,
                    timeout=aiohttp.ClientTimeout(total=None),
                ) as session,
            ):
                await _Download(session, adapter.place, new, self.limits).run()
            try:
                new.rename(path)
            except OSError:
                if not path.is_dir():  # otherwise another process was faster
                    raise
        finally:
            await asyncio.to_thread(shutil.rmtree, new, ignore_errors=True)

    def _evict(self, kept: Path) -> None:
        """Delete the least recently used adapters until the rest fits, and what is left of unfinished downloads."""
        sizes: dict[Path, tuple[float, int]] = {}
        for path in self.folder.iterdir():
            try:
                used = path.stat().st_mtime
                size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            except OSError:  # another process has just deleted it
                continue
            if not path.name.startswith(".new-"):
                sizes[path] = used, size
            elif time.time() - used > _FORGOTTEN_S:
                shutil.rmtree(path, ignore_errors=True)
        total = sum(size for _, size in sizes.values())
        for path, (_, size) in sorted(sizes.items(), key=lambda entry: entry[1][0]):
            if total <= self.limits.cache_bytes:
                break
            if path != kept:
                shutil.rmtree(path, ignore_errors=True)
                total -= size


class _Download:
    """The download of one adapter's files into a new folder."""

    def __init__(self, session: aiohttp.ClientSession, place: str, folder: Path, limits: DownloadLimits) -> None:
        """Initialise for the folder's address."""
        self.session = session
        self.place = place.rstrip("/")
        self.folder = folder
        self.limits = limits
        self.num_bytes = 0

    async def run(self) -> None:
        """Download all files. Raises RefusalError."""
        for first, others in _FILES.items():
            if await self.file(first):
                for name in others:
                    if name != "adapter_model.bin" or not (self.folder / "adapter_model.safetensors").exists():
                        await self.file(name)
                return
        raise refuse(404, f"lora_path: the address has neither {' nor '.join(_FILES)}", "adapter_not_found", PARAM)

    async def file(self, name: str) -> bool:
        """Download one file; return whether it is there. Raises RefusalError."""
        url = f"{self.place}/{name}"
        for _ in range(self.limits.max_redirects + 1):
            if not is_allowed_url(url, self.limits.allowed_urls):
                raise refuse(
                    403,
                    "lora_path: the address redirects to one that is not allowed (allowed_adapter_urls)",
                    "adapter_place",
                    PARAM,
                )
            async with self.session.get(
                url, allow_redirects=False, headers={"accept-encoding": "identity"}
            ) as response:
                if response.status in _REDIRECTS:
                    url = str(response.url.join(URL(response.headers.get("location", ""))))
                    continue
                if response.status in _ABSENT:
                    return False
                if response.status != 200:
                    raise _unexpected(response.status)
                await self.write(response, self.folder / name)
                return True
        raise refuse(
            400, f"lora_path: more than {self.limits.max_redirects} redirects (max_redirects)", "adapter_place", PARAM
        )

    async def write(self, response: aiohttp.ClientResponse, path: Path) -> None:
        """Write a response's body to a file, within the limit of all files together. Raises RefusalError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            async for chunk in response.content.iter_chunked(_CHUNK):
                self.num_bytes += len(chunk)
                if self.num_bytes > self.limits.max_bytes:
                    raise adapter_too_large(self.num_bytes, self.limits.max_bytes)
                file.write(chunk)


def _unexpected(status: int) -> RefusalError:
    """Return the refusal of an address that answers with an error."""
    return refuse(
        503 if status >= 500 else 422, f"lora_path: the address answered {status}", "adapter_unreachable", PARAM
    )
