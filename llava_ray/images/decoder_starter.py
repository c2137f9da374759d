"""The service's side of decoder processes: start, request and kill."""

import io
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_ray.errors import LlavaRayError
from llava_ray.images.decoder_process import READY, read_message, write_message

_PROJECT = Path(__file__).parents[2]
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
_LOW_PRIORITY = 15
_START_S = 60.0

DecoderReply = tuple[dict[str, Any], bytearray]


class DecoderProcess:
    """A handle of one forked process. All methods are thread-safe; ``ask`` blocks."""

    def __init__(self, requests: io.BufferedWriter, answers: io.BufferedReader) -> None:
        """Wait until the process at the other end is ready. Raises EOFError, OSError."""
        self._requests, self._answers = requests, answers
        self.pid = int(read_message(answers)[0]["ready"])
        self._handle = os.pidfd_open(self.pid)  # unlike a pid, it never refers to another process later
        self.kill = weakref.finalize(self, _end, self._handle)
        """Kill the process."""

    def close(self) -> None:
        """Kill the process, and close the pipes to it."""
        self.kill()
        for pipe in (self._requests, self._answers):
            try:
                pipe.close()
            except OSError:  # a request that it has not read
                continue

    def ask(self, head: Mapping[str, Any], data: bytes) -> DecoderReply:
        """Send a request and wait for the answer. Raises EOFError, OSError when the process ends first."""
        write_message(self._requests, head, data)
        return read_message(self._answers)

    def is_alive(self) -> bool:
        """Return whether the process is still running."""
        return not select.select([self._handle], [], [], 0)[0]

    def processor_s(self) -> float:
        """Return the process's CPU time in seconds; 0 if it has ended."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def lower_priority(self) -> None:
        """Lower the process's scheduling priority."""
        try:
            os.setpriority(os.PRIO_PROCESS, self.pid, _LOW_PRIORITY)
        except OSError:  # it has just ended
            return


class DecoderStarter:
    """A starter of decoders, which forks them from a template process that is started once."""

    module = "llava_ray.images.decoder_process"
    purpose = "decodes images"

    def __init__(self, *arguments: str) -> None:
        """Create the starter; the template process starts on demand, with these further arguments."""
        self._arguments = arguments
        self._lock = threading.Lock()
        self._template: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def start(self) -> DecoderProcess:
        """Start a new decoder. Raises LlavaRayError where none can start."""
        with self._lock:
            try:
                return self._fork()
            except (EOFError, OSError):  # the template has died: start another one
                self._stop()
            try:
                return self._fork()
            except (EOFError, OSError) as error:
                raise LlavaRayError(f"no process that {self.purpose} can be started ({error!r})") from error

    def close(self) -> None:
        """Stop the template; decoders run until they are killed."""
        with self._lock:
            self._stop()

    def _fork(self) -> DecoderProcess:
        control = self._connected()
        request_end, requests = os.pipe()
        answers, answer_end = os.pipe()
        writer, reader = os.fdopen(requests, "wb"), os.fdopen(answers, "rb")
        try:
            socket.send_fds(control, [b"f"], [request_end, answer_end])
        finally:
            os.close(request_end)
            os.close(answer_end)
        return DecoderProcess(writer, reader)

    def _connected(self) -> socket.socket:
        if self._control is not None:
            return self._control
        ours, theirs = socket.socketpair()
        ours.settimeout(_START_S)
        path = os.pathsep.join([str(_PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with theirs:
            self._template = subprocess.Popen(
                [sys.executable, "-P", "-m", self.module, str(theirs.fileno()), *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **_ONE_THREAD, "PYTHONPATH": path},
            )
        weakref.finalize(self, _stop_template, self._template)
        if ours.recv(1) != READY:
            code = self._template.wait()
            raise LlavaRayError(
                f"the process that {self.purpose} did not start (exit code {code}); the log of this process says why"
            )
        self._control = ours
        return ours

    def _stop(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._template is not None:
            _stop_template(self._template)


def _stop_template(template: "subprocess.Popen[bytes]") -> None:
    template.kill()
    template.wait()


def _end(handle: int) -> None:
    try:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
    except ProcessLookupError:
        pass
    finally:
        os.close(handle)
