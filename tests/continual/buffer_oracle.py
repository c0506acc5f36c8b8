"""The replay buffer written down naively: its slots as a list, its log as a list that grows.

Shares no code with the package.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

RESERVOIR, SLOT = 4, 5


class Buffer:
    """Slots with what entered them, by group: one for all tasks, or one a task."""

    def __init__(self, seed: int, capacities: list[int], keyed_hash: Callable[..., int]) -> None:
        self.seed, self.keyed_hash = seed, keyed_hash
        firsts = [sum(capacities[:group]) for group in range(len(capacities))]
        self.groups = [list(range(f, f + c)) for f, c in zip(firsts, capacities, strict=True)]
        self.slots: dict[int, int] = {}  # slot -> ordinal
        self.entered = [0] * len(capacities)
        self.drawn: list[list[int]] = [[] for _ in capacities]  # slots that may be replayed
        self.log: list[tuple[str, int, int]] = []  # (event, slot, ordinal)

    def enter(self, group: int, ordinal: int, replayable: bool) -> None:
        n, slots = self.entered[group], self.groups[group]
        self.entered[group] += 1
        place = n
        if n >= len(slots):
            place = self.keyed_hash(self.seed, RESERVOIR, group, n) * (n + 1) >> 64
            if place >= len(slots):
                return
        slot = slots[place]
        self.slots[slot] = ordinal
        self.log.append(("enter", slot, ordinal))
        drawn = self.drawn[group]
        if replayable and slot not in drawn:
            drawn.append(slot)
        if not replayable and slot in drawn:
            self._leave(drawn, slot)

    def begin(self, may_replay: Callable[[int], bool]) -> None:
        for group, slots in enumerate(self.groups):
            self.drawn[group] = [s for s in slots if s in self.slots and may_replay(self.slots[s])]

    def drop(self, is_gone: Callable[[int], bool]) -> None:
        for group, slots in enumerate(self.groups):
            for slot in slots:
                if slot in self.slots and is_gone(self.slots[slot]):
                    del self.slots[slot]
                    self.log.append(("drop", slot, -1))
                    if slot in self.drawn[group]:
                        self._leave(self.drawn[group], slot)

    def draw(self, group: int, batch: int, row: int) -> tuple[int, int]:
        """Ordinal and slot of a replay row."""
        drawn = self.drawn[group]
        slot = drawn[self.keyed_hash(self.seed, SLOT, batch, row) * len(drawn) >> 64]
        return self.slots[slot], slot

    @staticmethod
    def _leave(drawn: list[int], slot: int) -> None:
        place = drawn.index(slot)
        drawn[place] = drawn[-1]
        drawn.pop()


def positions(events: list[tuple[str, int, int]], size: int) -> tuple[dict[int, int], int]:
    """Each slot's place in the log after all events, and the log's length."""
    log: list[int | None] = []  # the slot whose row lies there
    where: dict[int, int] = {}
    dead: set[int] = set()
    waiting: list[int] = []

    def kill(slot: int) -> None:
        if slot in where:
            place = where.pop(slot)
            log[place] = None
            if (place // size + 1) * size <= len(log):
                waiting.append(place // size)

    def append(slot: int) -> None:
        where[slot] = len(log)
        log.append(slot)
        if len(log) % size == 0:
            waiting.append(len(log) // size - 1)

    for event, slot, _ in events:
        kill(slot)
        if event == "drop":
            continue
        append(slot)
        while waiting:
            segment = waiting.pop(0)
            rows = [one for one in log[segment * size : (segment + 1) * size] if one is not None]
            if segment in dead or len(rows) * 8 > size * 5:
                continue
            dead.add(segment)
            for one in rows:
                log[where[one]] = None
                append(one)
    return where, len(log)


def by_segment(where: dict[int, int], size: int) -> dict[int, int]:
    """Rows that live in each segment."""
    counts: dict[int, int] = defaultdict(int)
    for place in where.values():
        counts[place // size] += 1
    return counts
