"""Calls in answers of all formats, read from pieces that are split anywhere."""

import random

import pytest

from llava_ray.chat.tool_formats import TOOL_FORMATS, CallReader

NAMES = ("f", "g", "get_weather")
CALL = ("f", '{"x": "a}\\"{<", "y": [1, {"z": null}]}')

CASES: list[tuple[str, str, str, list[tuple[str, str]]]] = [
    ("hermes", f'<tool_call>\n{{"name": "f", "arguments": {CALL[1]}}}\n</tool_call>', "", [CALL]),
    (
        "hermes",
        'I look.\n\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n'
        '<tool_call>\n{"arguments": {"a": 1}, "name": "g"}\n</tool_call>',
        "I look.",
        [("f", "{}"), ("g", '{"a": 1}')],
    ),
    ("hermes", "a < b <tool_ca x  ", "a < b <tool_ca x  ", []),
    ("hermes", "Größe <tool_call", "Größe <tool_call", []),
    ("hermes", '<tool_call>\n{"name": "no", "arguments": {}}\n</tool_call> x', None, []),  # type: ignore[list-item]
    ("hermes", "<tool_call> garbage </tool_call>", None, []),  # type: ignore[list-item]
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1', "", [("f", '{"a": 1')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call> done', "done", [("f", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    ("llama_json", '{"name": "f", "parameters": {"x": 1}}', "", [("f", '{"x": 1}')]),
    (
        "llama_json",
        '<|python_tag|>{"name": "f", "parameters": {"x": 1}}; {"name": "g", "parameters": {}}',
        "",
        [("f", '{"x": 1}'), ("g", "{}")],
    ),
    ("llama_json", '{"name": "Bob", "age": 3}', None, []),  # type: ignore[list-item]
    ("llama_json", '{"age": 3}', None, []),  # type: ignore[list-item]
    ("llama_json", 'Hello {"name": "f", "parameters": {}}', None, []),  # type: ignore[list-item]
    (
        "mistral",
        '[TOOL_CALLS][{"name": "f", "arguments": {"x": [1, 2]}}, {"name": "g", "arguments": {}, "id": "a"}]',
        "",
        [("f", '{"x": [1, 2]}'), ("g", "{}")],
    ),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}]', "", [("f", '{"x": 1}')]),
    (
        "mistral",
        '[TOOL_CALLS]get_weather[ARGS]{"city": "Pa}ris"}[TOOL_CALLS]f{"x": 1}',
        "",
        [("get_weather", '{"city": "Pa}ris"}'), ("f", '{"x": 1}')],
    ),
    ("mistral", "text [TOOL", "text [TOOL", []),
    (
        "pythonic",
        '[f(x=1, s="a)b\\n", b=true, n=None, l=[1, {"a": False}]), g()]',
        "",
        [("f", '{"x": 1, "s": "a)b\\n", "b": true, "n": null, "l": [1, {"a": false}]}'), ("g", "{}")],
    ),
    ("pythonic", "[1, 2]", "[1, 2]", []),
    ("pythonic", "[f(x=", "[f(x=", []),
    ("pythonic", "[f(1)]", "[f(1)]", []),
    ("pythonic", "[nope(x=1)]", "[nope(x=1)]", []),
    ("pythonic", "hello [f(x=1)]", "hello [f(x=1)]", []),
]


def read(name: str, pieces: list[str], most: int | None = None) -> tuple[str, list[tuple[str, str]]]:
    reader = CallReader(TOOL_FORMATS[name], NAMES, most=most)
    text, calls = "", []
    for delta in [*map(reader.push, pieces), reader.finish()]:
        text += delta.text
        for call in delta.calls:
            if call.index == len(calls):
                calls.append((call.name, call.arguments))
            else:
                known, arguments = calls[call.index]
                calls[call.index] = (known + call.name, arguments + call.arguments)
    return text, calls


@pytest.mark.parametrize(("name", "answer", "text", "calls"), CASES, ids=lambda value: str(value)[:40])
def test_calls_are_read_from_answers_split_anywhere(
    name: str, answer: str, text: str | None, calls: list[tuple[str, str]]
) -> None:
    expected = (answer if text is None else text, calls)
    assert read(name, [answer]) == expected
    assert read(name, list(answer)) == expected
    for first in range(len(answer) + 1):
        assert read(name, [answer[:first], answer[first:]]) == expected
        second = (first + len(answer)) // 2
        assert read(name, [answer[:first], answer[first:second], answer[second:]]) == expected


def test_arguments_come_as_they_are_written() -> None:
    reader = CallReader(TOOL_FORMATS["hermes"], NAMES)
    assert reader.push("Let me see. ").text == "Let me see."
    assert reader.push('<tool_call>{"name": "f", "argu').calls == ()
    [begun] = reader.push('ments": {"x').calls
    assert (begun.index, begun.name, begun.arguments) == (0, "f", '{"x')
    [more] = reader.push('": 1').calls
    assert (more.name, more.arguments) == ("", '": 1')
    assert reader.push("}}\n</tool_call>").calls[0].arguments == "}"
    assert reader.finish().text == ""


def test_only_the_first_call_is_told_where_calls_may_not_be_parallel() -> None:
    for name, answer, _, calls in CASES:
        assert read(name, list(answer), most=1)[1] == calls[:1]


PIECES = [
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", *'{}[]":,;() \n=1fgé', "\\", '"name"',
    '"arguments"', '"parameters"', '{"name": "f", "arguments": {"x": 1}}', '{"x":1}', "f(x=1)",
]  # fmt: skip


def test_damaged_calls_are_read_alike_however_they_are_split() -> None:
    draw = random.Random(0)
    for _ in range(1500):
        name, answer, *_ = draw.choice(CASES)
        for _ in range(draw.randint(0, 4)):
            start = draw.randint(0, len(answer))
            stop = min(len(answer), start + draw.choice([0, 0, 1, 3, 10]))
            answer = answer[:start] + draw.choice(PIECES) * draw.choice([1, 1, 2]) + answer[stop:]
        name, place = draw.choice([name, name, *TOOL_FORMATS]), draw.randint(0, len(answer))
        whole = read(name, [answer])
        assert whole == read(name, list(answer)) == read(name, [answer[:place], answer[place:]]), (name, answer)


def test_deep_and_long_answers_cost_no_more_than_their_length() -> None:
    deep = "[" * 50_000
    assert read("pythonic", [f"[f(x={deep}"])[1] == []
    text, calls = read("hermes", [f'<tool_call>{{"name": "f", "arguments": {{"x": {deep}', deep])
    assert (text, len(calls)) == ("", 1)
    assert read("llama_json", ['{"a": ' * 20_000])[1] == []
