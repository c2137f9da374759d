"""Commands as people start them, each in a process group of its own."""

import os
import signal
import socket
import subprocess
import sys
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


def imported(*modules: str) -> set[str]:
    """Return the names of all modules that a new process has imported when it has imported these."""
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def kill_one(title: str, session: int, choice: int = 0) -> bool:
    """Send SIGKILL to one of the session's processes whose titles begin so; return whether there was one."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            own = int((entry / "stat").read_text().rpartition(")")[2].split()[3]) == session
        except (OSError, ValueError):
            continue
        if own and words.startswith(title):
            found.append(int(entry.name))
    if found:
        os.kill(sorted(found)[choice % len(found)], signal.SIGKILL)
    return bool(found)
