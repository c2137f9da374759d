"""The process that forks a local cluster's workers: imports modules once, then forks for each request."""

import atexit
import contextlib
import gc
import importlib
import json
import logging
import os
import runpy
import select
import signal
import socket
import sys
import traceback
import weakref
from pathlib import Path
from typing import Any, NoReturn

_HEADER = 8  # bytes: a request's length


def serve(listener: socket.socket, owner: socket.socket, modules: list[str]) -> NoReturn:
    """Import the modules, and fork a worker for each request, until the owner's end of the pair is closed."""
    try:
        leave_the_owners_things({listener.fileno(), owner.fileno()})
        import ray._raylet

        ray._raylet.setproctitle("llava-ray: forks workers")
        for name in modules:
            with contextlib.suppress(Exception):  # the worker that needs it says what is wrong with it
                importlib.import_module(name)
        if draws_apart():
            gc.freeze()  # or the first collection in each worker would copy all pages
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system takes ended workers away
            while owner not in (ready := select.select([listener, owner], [], [])[0]):
                if ready:
                    fork_for_request(listener, owner)
    finally:
        os._exit(0)


def leave_the_owners_things(keep: set[int]) -> None:
    """Close the owner's files, and forget what it does on signals and at its end: none of it is this process's."""
    # Ctrl-C is for the owner, which stops the run and then this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    atexit._clear()
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]  # temporary folders, for one
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - numbers
        if int(name) > 2 and int(name) not in keep:
            with contextlib.suppress(OSError):
                os.close(int(name))


def keep_random_ids_apart() -> None:
    """Let Ray draw the ids of actor classes from the system while modules are imported.

    Ray's own generator would be seeded by the first of them, and all forks would draw the same ids from it, for
    placement groups among others.
    """
    import ray.actor

    class SystemsRandom:
        """The part of ActorClassID that ``ray.actor`` uses."""

        @staticmethod
        def from_random() -> Any:
            """Draw an id."""
            return ray.ActorClassID(os.urandom(ray.ActorClassID.size()))

    ray.actor.ActorClassID = SystemsRandom


def draws_apart() -> bool:
    """Return whether two forks draw different ids from Ray's generator: it has not been seeded yet."""
    drawn = []
    for _ in range(2):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            import ray

            os.write(writing, ray.WorkerID.from_random().binary())
            os._exit(0)
        os.close(writing)
        drawn.append(os.read(reading, 64))
        os.close(reading)
        os.waitpid(child, 0)
    return drawn[0] != drawn[1]


def fork_for_request(listener: socket.socket, owner: socket.socket) -> None:
    """Fork the worker that a request asks for, and tell its number."""
    connection, _ = listener.accept()
    files: list[int] = []
    with connection, contextlib.suppress(OSError, ValueError):  # it has gone
        header, files, _, _ = socket.recv_fds(connection, _HEADER, 3)
        length, message = int.from_bytes(header, "big"), bytearray()
        while len(message) < length and (part := connection.recv(length - len(message))):
            message += part
        request = json.loads(message)
        worker = os.fork()
        if worker == 0:
            for mine in (listener, owner, connection):
                mine.close()
            become_worker(request, files)
        connection.sendall(str(worker).encode())
    for number in files:
        os.close(number)


def become_worker(request: dict[str, Any], files: list[int]) -> NoReturn:
    """Go on as a worker of Ray, as if its script had been started with the request's arguments."""
    code: Any = 1
    try:
        take_over(request, files)
        import ray
        from ray._private import workers

        atexit.register(ray.shutdown, True)  # as Ray registered it when it was imported

        script = str(Path(next(iter(workers.__path__))) / "default_worker.py")
        sys.path[0] = str(Path(script).parent)
        sys.argv = [script, *request["arguments"]]
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - into the worker's own log
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()
            logging.shutdown()
        os._exit(code)


def take_over(request: dict[str, Any], files: list[int]) -> None:
    """Take the files, folder, environment, group and signals that the requesting process had."""
    for number, own in zip(files, (0, 1, 2), strict=True):
        os.dup2(number, own)
        os.close(number)
    if request["leads_group"]:
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - for as long as the process lives
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    os.chdir(request["folder"])
    gc.enable()
    os.environ.clear()
    os.environ.update(request["environment"])
    import ray._raylet

    ray._raylet.Config.initialize("")  # read Ray's settings in the environment again
    if torch := sys.modules.get("torch"):  # which read OMP_NUM_THREADS when it was imported
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
