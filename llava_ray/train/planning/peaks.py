"""What devices can do at most, from the makers' data sheets: operations per second and bytes of memory per second.

Operations are dense matrix products in bf16; where a GPU has no bf16 (T4, V100, P100), in fp16.
"""

import re

PEAKS: dict[str, tuple[float, float]] = {
    "T4": (65e12, 0.32e12),
    "P100": (18.7e12, 0.73e12),
    "V100": (125e12, 0.9e12),
    "A10G": (70e12, 0.6e12),
    "L4": (121e12, 0.3e12),
    "L40S": (362e12, 0.86e12),
    "A100": (312e12, 1.55e12),
    "A100-40G": (312e12, 1.55e12),
    "A100-80G": (312e12, 2.0e12),
    "H100": (989e12, 3.35e12),
    "H20": (148e12, 4.0e12),
    "H200": (989e12, 4.8e12),
    "B200": (2250e12, 8.0e12),
}
"""By Ray's names of accelerators."""

_OTHERS: dict[str, tuple[float, float]] = {
    "A10": (125e12, 0.6e12),
    "A30": (165e12, 0.93e12),
    "A40": (150e12, 0.7e12),
    "A6000": (155e12, 0.77e12),
    "A800": (312e12, 2.0e12),
    "L40": (181e12, 0.86e12),
    "H100 PCIe": (756e12, 2.0e12),
    "H100 NVL": (835e12, 3.9e12),
    "H200 NVL": (836e12, 4.8e12),
    "H800": (989e12, 3.35e12),
    "GH200": (989e12, 4.0e12),
    "GB200": (2500e12, 8.0e12),
    "RTX 3090": (71e12, 0.94e12),
    "RTX 4090": (165e12, 1.0e12),
    "RTX 5090": (209e12, 1.79e12),
}
"""GPUs that Ray does not name, or not apart from others."""


def find_peak(device_name: str) -> float | None:
    """Return the peak operations per second of a GPU by torch's name of it; None if it is unknown, as a part of one."""
    words = _words(device_name)
    if "mig" in words:
        return None
    known = PEAKS | _OTHERS
    matching = [name for name in known if _words(name) <= words]
    return known[max(matching, key=lambda name: len(_words(name)))][0] if matching else None


def _words(name: str) -> set[str]:
    """Return the words of a device's name."""
    return set(re.split(r"[\s_-]+", name.lower()))
