"""Answers that a schema, pattern or grammar restricts, of a tiny random model: valid, and no trouble to others."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from engines import answer_all, ask, make_parts, make_requests, request, started, write_adapter
from schemas import make_schema
from tool_models import only_end_token

from llava_ray.errors import RecordError
from llava_ray.generate.constraints.compiling import GrammarCompiler
from llava_ray.generate.constraints.grammars import write_grammar
from llava_ray.generate.constraints.schemas import check_schema
from llava_ray.generate.engine import Constraint, GenerationRequest
from llava_ray.model.assembly import LlavaParts

pytestmark = pytest.mark.slow

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}


def constrained(schema: Any, name: str, **sampling: Any) -> GenerationRequest:
    """A question whose answer a schema restricts."""
    constraint = Constraint("json", json.dumps(schema), "response_format")
    return request("is it red?", name, **{"max_tokens": 300, "ignore_eos": False, "constraint": constraint, **sampling})


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> LlavaParts:
    return only_end_token(make_parts(tmp_path_factory.mktemp("constrained")))


def check_schemas(parts: LlavaParts, seeds: range) -> tuple[int, int]:
    """Answer as many schemas, 32 at a time; return how many answers are whole, and how many were refused."""

    async def run() -> list[Any]:
        engine = await started(parts)
        slots = asyncio.Semaphore(32)

        async def one(seed: int) -> Any:
            async with slots:
                asked = constrained(make_schema(seed), f"s{seed}", temperature=1.0 if seed % 4 else 0.0, seed=seed)
                return await ask(engine, asked)

        try:
            return await asyncio.gather(*map(one, seeds), return_exceptions=True)
        finally:
            await engine.stop()

    num_whole = num_refused = 0
    for seed, answer in zip(seeds, asyncio.run(run()), strict=True):
        schema = make_schema(seed)
        if isinstance(answer, BaseException):
            assert isinstance(answer, RecordError), (seed, answer)
            assert answer.reason == "structured_output"
            num_refused += 1
        elif answer.finish_reason == "stop":
            jsonschema.validate(json.loads(answer.text), schema, cls=jsonschema.Draft202012Validator)
            num_whole += 1
        else:
            assert answer.finish_reason == "length", seed
            assert len(answer.ids) == 300
    return num_whole, num_refused


def test_answers_to_generated_schemas_are_valid(parts: LlavaParts) -> None:
    num_whole, num_refused = check_schemas(parts, range(40))
    assert num_whole >= 30
    assert num_refused <= 4


@pytest.mark.verify
def test_answers_to_a_thousand_generated_schemas_are_valid(parts: LlavaParts) -> None:
    num_whole, num_refused = check_schemas(parts, range(1000, 2000))
    print(f"{num_whole} whole answers valid, {num_refused} schemas refused, the rest ended by length")
    assert num_whole >= 800
    assert num_refused <= 60


def test_answers_without_a_constraint_are_the_same_beside_constrained_ones(parts: LlavaParts) -> None:
    plain = make_requests(16)
    beside = [
        constrained(SCHEMA, f"c{seed}", seed=seed, temperature=0.8, **more)
        for seed, more in enumerate([{}, {"stop": ("a",)}, {"max_tokens": 9}, {"logprobs": 3}] * 4)
    ]
    mixed = [one for pair in zip(plain, beside, strict=True) for one in pair]
    alone = answer_all(parts, plain)
    together = answer_all(parts, mixed)
    assert [answer.ids for answer in together[::2]] == [answer.ids for answer in alone]
    for asked, answer in zip(beside, together[1::2], strict=True):
        if answer.finish_reason == "stop" and not asked.sampling.stop:
            jsonschema.validate(json.loads(answer.text), SCHEMA)
        if asked.sampling.stop:
            assert "a" not in answer.text
        if asked.sampling.logprobs is not None:
            assert all(one.logprob > float("-inf") for chunk in answer.chunks for one in chunk.logprobs)
    # The same seed gives the same answer, whatever is beside it.
    again = answer_all(parts, [beside[0]])[0]
    assert again.ids == together[1].ids


def test_adapters_are_held_too(tmp_path: Path) -> None:
    make_parts(tmp_path / "base")
    folder = write_adapter(tmp_path / "it", make_parts(tmp_path / "base"), seed=4)
    parts = only_end_token(make_parts(tmp_path / "base"))
    asked = [replace(constrained(SCHEMA, f"r{index}"), model=name) for index, name in enumerate((None, "it"))]
    for answer in answer_all(parts, asked, adapters={"it": folder}):
        if answer.finish_reason == "stop":
            jsonschema.validate(json.loads(answer.text), SCHEMA)
        else:
            assert answer.text.lstrip().startswith("{")


@pytest.mark.parametrize(
    ("kind", "text", "pattern"),
    [
        ("regex", r"[a-c]{2}/\d", r"[a-c]{2}/\d"),
        ("regex", "^(yes|no)$", "yes|no"),
        ("regex", " x?", " x?"),
        ("choice", '[" a", "b\\n\\"c"]', ' a|b\n"c'),
        ("grammar", 'start: "<" inner ">"\ninner: inner "x" | "y"', "<yx*>"),
        ("grammar", 'root ::= "yes" | "no"', "yes|no"),
    ],
)
def test_texts_are_exactly_what_is_allowed(parts: LlavaParts, kind: Any, text: str, pattern: str) -> None:
    asked = [
        request(
            "is it?", f"r{seed}", max_tokens=40, temperature=1.0, seed=seed, ignore_eos=seed % 2 == 1,
            constraint=Constraint(kind, text, "field"),
        )
        for seed in range(4)
    ]  # fmt: skip
    for answer in answer_all(parts, asked):
        if answer.finish_reason == "stop":
            jsonschema.validate(answer.text, {"type": "string", "pattern": f"^(?:{pattern})$"})


def test_a_costly_mask_delays_no_other_answer(parts: LlavaParts, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    from llava_ray.generate.constraints.answer_grammar import AnswerGrammar

    compute = AnswerGrammar._compute

    def slow(self: AnswerGrammar) -> None:
        time.sleep(0.4)
        compute(self)

    monkeypatch.setattr(AnswerGrammar, "_compute", slow)

    async def run() -> tuple[float, float]:
        engine = await started(parts)
        try:
            begun = time.monotonic()

            async def timed(asked: GenerationRequest) -> float:
                await ask(engine, asked)
                return time.monotonic() - begun

            waiting = asyncio.create_task(timed(constrained(SCHEMA, "c", max_tokens=10)))
            await asyncio.sleep(0.5)
            plain = await timed(request("is it red?", "p", max_tokens=24))
            return plain, await waiting
        finally:
            await engine.stop()

    plain, costly = asyncio.run(run())
    assert costly > 4.0
    assert plain < costly - 2.0


@pytest.fixture(scope="module")
def compiler(parts: LlavaParts) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(parts.tokenizer, [2])
    yield compiler
    compiler.close()


FALSE_SCHEMAS: list[tuple[Any, str]] = [
    ({"type": "object", "properties": {"n": {"$ref": "#"}}, "required": ["n"]}, "contains itself"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}, "minItems": 1}}}, "itself"),
    ({"anyOf": [{"$ref": "#"}]}, "itself"),
    ({"not": {}}, "f.not: this keyword"),
    ({"properties": {"a": {"if": {}}}}, "f.properties.a.if"),
    ({"items": [{"contains": {}}]}, "f.items.0.contains"),
    ({"properties": {"a": 3}}, "f.properties.a: expected a schema"),
    ([], "expected a JSON Schema"),
]


@pytest.mark.parametrize(("schema", "words"), FALSE_SCHEMAS, ids=str)
def test_schemas_that_cannot_be_held_are_refused_by_their_place(schema: Any, words: str) -> None:
    with pytest.raises(RecordError, match=words) as caught:
        check_schema(schema, "f")
    assert caught.value.field is not None
    assert caught.value.field.startswith("f")


def test_recursion_that_may_end_is_no_fault() -> None:
    node = {
        "type": "object",
        "properties": {"n": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}},
        "required": ["n"],
    }
    check_schema({"$ref": "#/$defs/a", "$defs": {"a": node}}, "f")
    check_schema({"type": "array", "items": {"$ref": "#"}}, "f")
    check_schema({"type": "object", "properties": {"n": {"$ref": "#"}}}, "f")


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("regex", "(a{1000}){1000}"),
        ("regex", "(" * 20_000),
        ("regex", "\ud800"),
        ("grammar", "start: " + "(" * 20_000),
        ("grammar", "root ::= " + "(" * 20_000),
        ("grammar", 'start: s\ns: "a" s'),
        ("json", "[" * 100_000),
        ("json", '{"type":"array","items":' * 5000 + "{}" + "}" * 5000),
        ("json", json.dumps({"enum": [f"v{index}" * 20 for index in range(100_000)]})),
        ("json", '{"pattern": "\\ud800"}'),
        ("json", json.dumps({"allOf": [{"pattern": f".*[{chr(97 + i)}].{{{10 + i}}}"} for i in range(12)]})),
        ("json", json.dumps({"type": "integer", "multipleOf": 999_983})),
    ],
    ids=lambda value: str(value)[:30],
)
def test_hostile_constraints_are_refused(compiler: GrammarCompiler, kind: Any, text: str) -> None:
    constraint = Constraint(kind, text, "guided")
    with pytest.raises(RecordError, match="guided") as caught:
        compiler.grammar(constraint)
    assert caught.value.reason == "structured_output"
    with pytest.raises(RecordError):  # known now
        compiler.grammar(constraint)


def test_compiled_grammars_are_kept_within_a_limit(compiler: GrammarCompiler) -> None:
    for number in range(40):
        text = compiler.grammar(Constraint("regex", f"a{{{number + 1}}}", "f"))
        compiler.matcher(text)
    assert len(compiler._checked) <= 32
    assert len(compiler._compiled) <= 32
    assert write_grammar(Constraint("regex", "a/b", "f"), " ") == 'start: " " body\nbody: /a\\x2fb/\n'
