"""The workers' torch process group, as Ray Train sets it up, but without torch in the driver and the controller.

Ray's own ``TorchConfig`` imports torch in every process that holds it: two processes that compute nothing.
"""

import os
import time
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train.backend import Backend, BackendConfig

_SHUTDOWN_S = 30.0


@dataclass
class ProcessGroupConfig(BackendConfig):
    """The process group of the workers, ``gloo`` or ``nccl``, and the environment in which they import torch.

    A runtime environment of Ray's would have the same effect, but Ray starts each process of one twice.
    """

    backend: str
    timeout_s: int = 1800
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def backend_cls(self) -> type[Backend]:
        """Return what the controller calls."""
        return _ProcessGroup

    def to_dict(self) -> dict[str, Any]:
        """Return the settings, for Ray's records."""
        return {"backend": self.backend, "timeout_s": self.timeout_s}


class _ProcessGroup(Backend):
    """Build the group when the workers have started, and leave it before they end."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Let the workers agree on rank 0's address, and join."""
        assert isinstance(backend_config, ProcessGroupConfig)
        from ray.train._internal.utils import get_address_and_port

        address, port = worker_group.execute_single(0, get_address_and_port)
        size = len(worker_group)
        joining = [
            worker_group.execute_single_async(rank, _join, address, port, rank, size, backend_config)
            for rank in range(size)
        ]
        ray.get(joining)

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Let the workers leave; once one is found gone, the others are ended without it, as they hang."""
        del backend_config
        wait_for_all(worker_group.execute_async(_leave, len(worker_group) > 1), _SHUTDOWN_S)


def wait_for_all(calls: list[ray.ObjectRef], seconds: float) -> bool:
    """Wait for calls of workers, and return whether all were answered; stop waiting once one has failed."""
    end = time.monotonic() + seconds
    while calls:
        done, calls = ray.wait(calls, timeout=max(0.0, end - time.monotonic()))
        try:
            ray.get(done)
        except RayError:
            return False
        if not done:
            return False
    return True


def _join(address: str, port: int, rank: int, size: int, config: ProcessGroupConfig) -> None:
    """Join the process group; runs in a worker."""
    os.environ.update(config.environment)
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address, str(port)
    from ray.train.torch import config as rays  # torch

    rays._set_torch_distributed_env_vars()
    rays._setup_torch_process_group(config.backend, rank, size, "env://", config.timeout_s)


def _leave(destroy: bool) -> None:
    """Leave the process group; runs in a worker."""
    from ray.train.torch.config import _shutdown_torch

    _shutdown_torch(destroy)
