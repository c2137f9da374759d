"""First come, first served, a chunk at a time."""

from dataclasses import dataclass

from llava_ray.generate.builtin.scheduling import WaitingQueue, split_prefill_chunk


@dataclass(eq=False)
class Asked:
    num_unread: int
    num_read: int = 0

    @property
    def num_tokens(self) -> int:
        return self.num_read + self.num_unread


def test_nobody_overtakes() -> None:
    line: WaitingQueue[Asked] = WaitingQueue()
    asked = [Asked(size) for size in (5, 50, 5)]
    for one in asked:
        line.join(one)
    room = [20]

    def find_room(one: Asked) -> bool:
        fits = one.num_unread <= room[0]
        room[0] -= one.num_unread if fits else 0
        return fits

    assert line.num_tokens == 60
    assert line.admit(8, find_room) == asked[:1]
    assert line.num_tokens == 55
    assert line.admit(8, find_room) == []
    assert (line.leave(asked[1]), line.leave(asked[1])) == (True, False)
    assert line.admit(0, find_room) == []
    assert line.admit(8, find_room) == asked[2:]
    assert (len(line), line.num_tokens) == (0, 0)


def test_a_chunk_is_shared_in_order() -> None:
    running = [Asked(0, 9), Asked(6, 4), Asked(3), Asked(100), Asked(1)]
    readings = split_prefill_chunk(running, 12)
    assert [(running.index(reading.request), reading.num_tokens) for reading in readings] == [(1, 6), (2, 3), (3, 3)]
    assert readings[0].slots == (4, 10)
    assert split_prefill_chunk(running[:1], 12) == split_prefill_chunk([], 12) == []
