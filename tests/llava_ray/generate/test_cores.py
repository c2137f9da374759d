"""Threads that compute with one core beside one that has all."""

from concurrent.futures import ThreadPoolExecutor

import torch

from llava_ray.generate.builtin.cores import use_one_core


def test_only_the_thread_itself_has_one_core() -> None:
    before = torch.get_num_threads()
    with ThreadPoolExecutor(1, initializer=use_one_core) as alone, ThreadPoolExecutor(1) as other:
        assert alone.submit(torch.get_num_threads).result() == 1
        assert other.submit(torch.get_num_threads).result() == before
    assert torch.get_num_threads() == before
