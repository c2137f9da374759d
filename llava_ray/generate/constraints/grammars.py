"""Conversion of constraints to grammars in llguidance's syntax, which both engines take."""

import json
from typing import Any

from llava_ray.errors import RecordError
from llava_ray.generate.constraints.schemas import STRUCTURED_OUTPUT, check_schema
from llava_ray.generate.engine import Constraint

MAX_CHARS = 131_072
# White space between the tokens of JSON: none, one space, or a new line with its indentation. Without a limit a model
# may write nothing else.
_SPACE = r"[ ]|\n[ ]{0,32}"


def write_grammar(constraint: Constraint, lead: str = "") -> str:
    """Return a constraint as a grammar whose texts begin with ``lead``.

    A client's own grammar is returned unchanged, with no lead. Raises RecordError that names the field.
    """
    check_constraint_length(constraint)
    if constraint.kind == "grammar":
        return constraint.text
    start = f"start: {quote(lead)} body" if lead else "start: body"
    return f"{start}\nbody: {_BODIES[constraint.kind](constraint)}\n"


def check_constraint_length(constraint: Constraint) -> None:
    """Check the length of a constraint's text. Raises RecordError."""
    if len(constraint.text) > MAX_CHARS:
        raise RecordError(
            f"{constraint.field} has {len(constraint.text):,} characters; expected at most {MAX_CHARS:,}.",
            reason=STRUCTURED_OUTPUT,
            field=constraint.field,
        )


def write_json(schema: Any, field: str) -> str:
    """Return a JSON Schema as the body of a grammar's rule. Raises RecordError."""
    check_schema(schema, field)
    return "%json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": _SPACE}})


def quote(text: str) -> str:
    """Return a text as a literal of a grammar."""
    return json.dumps(text, ensure_ascii=False)


def _json_body(constraint: Constraint) -> str:
    try:
        schema = json.loads(constraint.text)
    except (ValueError, RecursionError) as error:
        raise RecordError(
            f"{constraint.field} is not JSON ({str(error)[:100]}); expected a JSON Schema.",
            reason=STRUCTURED_OUTPUT,
            field=constraint.field,
        ) from error
    return write_json(schema, constraint.field)


def _regex_body(constraint: Constraint) -> str:
    """Return a pattern between slashes, those inside it escaped."""
    written, place, pattern = [], 0, constraint.text
    while place < len(pattern):
        piece = pattern[place : place + 2] if pattern[place] == "\\" else pattern[place]
        place += len(piece)
        written.append({"/": r"\x2f", "\\/": r"\x2f", "\n": r"\n", "\\\n": r"\n", "\r": r"\r"}.get(piece, piece))
    return f"/{''.join(written)}/"


def _choice_body(constraint: Constraint) -> str:
    return " | ".join(map(quote, json.loads(constraint.text)))


_BODIES = {"json": _json_body, "regex": _regex_body, "choice": _choice_body}
