"""The cores that a thread computes with."""

from threading import Thread

import torch


def use_one_core() -> None:
    """Let this thread compute with one core; threads that begin later keep their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # of this thread, and of every thread that begins to compute from now on
    keeper = Thread(target=torch.set_num_threads, args=(before,))
    keeper.start()
    keeper.join()
