"""Commands as people start them, each in a process group of its own."""

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def running(command: Sequence[str], log: Path, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a command in the folder of its log; end what is left of it afterwards."""
    with log.open("ab") as said:
        process = subprocess.Popen(
            command, cwd=log.parent, stdout=said, stderr=said, start_new_session=True, env=os.environ | variables
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
