"""A restricted reader of the pickles that ``torch.save`` writes: a few operations on plain values, and no code.

Python's own unpickler calls any function that a pickle names, allocates a memo as long as the largest index in it, and
sets attributes. This one supports only the operations of PyTorch's tensor pickles and refuses all others.
"""

import math
import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

# Classes of typed storages: torch's name of the dtype, and bytes of one element.
_STORAGES = {
    "DoubleStorage": ("float64", 8),
    "FloatStorage": ("float32", 4),
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2),
    "CharStorage": ("int8", 1),
    "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
}
_MAX_AXES = 8
_MAX_SIDE = 2**48

_KNOWN = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_LITERALS = {
    "BINFLOAT", "BININT", "BININT1", "BININT2", "BINBYTES", "BINSTRING", "BINUNICODE", "BINUNICODE8", "FLOAT", "INT",
    "LONG", "LONG1", "LONG4", "SHORT_BINBYTES", "SHORT_BINSTRING", "SHORT_BINUNICODE", "STRING", "UNICODE",
}  # fmt: skip
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MEMO = {"BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE", "BINGET", "LONG_BINGET", "GET"}
_MARK = object()


class Code(Exception):  # noqa: N818 - a request of the file, not an error in it
    """A pickle refers to a callable that would have to be executed; the argument names it."""


class PickledTensor(NamedTuple):
    """A tensor as its pickle describes it: ``stride`` in elements, ``offset`` in bytes from the file's beginning."""

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    element_size: int

    @property
    def num_bytes(self) -> int:
        """Count its bytes in memory."""
        return math.prod(self.shape) * self.element_size


class Storage(NamedTuple):
    """A range of bytes in the file of which tensors are views."""

    dtype: str
    element_size: int
    offset: int
    num_bytes: int


class PickledName(str):
    """The name of a class or function in the pickle; it is never resolved."""

    __slots__ = ()


