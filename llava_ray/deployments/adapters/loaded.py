"""The adapters in one replica's memory: loaded by their first request, bounded, the least recently used one goes."""

import asyncio
import itertools
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_ray.deployments.adapters.downloads import AdapterDownloads, DownloadLimits
from llava_ray.deployments.adapters.places import PARAM, AdapterRef, find_folder, is_url
from llava_ray.deployments.refusal import RefusalError, Refused, refuse
from llava_ray.deployments.settings import ServeSettings
from llava_ray.errors import LlavaRayError
from llava_ray.generate.engine import Engine
from llava_ray.generate.engine_abilities import LoadsAdapters

_log = logging.getLogger(__name__)

# A known adapter that could not be loaded is not tried again for so long: each try reads its files.
_RETRY_S = 10.0
_MAX_FAILURES = 1000


class ReplicaAdapters:
    """Loads adapters into the engine when they are needed. Used on the event loop only.

    Each load has a new name in the engine, so that nothing it keeps by name is another adapter's.
    """

    def __init__(self, engine: Engine, settings: ServeSettings) -> None:
        """Initialise without adapters."""
        self.engine = engine
        self.settings = settings
        limits = DownloadLimits(
            settings.allowed_adapter_urls,
            settings.max_adapter_bytes,
            settings.adapter_cache_bytes,
            settings.adapter_timeout_s,
            settings.max_redirects,
        )
        self.downloads = AdapterDownloads(settings.adapter_cache_dir, limits)
        self.names: OrderedDict[str, str] = OrderedDict()
        """The engine's names of loaded adapters by revision, the least recently used first."""
        self.users: Counter[str] = Counter()
        """Requests by revision."""
        self.dropped: set[str] = set()
        """Revisions that are removed when their last request has ended."""
        self.failures: OrderedDict[str, tuple[float, Refused]] = OrderedDict()
        self.loading: dict[str, asyncio.Task[str]] = {}
        self._numbers = itertools.count(1)
        self._one_at_a_time = asyncio.Lock()
        self._removing: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def used(self, adapter: AdapterRef) -> AsyncGenerator[str, None]:
        """Yield the engine's name of an adapter, loaded if necessary, which stays while the block runs.

        Raises RefusalError.
        """
        self.users[adapter.revision] += 1
        try:
            yield await self._find(adapter)
        finally:
            self.users[adapter.revision] -= 1
            if not self.users[adapter.revision]:
                del self.users[adapter.revision]
                if adapter.revision in self.dropped:
                    self._start_removing(adapter.revision)

    async def load(self, adapter: AdapterRef) -> None:
        """Load an adapter now. Raises RefusalError that names the field."""
        async with self.used(adapter):
            pass

    async def drop(self, adapter: AdapterRef) -> None:
        """Forget an adapter, at once or when its last request has ended."""
        self.failures.pop(adapter.revision, None)
        if self.users[adapter.revision]:
            self.dropped.add(adapter.revision)
        else:
            await self._remove(adapter.revision)

    async def _find(self, adapter: AdapterRef) -> str:
        """Return the engine's name of an adapter; all who wait for one share its loading."""
        if adapter.revision in self.names:
            self.names.move_to_end(adapter.revision)
            return self.names[adapter.revision]
        task = self.loading.get(adapter.revision)
        if task is None:
            self._raise_recent_failure(adapter)
            task = self.loading[adapter.revision] = asyncio.ensure_future(self._load(adapter))
            task.add_done_callback(lambda done: self._loaded(adapter, done))
        return await asyncio.shield(task)

    def _loaded(self, adapter: AdapterRef, done: "asyncio.Task[str]") -> None:
        """Remember the end of a loading, whether anybody still waits for it or not."""
        self.loading.pop(adapter.revision, None)
        error = None if done.cancelled() else done.exception()
        if isinstance(error, RefusalError) and error.refused.retry_after_s is None:
            self.failures[adapter.revision] = time.monotonic(), error.refused
            while len(self.failures) > _MAX_FAILURES:
                self.failures.popitem(last=False)

    def _raise_recent_failure(self, adapter: AdapterRef) -> None:
        when, refused = self.failures.get(adapter.revision, (0.0, None))
        if refused is not None and time.monotonic() - when < _RETRY_S:
            raise RefusalError(refused)

    async def _load(self, adapter: AdapterRef) -> str:
        """Load an adapter into the engine, then make room for it. Raises RefusalError."""
        engine = self.engine
        if not isinstance(engine, LoadsAdapters):
            raise refuse(
                404, f"this service's engine ({self.settings.engine}) loads no adapters", "adapters_closed", "lora_name"
            )
        async with self._one_at_a_time:
            if len(self.names) >= self.settings.max_loaded_adapters and not self._idle():
                raise self._all_in_use()
            folder = await self._folder(adapter)
            name = f"{adapter.name}#{next(self._numbers)}"
            await self._call(engine.load_adapter(name, folder), adapter)
            while len(self.names) >= self.settings.max_loaded_adapters:
                if not (idle := self._idle()):
                    await self._call(engine.unload_adapter(name), adapter)
                    raise self._all_in_use()
                await self._call(engine.unload_adapter(self.names.pop(idle[0])), adapter)
            self.names[adapter.revision] = name
            self.failures.pop(adapter.revision, None)
            return name

    def _idle(self) -> list[str]:
        """Return the loaded revisions without requests, the least recently used first."""
        return [revision for revision in self.names if not self.users[revision]]

    def _all_in_use(self) -> RefusalError:
        most = self.settings.max_loaded_adapters
        return RefusalError(
            Refused(
                429,
                f"requests use all {most} adapters that fit into memory (max_loaded_adapters); try again",
                "adapters_in_use",
                "model",
                retry_after_s=self.settings.retry_after_s,
            )
        )

    async def _folder(self, adapter: AdapterRef) -> Path:
        """Return the folder of an adapter. Raises RefusalError."""
        if is_url(adapter.place):
            return await self.downloads.find(adapter)
        allowed = self.settings.allowed_adapter_paths
        return await asyncio.to_thread(find_folder, adapter.place, allowed, self.settings.max_adapter_bytes)

    async def _call(self, call: Coroutine[Any, Any, None], adapter: AdapterRef) -> None:
        """Await the engine's loading or removing. Raises RefusalError, whatever an adapter holds."""
        try:
            await call
        except Exception as error:
            words, status, code = (
                f"lora_path: the adapter {adapter.name!r} cannot be served: {error}",
                400,
                "bad_adapter",
            )
            if not isinstance(error, LlavaRayError) or not self._is_healthy():
                _log.exception("loading the adapter %s failed", adapter)
                words = (
                    f"the adapter {adapter.name!r} could not be loaded ({type(error).__name__}); see the service's log"
                )
                status, code = 500, "adapter_failed"
            raise RefusalError(Refused(status, words, code, PARAM)) from error

    def _is_healthy(self) -> bool:
        try:
            self.engine.check_health()
        except LlavaRayError:
            return False
        return True

    def _start_removing(self, revision: str) -> None:
        task = asyncio.ensure_future(self._remove(revision))
        self._removing.add(task)
        task.add_done_callback(self._removing.discard)

    async def _remove(self, revision: str) -> None:
        """Remove an adapter from the engine, unless a request uses it again."""
        async with self._one_at_a_time:
            if self.users[revision]:
                return
            self.dropped.discard(revision)
            if revision not in self.names:
                return
            name = self.names.pop(revision)
            assert isinstance(self.engine, LoadsAdapters)
            try:
                await self.engine.unload_adapter(name)
            except LlavaRayError:
                _log.exception("the adapter %s could not be removed", name)


def for_request(refused: Refused) -> Refused:
    """Return the refusal of a request whose known adapter cannot be loaded any more: not its own fault."""
    if refused.retry_after_s is not None:
        return refused
    words = f"model: this adapter was loaded earlier, and cannot be loaded again: {refused.message}"
    return replace(refused, status=503, message=words, param="model")
