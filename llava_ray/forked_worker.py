"""What a local cluster's raylet starts for each worker: asks the fork server for one, and ends.

A script of the standard library alone, because it runs once for every worker. Where no server answers, it becomes an
ordinary worker of Ray itself, so nothing depends on the server. See ``worker_forks``.
"""

import json
import os
import runpy
import signal
import socket
import sys

SERVER_VARIABLE = "LLAVA_RAY_FORK_SERVER"  # the server's socket


def ask_for_worker(address: str) -> bool:
    """Let the fork server start a worker with this process's arguments, environment and files; return whether it did.

    The mask of signals is passed on as well: Ray blocks Ctrl-C in all that it starts, which is for the driver alone.
    """
    request = {
        "arguments": sys.argv[1:],
        "environment": dict(os.environ),
        "folder": os.getcwd(),  # noqa: PTH109 - pathlib takes as long to import as all the rest
        "leads_group": os.getpgrp() == os.getpid(),
        "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
    }
    message = json.dumps(request).encode()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
            server.connect(address)
            socket.send_fds(server, [len(message).to_bytes(8, "big")], [0, 1, 2])
            server.sendall(message)
            return bool(server.recv(16))
    except OSError:
        return False


def main() -> None:
    """Ask for a worker, or become one."""
    address = os.environ.get(SERVER_VARIABLE)
    if address and ask_for_worker(address):
        return
    import ray._private.workers as rays  # a namespace of scripts: its folder is all that is needed

    sys.path.pop(0)  # this script's folder, whose modules are no top-level ones
    runpy.run_path(os.path.join(next(iter(rays.__path__)), "default_worker.py"), run_name="__main__")  # noqa: PTH118


if __name__ == "__main__":
    main()
