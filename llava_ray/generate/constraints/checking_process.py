"""Processes that compile one grammar each, within limits of time and memory that the kernel enforces.

A grammar comes from a client and may be hostile. A template process, which has built the tokenizer's tables, forks a
process for each grammar in milliseconds; one that takes too long, too much memory or crashes does no harm.
"""

import gc
import os
import re
import resource
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import llguidance
import numpy as np
from llguidance.gbnf_to_lark import any_to_lark

from llava_ray.generate.constraints.limits import grammar_limits
from llava_ray.images.decoder_process import READY, read_message, write_message

CPU_S = 0.7
_SPARE_BYTES = 512 * 2**20
_NUM_STEPS = 24  # tokens that are drawn as a trial
_SHOWN_CHARS = 300


def main() -> None:
    """Fork a process for each pair of pipes received through a socket, until it is closed."""
    control = socket.socket(fileno=int(sys.argv[1]))
    end_tokens = [int(token) for token in sys.argv[3].split(",")]
    tokenizer = llguidance.LLTokenizer(Path(sys.argv[2]).read_text(), eos_token=end_tokens)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended processes are reaped automatically
    gc.freeze()
    control.sendall(READY)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # clients must not be able to fill the log
    while True:
        message, pipes, _, _ = socket.recv_fds(control, 1, 2)
        if not message:
            return
        if os.fork() == 0:
            control.close()
            try:
                _answer(tokenizer, pipes)
            finally:
                os._exit(0)
        for pipe in pipes:
            os.close(pipe)


def _answer(tokenizer: llguidance.LLTokenizer, pipes: list[int]) -> None:
    """Receive one grammar and send whether it can be held."""
    source, sink = os.fdopen(pipes[0], "rb"), os.fdopen(pipes[1], "wb")
    write_message(sink, {"ready": os.getpid()})
    head, _ = read_message(source)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + _SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    write_message(sink, check_grammar(tokenizer, head["grammar"], convert=head["convert"]))


def check_grammar(tokenizer: llguidance.LLTokenizer, grammar: str, *, convert: bool) -> dict[str, Any]:
    """Compile a grammar, draw a few tokens of it, and return it, or ``error``. ``convert`` reads GBNF too."""
    try:
        grammar = any_to_lark(grammar) if convert else grammar
    except Exception as error:  # noqa: BLE001 - the converter raises whatever its recursion meets
        return {"error": f"it is neither Lark nor GBNF ({str(error)[:_SHOWN_CHARS]})"}
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=grammar_limits())
    if matcher.is_error():
        return {"error": _first_lines(matcher.get_error())}
    random = np.random.default_rng(0)
    for _ in range(_NUM_STEPS):
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little")[: tokenizer.vocab_size])
        if matcher.is_error() or not len(allowed):
            return {"error": _first_lines(matcher.get_error()) or "no text satisfies it"}
        token = int(random.choice(allowed))
        if token in tokenizer.eos_tokens:
            break
        if not matcher.consume_token(token):
            return {"error": _first_lines(matcher.get_error())}
        if matcher.is_stopped():
            break
    return {"grammar": grammar}


def _first_lines(error: str) -> str:
    """Return what an error says, without the excerpt of the grammar and the parser's state behind it."""
    text = error.partition("<state>")[0].partition("<non-verbose/>")[0].partition("\n   1 |")[0]
    text = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", text)
    return " ".join(text.split())[:_SHOWN_CHARS].rstrip(". ")


if __name__ == "__main__":
    main()
