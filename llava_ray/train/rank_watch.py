"""The recorder's view of every rank: how far it is, which ranks do not answer, and the stacks of a run that hangs.

Time is counted in the ranks' own heartbeats, not read from a clock: a machine that slept wakes up with nobody late.
"""

from dataclasses import dataclass, field

# So many heartbeats of another rank without one of its own, and a rank counts as not answering.
SILENT_BEATS = 12
STACKS_BEATS = 2  # heartbeats within which the other ranks have sent their stacks


@dataclass(frozen=True)
class Position:
    """The position of a rank's loop; sent with every heartbeat."""

    process: str
    """Its process, for people: pid and host. Another one at the same rank is a restarted worker."""
    marks: int
    """How often the loop has made progress since this worker started."""
    doing: str
    """What it does, for people, such as "step 12, row 1 of 2"."""
    memory: str = ""
    """Its memory and what is free on its node, for people."""


@dataclass(frozen=True)
class Orders:
    """The recorder's answer to a heartbeat."""

    total_marks: int
    """Of all ranks: while it grows, some rank makes progress."""
    silent: tuple[int, ...] = ()
    """Ranks that do not answer."""
    send_stacks: bool = False
    """Whether another rank has found that the run hangs."""


@dataclass
class RankWatch:
    """Collect heartbeats and, when ranks find that no rank makes progress, their stacks."""

    positions: dict[int, Position] = field(default_factory=dict)
    missed: dict[int, dict[int, int]] = field(default_factory=dict)
    """By rank: how many heartbeats each other rank has sent since its last."""
    stacks: dict[int, str] = field(default_factory=dict)
    """Of ranks that hang, until their workers are replaced."""
    told: bool = False
    """Whether this hang has been described."""

    def beat(self, rank: int, position: Position) -> Orders:
        """Note a heartbeat and return what its rank has to know."""
        known = self.positions.get(rank)
        if known is not None and known.process != position.process:  # all workers are restarted together
            self.positions.clear()
            self.missed.clear()
            self.stacks.clear()
            self.told = False
        self.positions[rank] = position
        self.missed[rank] = {}
        silent = []
        for other in self.positions:
            if other != rank:
                self.missed[other][rank] = self.missed[other].get(rank, 0) + 1
                if self.missed[other][rank] >= SILENT_BEATS:
                    silent.append(other)
        total = sum(position.marks for position in self.positions.values())
        return Orders(total, tuple(sorted(silent)), bool(self.stacks) and rank not in self.stacks)

    def add_stacks(self, rank: int, stacks: str) -> None:
        """Note the stacks of a rank that has made no progress for too long."""
        self.stacks[rank] = stacks

    def describe_hang(self) -> str | None:
        """Return what the ranks did, their stacks, and which ranks sent none; None if it was returned before."""
        if self.told:
            return None
        self.told = True
        lines = []
        for rank, position in sorted(self.positions.items()):
            where = f"rank {rank} ({position.process}), {position.doing}"
            if rank in self.stacks:
                lines.append(f"{where}:\n{self.stacks[rank]}")
            else:
                lines.append(f"{where}: does not answer; it is stopped, swapped out or cut off from the network")
        return "\n".join(lines)

    def describe(self, rank: int) -> str:
        """Return where a rank was at its last heartbeat."""
        position = self.positions.get(rank)
        if position is None:
            return "never"
        return ", ".join(filter(None, (position.process, position.doing, position.memory)))
