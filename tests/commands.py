"""Commands as people start them, each in a process group of its own."""

import contextlib
import fcntl
import os
import pty
import random
import signal
import socket
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator, Sequence
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


@contextmanager
def in_terminal(
    command: Sequence[str], log: Path
) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[bytes], object]]]:
    """Start a command in a terminal of its own, whose screen goes to a log; yield what types on its keyboard too.

    Ctrl-C there is b"\\x03", and reaches every process of the foreground group.
    """
    keyboard, terminal = pty.openpty()

    def take() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # what a shell starts in the background ignores it

    def copy() -> None:
        with log.open("ab", buffering=0) as screen:
            try:
                while shown := os.read(keyboard, 65536):
                    screen.write(shown)
            except OSError:  # nobody has the terminal open any more
                return

    process = subprocess.Popen(
        command,
        cwd=log.parent,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=take,
    )
    os.close(terminal)
    reader = threading.Thread(target=copy, daemon=True)
    reader.start()
    try:
        yield process, lambda keys: os.write(keyboard, keys)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join(timeout=10)
        os.close(keyboard)


def imported(*modules: str) -> set[str]:
    """Return the names of all modules that a new process has imported when it has imported these."""
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def free_port() -> int:
    """Return a port that nobody listens on, below those that the system gives away: Ray's processes take such ones."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            port = random.randrange(20_000, 32_000)
            probe.bind(("127.0.0.1", port))
            return port


def descendants(ancestor: int) -> dict[int, str]:
    """Return the command lines of all processes that live and were started by a process, or by one that it started."""
    parents, words = {}, {}
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (OSError, ValueError):
            continue
        if entry.name.isdigit() and fields[0] != "Z":
            parents[int(entry.name)], words[int(entry.name)] = int(fields[1]), title

    def is_of(number: int) -> bool:
        while number in parents and number != ancestor:
            number = parents[number]
        return number == ancestor

    return {number: title for number, title in words.items() if number != ancestor and is_of(number)}


def members(session: int) -> dict[int, str]:
    """Return the command lines of a session's processes that live, by their ids."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (OSError, ValueError):
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found[int(entry.name)] = words
    return found


def kill_one(title: str, session: int, choice: int = 0) -> bool:
    """Send SIGKILL to one of the session's processes whose titles begin so; return whether there was one."""
    found = [number for number, words in members(session).items() if words.startswith(title)]
    if found:
        os.kill(sorted(found)[choice % len(found)], signal.SIGKILL)
    return bool(found)