def read_tensor_pickle(data: bytes, find_bytes: Callable[[str], tuple[int, int]]) -> object:
    """Return the value of a pickle; ``find_bytes`` returns the offset and size of a storage's bytes.

    Raises Code for one that refers to anything but tensors; ValueError, LookupError or TypeError for a damaged one.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name == "STOP":
            if len(stack) != 1:
                raise ValueError(f"the pickle ends with {len(stack)} values")
            return stack[0]
        if name == "BINPERSID":
            stack.append(_find_storage(stack.pop(), find_bytes))
        elif name in _MEMO:
            _remember(name, argument, stack, memo)
        elif name not in ("PROTO", "FRAME"):
            _apply(name, argument, stack)
    raise ValueError("the pickle has no end")


def _remember(name: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    """Execute a memo operation: store the top of the stack, or push a stored value."""
    if name.endswith("GET"):
        stack.append(memo[int(argument)])
    else:
        memo[len(memo) if name == "MEMOIZE" else int(argument)] = stack[-1]


def _apply(name: str, argument: Any, stack: list[Any]) -> None:
    """Execute one operation on the stack."""
    if name in _LITERALS:
        stack.append(argument)
    elif name in _CONSTANTS:
        stack.append(_CONSTANTS[name])
    elif name in _EMPTY:
        stack.append(_EMPTY[name]())
    elif name in _TUPLES:
        stack[-_TUPLES[name] :] = [tuple(_last(stack, _TUPLES[name]))]
    elif name in _OPERATIONS:
        _OPERATIONS[name](stack)
    elif name == "GLOBAL":
        stack.append(_known(argument))
    elif name in ("INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"):
        raise Code(str(argument or name).replace(" ", "."))
    else:
        raise ValueError(f"{name} is not an operation of tensor pickles")


def _stack_global(stack: list[Any]) -> None:
    own, module = stack.pop(), stack.pop()
    stack.append(_known(f"{module} {own}" if isinstance(module, str) and isinstance(own, str) else "?"))


def _reduce(stack: list[Any]) -> None:
    arguments, function = stack.pop(), stack.pop()
    stack.append(_call(function, arguments))


def _append(stack: list[Any], values: list[Any]) -> None:
    if type(stack[-1]) is not list:
        raise TypeError("values are appended to something other than a list")
    stack[-1].extend(values)


def _last(stack: list[Any], number: int) -> list[Any]:
    if len(stack) < number:
        raise ValueError("a value is missing")
    return stack[-number:]


def _to_mark(stack: list[Any]) -> list[Any]:
    values = []
    while (value := stack.pop()) is not _MARK:
        values.append(value)
    return values[::-1]


def _set(stack: list[Any], pairs: list[Any]) -> None:
    target = stack[-1]
    if type(target) is not dict or len(pairs) % 2:
        raise TypeError("a value is set in something other than a dict")
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        if not isinstance(key, str | int | float | bytes | None):
            raise TypeError(f"a {type(key).__name__} is not a valid key")
        target[key] = value


def _known(name: str) -> PickledName:
    module, _, own = name.partition(" ")
    if name not in _KNOWN and not (module == "torch" and own in _STORAGES):
        raise Code(f"{module}.{own}")
    return PickledName(name)


def _call(function: Any, arguments: Any) -> Any:
    """Build the value of a call to a known name."""
    if not isinstance(function, PickledName) or type(arguments) is not tuple:
        raise TypeError("the pickle calls something other than a name")
    if function == "torch._utils _rebuild_tensor_v2":
        return _rebuild_tensor(*arguments)
    if function == "torch._utils _rebuild_parameter":
        return arguments[0]
    if function == "collections OrderedDict" and not arguments:
        return {}
    raise TypeError(f"{function} is called with {len(arguments)} arguments")


def _find_storage(pid: Any, find_bytes: Callable[[str], tuple[int, int]]) -> Storage:
    if type(pid) is not tuple or len(pid) != 5:
        raise TypeError("a storage is not described by five values")
    kind, storage, key, _, numel = pid
    own = storage.partition(" ")[2] if isinstance(storage, PickledName) else ""
    if kind != "storage" or own not in _STORAGES or not isinstance(key, str) or not _is_size(numel):
        raise ValueError("a storage is of no known kind")
    dtype, element_size = _STORAGES[own]
    offset, num_bytes = find_bytes(key)
    if num_bytes < numel * element_size:
        raise ValueError(f"storage {key} has {num_bytes} bytes of {numel * element_size}")
    return Storage(dtype, element_size, offset, num_bytes)


def _rebuild_tensor(storage: Any, start: Any, shape: Any, stride: Any, *_: Any) -> PickledTensor:
    if not isinstance(storage, Storage) or not _are_sizes(shape) or not _are_sizes(stride) or not _is_size(start):
        raise TypeError("a tensor is not made of a storage and sizes")
    if len(shape) != len(stride):
        raise ValueError(f"a tensor of shape {shape} has strides {stride}")
    last = start + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if 0 not in shape else start
    if 0 not in shape and (last + 1) * storage.element_size > storage.num_bytes:
        raise ValueError(f"a tensor of shape {shape} reaches beyond its storage")
    offset = storage.offset + start * storage.element_size
    return PickledTensor(storage.dtype, shape, stride, offset, storage.element_size)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_SIDE


def _are_sizes(values: Any) -> bool:
    return type(values) is tuple and len(values) <= _MAX_AXES and all(_is_size(value) for value in values)


_OPERATIONS: dict[str, Callable[[list[Any]], None]] = {
    "MARK": lambda stack: stack.append(_MARK),
    "TUPLE": lambda stack: stack.append(tuple(_to_mark(stack))),
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _reduce,
    "BUILD": lambda stack: stack.__delitem__(-1),  # a state dict's metadata
    "SETITEM": lambda stack: _set(stack, [stack.pop(-2), stack.pop()]),
    "SETITEMS": lambda stack: _set(stack, _to_mark(stack)),
    "APPEND": lambda stack: _append(stack, [stack.pop()]),
    "APPENDS": lambda stack: _append(stack, _to_mark(stack)),
}
