"""The canonical request: the same call is the same key, and anything else is another."""

import base64
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from pictures import picture

from llava_ray.config.review import JudgeConfig
from llava_ray.errors import DataError
from llava_ray.review.calls import CallPlan, Item, list_judges, with_image
from llava_ray.review.prices import find_price
from llava_ray.review.rubric import Rule, build_default_rubric

ITEM = Item("q1", "What?", ("A bus.", "Two dogs."), ("reference", "model"), "conv", {"caption": "A bus."})


def plan(items: list[Item], *, both_orders: bool = True, samples: int = 1, **judge: Any) -> CallPlan:
    config = JudgeConfig(**{"model": "gpt-4-0613", **judge})
    return CallPlan(items, build_default_rubric("pair"), list_judges(config), both_orders=both_orders, samples=samples)


def key(item: Item = ITEM, **judge: Any) -> str:
    return plan([item], **judge)[0].key


def test_the_same_call_has_the_same_key_and_any_change_another() -> None:
    changed = {
        key(),
        key(dataclasses.replace(ITEM, question="Where?")),
        key(dataclasses.replace(ITEM, answers=("A bus.", "Three dogs."))),
        key(dataclasses.replace(ITEM, context=None)),
        key(dataclasses.replace(ITEM, category="detail")),
        key(model="gpt-4o-2024-08-06"),
        key(base_url="http://127.0.0.1/v1"),
        key(temperature=0.0),
        key(max_tokens=512),
        key(seed=1),
        key(response_format="json_schema"),
    }
    assert len(changed) == 11
    assert key(response_format="json_schema") == "7d555ab4984b38da2fb4a1d3573588b9"  # as before its scores had bounds
    assert key() == key(dataclasses.replace(ITEM, id="another question in the same words", names=("a", "b")))
    assert key(base_url="https://api.openai.com/v1/") == key()
    other = build_default_rubric("pair")
    other = dataclasses.replace(other, rules={"conv": Rule("Rate.")})
    found = CallPlan([ITEM], other, list_judges(JudgeConfig(model="gpt-4-0613")), both_orders=True, samples=1)
    assert found[0].key not in changed


def test_orders_samples_and_judges_are_calls_of_their_own() -> None:
    found = plan(
        [ITEM], samples=3, others=("gpt-4o", "mine=http://127.0.0.1:8000/v1"), input_dollars=1, output_dollars=1
    )
    assert len(found) == len({call.key for call in found}) == 2 * 3 * 3
    assert {call.judge for call in found} == {"gpt-4-0613", "gpt-4o", "mine at 127.0.0.1:8000"}
    given, swapped = found[0], found[1]
    assert given.body["messages"][1]["content"].index("A bus.\n\n[End") < given.body["messages"][1]["content"].index(
        "Two"
    )
    assert swapped.body["messages"][1]["content"].index("Two") < swapped.body["messages"][1]["content"].index(
        "A bus.\n\n[End"
    )
    assert len(plan([ITEM], both_orders=False)) == 1


def test_an_image_is_part_of_the_key_and_travels_beside_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(picture(colour="red"))
    seen = dataclasses.replace(ITEM, image=path)
    red = plan([seen], sees_images=True)[0]
    assert key(seen) == key()  # not sent: not part of the request
    assert red.key != key()
    body = with_image(red.body, red.with_image_content().image_content)
    image, text = body["messages"][-1]["content"]
    assert base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,")) == path.read_bytes()
    assert text["text"] == red.body["messages"][-1]["content"]
    path.write_bytes(picture(colour="blue"))
    assert plan([seen], sees_images=True)[0].key != red.key
    path.write_bytes(b"BM")
    with pytest.raises(DataError, match="is no PNG, JPEG, WebP or GIF"):
        plan([seen], sees_images=True)[0].with_image_content()
    path.unlink()
    with pytest.raises(DataError, match="item 'q1': cannot read the image"):
        plan([seen], sees_images=True)[0].with_image_content()


def test_the_largest_cost_is_one() -> None:
    call = plan([dataclasses.replace(ITEM, question="Ü" * 100)])[0]
    bytes_sent = sum(len(message["content"].encode()) for message in call.body["messages"])
    assert call.dollars >= (bytes_sent * 30 + 1024 * 60) / 1e6
    assert call.tokens >= bytes_sent / 4 + 1024


def test_prices() -> None:
    assert find_price(JudgeConfig(model="gpt-4"), "gpt-4") == find_price(JudgeConfig(model="x"), "gpt-4-0613")
    assert find_price(JudgeConfig(model="x"), "x") is None
    own = find_price(JudgeConfig(model="x", input_dollars=1, output_dollars=2), "x")
    assert own is not None
    assert own.cost(1_000_000, 500_000) == 2.0
    table = find_price(JudgeConfig(model="gpt-4o"), "gpt-4o")
    half = find_price(JudgeConfig(model="gpt-4o", delivery="batch"), "gpt-4o")
    assert table is not None
    assert half is not None
    assert table.cost(1000, 1000, 400) == pytest.approx(600 * 2.5e-6 + 400 * 1.25e-6 + 1e-2)
    assert half.cost(1000, 1000) == pytest.approx(table.cost(1000, 1000) / 2)


def test_only_explanations_of_other_judges_than_openais_are_bounded() -> None:
    def explanation(**judge: Any) -> Any:
        body = plan([ITEM], response_format="json_schema", **judge)[0].body
        return body["response_format"]["json_schema"]["schema"]["properties"]["explanation"]

    assert explanation() == {"type": "string"}
    assert explanation(base_url="http://127.0.0.1:8000/v1") == {"type": "string", "maxLength": 924}
    assert explanation(base_url="http://127.0.0.1:8000/v1", max_tokens=16) == {"type": "string", "maxLength": 40}
