"""Checks of image processor settings, made before anything of the declared size is allocated. No torch."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from llava_ray.errors import ModelError
from llava_ray.reading import short_repr

_MAX_SIDE = 2**13
_MAX_PATCHES = 2**16
_RESAMPLE = range(6)  # Pillow's filters
_SWITCHES = ("do_center_crop", "do_convert_rgb", "do_normalize", "do_rescale", "do_resize")


def check_preprocessor(values: Mapping[str, Any], where: str) -> None:
    """Raise ModelError that names the key of an invalid setting."""
    for key in ("size", "crop_size", "pad_size"):
        size = values.get(key)
        sides = size if isinstance(size, Mapping) else {"": size}
        for name, side in sides.items():
            if side is not None and not _is_count(side, _MAX_SIDE):
                raise _unfit(where, f"{key}.{name}".strip("."), side, f"pixels, from 1 to {_MAX_SIDE:,}")
    for key, most in (("patch_size", _MAX_SIDE), ("max_num_patches", _MAX_PATCHES)):
        value = values.get(key)
        # In transformers' LLaVA processors it may be a table, which nothing reads.
        if value is not None and not isinstance(value, Mapping) and not _is_count(value, most):
            raise _unfit(where, key, value, f"a number from 1 to {most:,}")
    for key, expected, fits in _CHECKS:
        value = values.get(key)
        if value is not None and not fits(value):
            raise _unfit(where, key, value, expected)


def _is_triple(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(map(_is_finite, value))


def _is_count(value: object, most: int) -> bool:
    return type(value) is int and 1 <= value <= most


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _unfit(where: str, key: str, value: object, expected: str) -> ModelError:
    return ModelError(f"{where}: {key} is {short_repr(value)}, expected {expected}; fix it, or copy the file again.")


_CHECKS: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("image_mean", "three numbers", _is_triple),
    ("image_std", "three numbers above 0", lambda value: _is_triple(value) and min(value) > 0),
    ("rescale_factor", "a number above 0", lambda value: _is_finite(value) and value > 0),
    ("resample", "one of Pillow's filters, 0 to 5", lambda value: isinstance(value, int) and value in _RESAMPLE),
    *((key, "true or false", lambda value: isinstance(value, bool)) for key in _SWITCHES),
)
