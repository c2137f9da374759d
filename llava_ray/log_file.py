"""A file for what libraries and worker processes say of themselves, so that a terminal shows the run's own lines."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, TextIO

_RAYS_PRINTER = "ray_print_logs"  # Ray's name for what prints the lines of workers in the driver
_TQDM_MARK = "__ray_tqdm_magic_token__"  # before the state of a bar, which is no line
_EVENT_MARK = ":event_summary:"
_DEFAULT_FOLDER = "runs"

_terminals: list[TextIO] = []


def terminal() -> TextIO:
    """Return where people look: the error stream, as it was before a log took it over."""
    return _terminals[0] if _terminals else sys.stderr


class LibraryLog:
    """A file that takes the error stream, and what is logged or printed in worker processes."""

    def __init__(self, storage_path: str | None) -> None:
        """Open a new file below the folder of runs; below ``runs`` where that is remote."""
        folder = Path(_DEFAULT_FOLDER if storage_path is None or "://" in storage_path else storage_path) / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{Path(sys.argv[0]).stem or 'python'}-{time.strftime('%Y%m%d-%H%M%S')}"
        taken = len(list(folder.glob(f"{name}*")))
        self.path = folder / (f"{name}.{taken}.log" if taken else f"{name}.log")
        # Never closed: threads of libraries may write until the process ends.
        self.file: TextIO = self.path.open("a", buffering=1, encoding="utf-8", errors="replace")

    @contextmanager
    def taking_over(self) -> Iterator[None]:
        """Take the error stream, with the log handlers that hold it, until the block ends."""
        streams = (sys.stderr, sys.__stderr__)
        held = [(handler, handler.stream) for handler in _stream_handlers() if handler.stream in streams]
        for handler, _ in held:
            handler.setStream(self.file)
        _terminals.append(sys.stderr)
        try:
            with redirect_stderr(self.file):
                yield
        finally:
            _terminals.pop()
            for handler, stream in held:
                handler.setStream(stream)
            for handler in _stream_handlers():
                if handler.stream is self.file:  # made meanwhile
                    handler.setStream(sys.stderr)

    def take_workers_lines(self) -> None:
        """Write here what Ray would print of its workers; its own shutdown ends that."""
        from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

        if any(name == _RAYS_PRINTER for name, _ in dispatcher.handlers):
            dispatcher.remove_handler(_RAYS_PRINTER)
            dispatcher.add_handler(_RAYS_PRINTER, self.write_lines)

    def write_lines(self, batch: dict[str, Any]) -> None:
        """Write what a process has printed, as Ray hands it on."""
        who = batch.get("actor_name") or batch.get("task_name") or ""
        # Ray's autoscaler reports every five seconds, also of a cluster that cannot grow; of that, only what happened.
        needed = _EVENT_MARK if batch.get("pid") == "autoscaler" else ""
        for line in batch.get("lines", []):
            if _TQDM_MARK not in line and needed in line:
                self.file.write(f"({who} pid={batch.get('pid')}, ip={batch.get('ip')}) {line}\n")


def _stream_handlers() -> Iterator[logging.StreamHandler[Any]]:
    """Yield the handlers of all loggers that write to a stream."""
    loggers = [logging.getLogger(), *logging.root.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", []):  # a place in the tree without a logger has none
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                yield handler
