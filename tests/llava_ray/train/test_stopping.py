"""What signals do to a run, and how its bar counts, without a cluster."""

import io
import signal

import pytest
from ray.exceptions import RayActorError

from llava_ray.errors import Stopped
from llava_ray.train import stopping
from llava_ray.train.progress import StepBar
from llava_ray.train.run_recorder import TRAINING, RunProgress
from llava_ray.train.runs import RunFolder
from llava_ray.train.stopping import fit


class Remote:
    """A method of an actor that is called here."""

    def __init__(self, act):
        self.remote = act


class Actor:
    """The journal and Ray's controller in one, in this process."""

    def __init__(self, state=TRAINING, done=6):
        self.calls = []
        self.progress = Remote(lambda: RunProgress(state, 0, done, {}, None, []))
        self.stop = Remote(lambda: self.calls.append("stop"))
        self.abort = Remote(self.give_up)

    def give_up(self):
        self.calls.append("abort")
        raise RayActorError


class Trainer:
    """A trainer to which signals come while it fits."""

    def __init__(self, actor, signals):
        self.actor, self.signals = actor, signals

    def fit(self):
        self.stopping.listen(self.actor)
        for number in self.signals:
            signal.raise_signal(number)


@pytest.fixture
def committed(monkeypatch):
    """The step of the last checkpoint, which tests set."""
    steps = {"step": 4}
    monkeypatch.setattr(stopping.ray, "get", lambda value, timeout=None: value)
    monkeypatch.setattr(stopping, "committed_step", lambda *_: steps["step"])
    monkeypatch.setattr(stopping, "repair_run", lambda _: None)
    return steps


def stop(actor, signals):
    with pytest.raises(Stopped) as caught:
        fit(Trainer(actor, signals), RunFolder("/runs", "r"), actor, 48)
    return caught.value


def test_the_first_signal_saves_and_the_second_leaves(committed, capsys):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    actor = Actor()
    committed["step"] = 6  # the workers have obeyed
    stopped = stop(actor, [signal.SIGTERM])
    assert actor.calls == ["stop"]
    assert str(stopped) == "Stopped. The same command resumes from step 6 of 48; its checkpoint is saved."
    assert stopped.exit_code == 143
    assert "with a checkpoint" in capsys.readouterr().err

    committed["step"] = 4
    stopped = stop(actor := Actor(), [signal.SIGINT, signal.SIGINT])
    assert actor.calls == ["stop", "abort"]
    assert "resumes from step 4 of 48, the last checkpoint: 2 step(s) after it are repeated" in str(stopped)
    assert stopped.exit_code == 130
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_before_the_first_step_there_is_nothing_to_save(committed):
    committed["step"] = 0
    stopped = stop(actor := Actor("loading the model", 0), [signal.SIGINT])
    assert actor.calls == ["abort"]
    assert "before the first checkpoint. The same command starts at the first step" in str(stopped)


def test_a_run_that_reaches_its_end_while_it_is_stopped_has_finished(committed):
    committed["step"] = 48
    fit(Trainer(actor := Actor(), [signal.SIGINT]), RunFolder("/runs", "r"), actor, 48)


def test_the_bar_starts_at_the_restored_step_and_its_rate_is_that_of_the_steps():
    drawn = io.StringIO()
    with StepBar(total=100, initial=40, unit="step", desc="starting workers", file=drawn, ncols=100) as bar:
        bar.start_t -= 300  # five minutes until the workers are there
        bar.show(RunProgress("loading the model", None, 47, {}, None, []))
        bar.show(RunProgress("first batch", 40, 40, {}, None, []))
        bar.show(RunProgress(TRAINING, 40, 50, {"loss": 1.5}, 2.0, []))
    starting, loading, first, training = drawn.getvalue().split("\r")[1:5]
    assert "starting workers:  40%" in starting
    assert "loading the model:  40%" in loading  # steps of an earlier start that no checkpoint has do not count
    assert "40/100 [05:00<?, ?step/s]" in first
    assert "50/100 [05:00<00:25,  2.00step/s, loss=1.5]" in training
