"""A log file for the output of libraries and worker processes, so that the terminal shows only the run's own lines."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, TextIO

_RAYS_PRINTER = "ray_print_logs"  # Ray's name of the handler that prints worker output in the driver
_TQDM_MARK = "__ray_tqdm_magic_token__"  # precedes the state of a progress bar, which is not a log line
_EVENT_MARK = ":event_summary:"
_DEFAULT_FOLDER = "runs"

_terminals: list[TextIO] = []


def terminal() -> TextIO:
    """Return the stream that the user sees: stderr as it was before a log redirected it."""
    return _terminals[0] if _terminals else sys.stderr


class LibraryLog:
    """A file that receives stderr and everything that worker processes log or print."""

    def __init__(self, storage_path: str | None) -> None:
        """Open a new file below the runs folder; below ``runs`` where that is remote."""
        folder = Path(_DEFAULT_FOLDER if storage_path is None or "://" in storage_path else storage_path) / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{Path(sys.argv[0]).stem or 'python'}-{time.strftime('%Y%m%d-%H%M%S')}"
        taken = len(list(folder.glob(f"{name}*")))
        self.path = folder / (f"{name}.{taken}.log" if taken else f"{name}.log")
        # Never closed: library threads may write until the process ends.
        self.file: TextIO = self.path.open("a", buffering=1, encoding="utf-8", errors="replace")

    @contextmanager
    def taking_over(self) -> Iterator[None]:
        """Redirect stderr, and the log handlers that write to it, to this file until the block ends."""
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
                if handler.stream is self.file:  # a handler that was created inside the block
                    handler.setStream(sys.stderr)

    def take_workers_lines(self) -> None:
        """Redirect the worker output that Ray would print to this file, until Ray shuts down."""
        from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

        if any(name == _RAYS_PRINTER for name, _ in dispatcher.handlers):
            dispatcher.remove_handler(_RAYS_PRINTER)
            dispatcher.add_handler(_RAYS_PRINTER, self.write_lines)

    def write_lines(self, batch: dict[str, Any]) -> None:
        """Write the lines of one process, in the form in which Ray dispatches them."""
        who = batch.get("actor_name") or batch.get("task_name") or ""
        # The autoscaler reports every five seconds even on a cluster that cannot grow: keep only its events.
        needed = _EVENT_MARK if batch.get("pid") == "autoscaler" else ""
        for line in batch.get("lines", []):
            if _TQDM_MARK not in line and needed in line:
                self.file.write(f"({who} pid={batch.get('pid')}, ip={batch.get('ip')}) {line}\n")


def _stream_handlers() -> Iterator[logging.StreamHandler[Any]]:
    """Yield the handlers of all loggers that write to a stream."""
    loggers = [logging.getLogger(), *logging.root.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", []):  # a PlaceHolder in the logger tree has none
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                yield handler
