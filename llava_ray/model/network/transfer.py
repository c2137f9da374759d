"""Copies from the CPU to the device that computes, for which nothing waits."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a CPU tensor on the device. A GPU copies it while it computes: the copy is in order with its own work."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
