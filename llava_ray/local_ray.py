"""What a cluster of one run on this machine leaves out of Ray, or starts in another way: processes cost a start's time.

Ray has no settings for these, so its functions are replaced while it starts. A version of Ray that lacks one of them
starts as it always does.
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import ray
from ray._private import parameter, services

from llava_ray.forked_worker import SERVER_VARIABLE
from llava_ray.worker_forks import WORKER_SCRIPT

NO_DASHBOARD_VARIABLE = "LLAVA_RAY_NO_DASHBOARD"  # tells all processes of the cluster that nobody answers for it


@contextlib.contextmanager
def lean_start(*, dashboard: bool) -> Iterator[None]:
    """Start Ray inside the block without what a local run has no use for; ``dashboard`` keeps Ray's State API."""
    changed: dict[str, Any] = {"no_monitor": True}  # the autoscaler's: this cluster has one node, and stays so
    if SERVER_VARIABLE in os.environ:
        changed["worker_path"] = str(WORKER_SCRIPT)
    with contextlib.ExitStack() as replaced:
        with contextlib.suppress(AttributeError):
            replaced.enter_context(
                mock.patch.object(parameter, "RayParams", functools.partial(parameter.RayParams, **changed))
            )
        if not dashboard:
            os.environ[NO_DASHBOARD_VARIABLE] = "1"
            with contextlib.suppress(AttributeError):
                replaced.enter_context(mock.patch.object(services, "start_api_server", _start_no_dashboard))
            # The agent that reports to the dashboard starts in a form of its own, without HTTP and metrics.
            with contextlib.suppress(AttributeError):
                replaced.enter_context(
                    mock.patch.object(ray._private.utils, "get_dashboard_dependency_error", _missing_dashboard)
                )
        yield


def _start_no_dashboard(*arguments: Any, **options: Any) -> tuple[None, None]:
    """Start nothing, and return what ``start_api_server`` does where the dashboard fails to start."""
    del arguments, options
    return None, None


def _missing_dashboard() -> ImportError:
    """Return what Ray finds where only its smaller package is installed."""
    return ImportError("left out")
