"""Leaving the workers' process group: for how long the controller waits for them."""

from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from llava_ray.train import process_group
from llava_ray.train.process_group import wait_for_all


class Calls:
    """Ray's answers to ``wait`` and ``get``: each call is a list of what it does at every look, None while it waits."""

    def __init__(self, **answers: list[Any]) -> None:
        self.answers, self.looks, self.clock = answers, 0, 0.0

    def wait(self, calls: list[str], *, timeout: float) -> tuple[list[str], list[str]]:
        """Return the first call that is answered; a look takes a second."""
        end = self.clock + timeout
        while self.clock < end:
            self.looks += 1
            for call in calls:
                if self.answers[call][min(self.looks, len(self.answers[call])) - 1] is not None:
                    return [call], [other for other in calls if other != call]
            self.clock += 1
        return [], calls

    def get(self, calls: list[str]) -> None:
        """Raise what a call has raised."""
        for call in calls:
            if isinstance(self.answers[call][-1], Exception):
                raise self.answers[call][-1]


GONE = RayActorError("gone")


@pytest.mark.parametrize(
    ("answers", "expected", "seconds"),
    [
        ({"a": ["left"], "b": [None, None, "left"]}, True, 1),
        ({"a": [None], "b": [None, GONE]}, False, 1),  # the other is stopped, or waits for this one
        ({"a": [GONE], "b": ["left"]}, False, 0),
        ({"a": ["left"], "b": [None]}, False, 30),
        ({}, True, 0),
    ],
)
def test_workers_are_waited_for_until_one_is_found_gone(monkeypatch, answers, expected, seconds):
    calls = Calls(**answers)
    monkeypatch.setattr(ray, "wait", calls.wait)
    monkeypatch.setattr(ray, "get", calls.get)
    monkeypatch.setattr(process_group.time, "monotonic", lambda: calls.clock)
    assert wait_for_all(list(answers), 30.0) is expected
    assert calls.clock == seconds
