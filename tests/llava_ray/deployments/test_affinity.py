"""A request goes where its text is, then where its images are, then where its session lives."""

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from llava_ray.chat.conversation import Turn
from llava_ray.deployments.affinity import Placements, rank_replicas, read_contents
from llava_ray.deployments.messages import Task
from llava_ray.deployments.routing import SessionRouter

REPLICAS = ["a", "b", "c", "d"]
LONG = "Answer as briefly as you can. " * 40


def chat(*texts: str, media: tuple[str, ...] = (), model: str = "m", system: str | None = None) -> Task:
    turns = tuple(Turn("gpt" if place % 2 else "human", text) for place, text in enumerate(texts))
    return Task("id", model, turns, media=media, system=system)


def holders(placements: Placements, task: Task, replicas: list[str] = REPLICAS) -> list[str]:
    return placements.find_holders(read_contents(task), replicas)


def test_the_next_turn_of_a_chat_finds_the_replica_of_the_last() -> None:
    placements = Placements()
    first = chat(LONG + "What is it?")
    assert holders(placements, first) == []
    placements.record(read_contents(first), "b")
    assert holders(placements, first) == ["b"]
    # However long the answer was: it is where the question was.
    assert holders(placements, chat(LONG + "What is it?", "A cat. " * 2000, "And this?")) == ["b"]
    assert holders(placements, chat(LONG + "What is it?", "A cat.", "And this?"), ["a", "c"]) == []
    assert holders(placements, chat(LONG + "What is that?", "A cat.", "And this?")) == []
    assert holders(placements, chat(LONG + "What is it?", model="adapter")) == []


def test_text_comes_before_images_and_images_before_the_session() -> None:
    placements = Placements()
    picture, other = "data:image/png;base64," + "x" * 90_000, "https://example.org/other.png"
    placements.record(read_contents(chat(f"<image>\n{LONG}", media=(picture,))), "a")
    placements.record(read_contents(chat("<image>\n<image>\nWhat?", media=(other, picture))), "c")
    assert holders(placements, chat(f"<image>\n{LONG}", "Yes.", "Why?", media=(picture,))) == ["a"]
    assert holders(placements, chat("<image>\nAnother question", media=(other,))) == ["c"]
    assert holders(placements, chat("<image>\n<image>\nAnother one", media=(picture, other))) == ["c"]
    assert holders(placements, chat("<image>\nAnother one", media=(picture[:-1] + "y",))) == []
    session = [rank_replicas("s", REPLICAS, found)[0] for found in ([], ["a"], ["c"])]
    assert session[1:] == ["a", "c"]


def test_a_few_words_in_common_are_no_reason_to_go_anywhere() -> None:
    placements = Placements()
    placements.record(read_contents(chat("Hello", system="Be brief.")), "a")
    assert holders(placements, chat("Hello", system="Be brief.")) == []
    # A long system prompt alone decides only where it is most of the request.
    placements.record(read_contents(chat("x" * 5000)), "b")
    assert holders(placements, chat("x" * 4096 + "y" * 1000)) == ["b"]
    assert holders(placements, chat("x" * 2048 + "y" * 9000)) == []


def test_several_replicas_may_hold_one_text_and_sessions_spread_over_them() -> None:
    placements = Placements()
    asked = chat(LONG)
    for replica in ("a", "b", "c", "d", "b"):
        placements.record(read_contents(asked), replica)
    assert holders(placements, asked) == ["b", "d", "c", "a"]
    found = Counter(rank_replicas(str(number), REPLICAS, ["a", "b"])[0] for number in range(200))
    assert set(found) == {"a", "b"}
    assert min(found.values()) > 50


def test_a_session_without_anything_known_keeps_its_replica() -> None:
    homes = [rank_replicas(str(number), REPLICAS, [])[0] for number in range(200)]
    assert min(Counter(homes).values()) > 25
    without = ["a", "b", "c"]
    moved = [rank_replicas(str(number), without, [])[0] for number in range(200)]
    assert all(before == after for before, after in zip(homes, moved, strict=True) if before != "d")


def test_what_is_remembered_is_bounded() -> None:
    placements = Placements(max_keys=100)
    for number in range(1000):
        placements.record(read_contents(chat(f"{number} {LONG}")), "a")
    assert len(placements) <= 100
    assert holders(placements, chat(f"999 {LONG}")) == ["a"]
    assert holders(placements, chat(f"1 {LONG}")) == []


@pytest.mark.parametrize("text", ["", "\ud800 broken", "Größe " * 700])
def test_any_text_has_beginnings(text: str) -> None:
    for task in (chat(text), Task("id", "m", prompt=text), Task("id", "m")):
        contents = read_contents(task)
        assert [one.size for one in contents.beginnings] == sorted(one.size for one in contents.beginnings)
        assert len({one.key for one in contents.beginnings}) == len(contents.beginnings)


def replica(name: str) -> Any:
    return SimpleNamespace(replica_id=SimpleNamespace(unique_id=name))


def pending(task: Task | None, session: str = "s") -> Any:
    metadata = SimpleNamespace(session_id=session)
    return SimpleNamespace(args=[task] if task else [], metadata=metadata, routing_context=SimpleNamespace())


def test_the_router_goes_where_the_text_went_unless_that_is_busy() -> None:
    router = SessionRouter.__new__(SessionRouter)  # the rest of it needs a cluster
    router.placements = Placements()
    queues: dict[str, int] = {}
    router._replica_queue_len_cache = SimpleNamespace(get=lambda found: queues.get(found.unique_id))
    candidates = [replica(name) for name in REPLICAS]

    def choose(request: Any) -> list[list[str]]:
        ranked = asyncio.run(router.choose_replicas(candidates, request))
        return [[one.replica_id.unique_id for one in some] for some in ranked]

    asked = pending(chat(LONG))
    home = choose(asked)[0][0]
    elsewhere = next(name for name in REPLICAS if name != home)
    router.on_request_routed(asked, replica(elsewhere).replica_id, None)
    assert choose(pending(chat(LONG, "Yes.", "Why?"), "another session"))[0] == [elsewhere]
    queues[elsewhere] = 9
    assert choose(pending(chat(LONG, "Yes.", "Why?")))[0][0] == elsewhere
    assert len(choose(pending(chat(LONG, "Yes.", "Why?")))[0]) == 3  # the least busy of three
    assert len(choose(pending(chat(LONG), session=""))[0]) == 2
    assert choose(pending(None))[0] == [home]
    router.on_request_routed(pending(None), replica("a").replica_id, None)
