"""The child process of ``watchdog``: it kills its parent after too long without a heartbeat.

Imports nothing that starts slowly or takes memory: there is one for each replica.
"""

import os
import select
import signal
import sys


def main(parent: int, period_s: float, periods: int) -> None:
    """Read the parent's heartbeats from stdin, and kill it after so many periods in a row without one.

    Periods are counted, not time: time during which the machine was suspended must not count.
    """
    silent = 0
    while silent < periods:
        readable, _, _ = select.select([0], [], [], period_s)
        if not readable:
            silent += 1
        elif os.read(0, 4096):
            silent = 0
        else:
            return  # the parent has ended
    if os.getppid() == parent:
        os.kill(parent, signal.SIGKILL)
        print(f"replica process {parent} hung for {period_s * periods:g} s: killed", file=sys.stderr)  # noqa: T201


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
