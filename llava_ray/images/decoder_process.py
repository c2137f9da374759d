"""Processes that decode one image after the other, within limits of memory and time that the kernel enforces.

A template process, which has imported everything that decoding needs, forks them on request of `decoder_pool`, so that
each starts in milliseconds. A decoder reads requests from a pipe and ends when it is closed. Messages are two lengths,
a JSON object and raw bytes, not pickles, so that a compromised decoder cannot run code in the service.
"""

import gc
import io
import json
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava_ray.errors import ImageError
from llava_ray.images.containers import identify_format
from llava_ray.images.containers.webp import canvas_size
from llava_ray.images.geometry import ImageSpec
from llava_ray.images.opening import decode_image, measure_image, open_header
from llava_ray.images.views import cut_views

_LENGTHS = struct.Struct(">II")
READY = b"r"

# Memory for decoding beyond the file: openjpeg and libwebp, which need most, take some 20 bytes a pixel.
_SPARE_BYTES = 96 * 2**20
_BYTES_PER_FILE_BYTE = 4
_BYTES_PER_PIXEL = 32


def write_message(stream: io.BufferedWriter, head: Mapping[str, Any], payload: bytes | memoryview = b"") -> None:
    """Send one message."""
    encoded = json.dumps(head).encode()
    stream.write(_LENGTHS.pack(len(encoded), len(payload)) + encoded)
    stream.write(payload)
    stream.flush()


def read_message(stream: io.BufferedReader) -> tuple[dict[str, Any], bytearray]:
    """Receive one message. Raises EOFError when the other side has closed the stream."""
    head_length, payload_length = _LENGTHS.unpack(_read_exactly(stream, _LENGTHS.size))
    head = json.loads(_read_exactly(stream, head_length))
    return head, _read_exactly(stream, payload_length)


def _read_exactly(stream: io.BufferedReader, length: int) -> bytearray:
    """Read exactly ``length`` bytes. Raises EOFError."""
    data = bytearray(length)
    if stream.readinto(data) < length:
        raise EOFError("the other side has closed the stream")
    return data


def main() -> None:
    """Fork a decoder for each pair of pipes received through a socket, until it is closed."""
    control = socket.socket(fileno=int(sys.argv[1]))
    Image.init()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended decoders are reaped automatically
    gc.freeze()  # keeps the loaded objects in pages that forks share
    control.sendall(READY)
    # libtiff prints a warning for each damaged file, and clients must not be able to fill the log.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    while True:
        message, pipes, _, _ = socket.recv_fds(control, 1, 2)
        if not message:
            return
        if os.fork() == 0:
            control.close()
            try:
                _decode_all(os.fdopen(pipes[0], "rb"), os.fdopen(pipes[1], "wb"))
            finally:
                os._exit(0)
        for pipe in pipes:
            os.close(pipe)


def _decode_all(source: io.BufferedReader, sink: io.BufferedWriter) -> None:
    """Answer requests until there are no more."""
    base_bytes = _address_space()
    write_message(sink, {"ready": os.getpid()})
    while True:
        try:
            head, data = read_message(source)
        except EOFError:
            return
        answer, payload = answer_safely(head, bytes(data), base_bytes)
        write_message(sink, answer, payload)
        del data, payload


def answer_safely(head: Mapping[str, Any], data: bytes, base_bytes: int) -> tuple[dict[str, Any], bytes | memoryview]:
    """Answer one request, whatever its outcome, with a message."""
    # Their default action ends a process whatever code it runs, even if its parent is gone.
    signal.setitimer(signal.ITIMER_PROF, head["cpu_s"])
    signal.setitimer(signal.ITIMER_REAL, head["wall_s"])
    try:
        return answer_request(head, data, base_bytes)
    except ImageError as error:
        return {"error": str(error), "reason": error.reason}, b""
    except MemoryError:
        return {
            "error": f"{head['name']}: decoding it takes more memory than is allowed",
            "reason": "image_too_costly",
        }, b""
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _allow_bytes(None)


def answer_request(head: Mapping[str, Any], data: bytes, base_bytes: int) -> tuple[dict[str, Any], bytes | memoryview]:
    """Execute a request. Raises ImageError, MemoryError."""
    name, base = head["name"], base_bytes + _SPARE_BYTES + (1 + _BYTES_PER_FILE_BYTE) * len(data)
    # Two limits: a small one while the header is parsed, then one that fits the size that the header declares.
    width, height = canvas_size(data) if identify_format(data) == "WEBP" else (1, 1)
    _allow_bytes(base + _BYTES_PER_PIXEL * min(width * height, head["max_pixels"]))
    image = open_header(data, name, max_pixels=head["max_pixels"], max_frames=head.get("max_frames"))
    _allow_bytes(base + _BYTES_PER_PIXEL * image.width * image.height)
    if head["task"] == "header":
        return {"size": image.size}, b""
    if head["task"] == "check":
        return {"size": measure_image(image, name)}, b""
    spec = head["spec"] and ImageSpec.from_dict(head["spec"])
    opened = cut_views(decode_image(image, name), spec)
    return {"size": opened.size, "shape": opened.pixels.shape}, np.ascontiguousarray(opened.pixels).data.cast("B")


def _address_space() -> int:
    """Return the size of this process's address space in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _allow_bytes(limit: int | None) -> None:
    """Limit the address space; allocations beyond it fail."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    soft = hard if limit is None else limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


if __name__ == "__main__":
    main()
