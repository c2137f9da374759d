"""How long computing takes: known GPUs, this CPU, and durations in words."""

import pytest

from llava_ray.config.run import ClusterConfig
from llava_ray.train.planning.memory import GPU_MEMORY_GIB
from llava_ray.train.planning.pace import Pace, find_pace, format_duration, known_pace, measure_cpu
from llava_ray.train.planning.peaks import PEAKS, find_peak


def test_every_gpu_whose_memory_is_known_has_a_pace() -> None:
    assert set(PEAKS) == set(GPU_MEMORY_GIB)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA A10G", 70e12),
        ("Tesla T4", 65e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("AMD Instinct MI300X", None),
        ("cpu", None),
    ],
)
def test_peaks_are_found_by_torchs_names(name: str, peak: float | None) -> None:
    assert find_peak(name) == peak


def test_the_slower_of_computing_and_reading_decides() -> None:
    pace = Pace("x", 1e12, 1e9)
    assert pace.seconds(2e12, 1e9) == 2
    assert pace.seconds(2e12, 5e9) == 5


def test_only_what_is_known_has_a_pace() -> None:
    assert find_pace(ClusterConfig(accelerator_type="A100-80G")) == known_pace("A100-80G")
    assert find_pace(ClusterConfig(accelerator_type="TPU")) is None
    assert find_pace(ClusterConfig(address="ray://elsewhere:10001")) is None
    assert find_pace(ClusterConfig(use_gpu=True)) is None


def test_a_cpu_is_measured() -> None:
    pace = measure_cpu()
    assert 1e8 < pace.flops < 1e14
    assert 1e7 < pace.bandwidth < 1e13


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.01, "1 s"), (40, "40 s"), (150, "2 min"), (7_200, "2.0 h"), (40_000, "11 h"), (400_000, "4.6 d")],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert format_duration(seconds) == words
