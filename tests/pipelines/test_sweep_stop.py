"""Signals to a sweep: the first leaves the block wherever it is, the second ends the process."""

import os
import signal
import subprocess
import sys

import pytest

from llava_ray.errors import Stopped
from pipelines.command import RESUMABLE, SIGNALS
from pipelines.sweep_stop import AT_ONCE, LEAVING, leaving


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_leaves_and_handlers_are_given_back(number, capfd):
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(Stopped) as caught, leaving():
        os.kill(os.getpid(), number)
    assert caught.value.exit_code == 128 + number
    assert LEAVING in capfd.readouterr().err
    assert [signal.getsignal(each) for each in SIGNALS] == before


@pytest.mark.parametrize("own", [KeyboardInterrupt, RuntimeError("the connection is lost"), SystemExit(1)])
def test_what_ray_makes_of_a_signal_is_a_stop(own):
    with pytest.raises(Stopped) as caught, leaving():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Stopped:
            raise own from None
    assert caught.value.exit_code == 143


def test_an_error_without_a_signal_stays_what_it_is():
    with pytest.raises(RuntimeError, match="lost"), leaving():
        raise RuntimeError("lost")


def test_the_second_signal_leaves_at_once(monkeypatch, capfd):
    def end(code: int) -> None:
        raise SystemError(code)  # as the process would, without another handler's word

    monkeypatch.setattr("os._exit", end)
    codes = []
    with pytest.raises(Stopped), leaving():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except SystemError as left:
                codes.append(left.args[0])
    assert codes == [130]
    assert AT_ONCE in capfd.readouterr().err


STOPPED_COMMAND = """
import atexit
from pipelines.command import run_command
from pipelines.sweep_stop import leaving

class Slow:
    def __del__(self):
        print("taken apart")

def main(arguments):
    with leaving():
        raise KeyboardInterrupt

slow = Slow()
atexit.register(print, "said at exit")
run_command(main)
"""


def test_a_stopped_command_ends_after_its_exit_functions():
    ended = subprocess.run([sys.executable, "-c", STOPPED_COMMAND], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "said at exit\n", f"{RESUMABLE}\n")
