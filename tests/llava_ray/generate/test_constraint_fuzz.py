"""Constraints from hostile clients: each is refused in words, or held, and then every whole text satisfies it."""

import json
import random
import re
import tempfile
from pathlib import Path
from typing import Any

import fakes
import jsonschema
import numpy as np
import pytest
from fuzzing import NUM_INPUTS, Target, fuzz, fuzz_at_length
from schema_mutations import make_constraint
from transformers import AutoTokenizer

from llava_ray.errors import RecordError
from llava_ray.generate.constraints.compiling import GrammarCompiler
from llava_ray.generate.engine import Constraint

_MOST_TOKENS = 200


def make_target() -> Target:
    """Compile a constraint as the service does, and draw an answer of it."""
    folder = fakes.make_tokenizer(Path(tempfile.mkdtemp()))
    compiler = GrammarCompiler(AutoTokenizer.from_pretrained(folder), [fakes.EOS])
    compiler.tables()

    def target(seed: int) -> str:
        constraint = make_constraint(seed)
        try:
            grammar = compiler.grammar(constraint)
        except RecordError as error:
            assert error.reason == "structured_output"
            assert str(error).startswith(constraint.field), str(error)
            assert len(str(error)) < 1000
            return f"{constraint.kind} refused"
        text = draw_text(compiler, grammar, random.Random(seed))
        if text is None:
            return f"{constraint.kind} unfinished"
        return f"{constraint.kind} {check(constraint, text)}"

    return target


def draw_text(compiler: GrammarCompiler, grammar: str, draw: random.Random) -> str | None:
    """Draw a random whole text; None where it is not whole after some tokens."""
    matcher = compiler.matcher(grammar)
    ids: list[int] = []
    while len(ids) < _MOST_TOKENS:
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist()
        if matcher.is_error() or not allowed:
            return None
        if fakes.EOS in allowed and (len(allowed) == 1 or draw.random() < 0.3):
            return compiler.decode(ids)
        token = draw.choice([token for token in allowed if token != fakes.EOS])
        if not matcher.consume_token(token):
            return None
        ids.append(token)
        if matcher.is_stopped():
            return compiler.decode(ids)
    return None


def check(constraint: Constraint, text: str) -> str:
    """Check a whole text with a library of its own."""
    if constraint.kind == "choice":
        assert text in json.loads(constraint.text), (constraint, text)
    elif constraint.kind == "json":
        schema: Any = json.loads(constraint.text)
        try:
            jsonschema.Draft202012Validator.check_schema(schema)
            value = json.loads(text)
            jsonschema.Draft202012Validator(schema).validate(value)
        except jsonschema.SchemaError:
            return "held, though the schema is odd"
        except (re.error, jsonschema.exceptions._WrappedReferencingError):
            return "held, but not to be checked"
    return "held"


@pytest.mark.slow
def test_constraints_are_refused_or_held() -> None:
    report = fuzz("constraints", make_target, NUM_INPUTS)
    assert not report.faults, "\n".join(report.faults)
    assert sum(count for word, count in report.outcomes.items() if word.endswith("held")) > NUM_INPUTS // 4


@pytest.mark.verify
def test_twenty_thousand_constraints_are_refused_or_held() -> None:
    assert not fuzz_at_length("constraints", make_target).faults
