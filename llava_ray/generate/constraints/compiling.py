"""Compilation of constraints for one tokenizer: checked in a process with limits, then kept for later requests."""

import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from llava_ray.errors import LlavaRayError, ModelError, RecordError
from llava_ray.generate.constraints.grammars import write_grammar
from llava_ray.generate.constraints.schemas import STRUCTURED_OUTPUT
from llava_ray.generate.engine import Constraint
from llava_ray.images.decoder_starter import DecoderStarter

if TYPE_CHECKING:
    import llguidance

_CHECK_S = 20.0  # of wall time, on a busy machine; the process ends after less than a second of processor time
_MOST_KEPT = 32  # compiled grammars


class CheckerStarter(DecoderStarter):
    """A starter of processes that check one grammar each."""

    module = "llava_ray.generate.constraints.checking_process"
    purpose = "checks grammars"


class GrammarCompiler:
    """The grammars of one tokenizer. Thread-safe; its tables are built at the first use, which takes seconds."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_tokens: Collection[int]) -> None:
        """Initialise for a tokenizer; ``end_tokens`` end an answer, where the grammar allows its end."""
        self._tokenizer = tokenizer
        self.end_tokens = sorted(end_tokens)
        self._building = threading.Lock()
        self._lock = threading.Lock()
        self._tables: llguidance.LLTokenizer | None = None
        self._starter: CheckerStarter | None = None
        self._checked: OrderedDict[tuple[Constraint, str], str | RecordError] = OrderedDict()
        self._compiled: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()

    def tables(self) -> "llguidance.LLTokenizer":
        """Return the tokenizer's tables, built on the first call. Raises ModelError."""
        with self._building:
            if self._tables is None:
                self._tables, self._starter = _build(self._tokenizer, self.end_tokens)
            return self._tables

    def grammar(self, constraint: Constraint, lead: str = "") -> str:
        """Return a constraint's grammar, checked. Raises RecordError for one that cannot be held."""
        key = (constraint, lead)
        with self._lock:
            known = self._checked.get(key)
        if known is None:
            self.tables()
            try:
                known = self._check(constraint, write_grammar(constraint, lead))
            except RecordError as error:
                known = error
            with self._lock:
                _keep(self._checked, key, known)
        if isinstance(known, RecordError):
            raise RecordError(str(known), reason=known.reason, field=known.field)
        return known

    def matcher(self, grammar: str) -> "llguidance.LLMatcher":
        """Return a new matcher of a grammar that was checked."""
        import llguidance

        from llava_ray.generate.constraints.limits import grammar_limits

        with self._lock:
            known = self._compiled.get(grammar)
        if known is None:
            known = llguidance.LLMatcher(self.tables(), grammar, log_level=0, limits=grammar_limits())
            with self._lock:
                _keep(self._compiled, grammar, known)
        return known.deep_copy()

    def decode(self, ids: Sequence[int]) -> str:
        """Decode an answer to exactly the bytes that its grammar has accepted."""
        return self.tables().decode_str(list(ids))

    def close(self) -> None:
        """Stop the checking processes."""
        if self._starter is not None:
            self._starter.close()

    def _check(self, constraint: Constraint, grammar: str) -> str:
        assert self._starter is not None
        field = constraint.field
        process, late = self._starter.start(), threading.Event()

        def give_up() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(_CHECK_S, give_up)
        timer.start()
        try:
            reply, _ = process.ask({"grammar": grammar, "convert": constraint.kind == "grammar"}, b"")
        except (EOFError, OSError) as error:
            if late.is_set():  # not known to be the grammar's fault, and so not kept
                raise ModelError(
                    f"{field} was not compiled within {_CHECK_S:g} s: this machine is busy. Retry."
                ) from error
            raise RecordError(
                f"{field}: compiling it takes more time or memory than is allowed; send a simpler one, with fewer "
                "alternatives and smaller repetitions.",
                reason=STRUCTURED_OUTPUT,
                field=field,
            ) from error
        finally:
            timer.cancel()
            process.close()
        if "error" in reply:
            raise RecordError(
                f"{field} cannot be held: {reply['error']}. Change it.", reason=STRUCTURED_OUTPUT, field=field
            )
        return str(reply["grammar"])


def _keep(kept: "OrderedDict[Any, Any]", key: Any, value: Any) -> None:
    """Keep a value; drop the oldest ones beyond the limit."""
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > _MOST_KEPT:
        kept.popitem(last=False)


def _build(
    tokenizer: PreTrainedTokenizerBase, end_tokens: list[int]
) -> tuple["llguidance.LLTokenizer", CheckerStarter]:
    try:
        import llguidance
    except ImportError as error:
        raise ModelError(
            f"structured answers need llguidance, which cannot be imported ({error}): pip install llguidance."
        ) from error
    if not end_tokens or not tokenizer.is_fast:
        raise ModelError("structured answers need a fast tokenizer with an end token, which this model does not have.")
    backend: Any = tokenizer.backend_tokenizer
    text = backend.to_str()
    try:
        tables = llguidance.LLTokenizer(text, eos_token=end_tokens)
    except Exception as error:  # the library's own errors have no common class
        raise ModelError(f"structured answers: this tokenizer has no tables of bytes ({error}).") from error
    folder = tempfile.mkdtemp(prefix="llava_ray_grammars_")
    file = Path(folder) / "tokenizer.json"
    file.write_text(text)
    starter = CheckerStarter(str(file), ",".join(map(str, end_tokens)))
    weakref.finalize(starter, _remove, file)
    try:
        starter.start().close()
    except LlavaRayError as error:
        raise ModelError(str(error)) from error
    return tables, starter


def _remove(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.parent.rmdir()
