"""The plan written down naively: each batch in turn, each pool a list, each permutation whole.

Shares no code with the package. Slow, and short enough to be read against the documentation. A run
is a list of segments (first batch, specification), each in force until the next one begins.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

from tests.continual.buffer_oracle import Buffer

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
PERMUTATION, PLACEMENT, REPLAY = 1, 2, 3


def mix(x: int) -> int:
    x ^= x >> 27
    x = x * 0x3C79AC492BA7B653 & MASK
    x ^= x >> 33
    x = x * 0x1C69B3F74AC4AE35 & MASK
    return x ^ x >> 27


def keyed_hash(seed: int, *words: int) -> int:
    state = mix(seed + GOLDEN & MASK)
    for word in words:
        state = mix((state ^ word) + GOLDEN & MASK)
    return state


def permutation(size: int, key: int) -> list[int]:
    rows = math.isqrt(size - 1) + 1
    rows += rows % 2
    columns = -(-size // rows)

    def shift(turn: int, half: int, modulus: int) -> int:
        return mix((key + turn * GOLDEN & MASK) ^ half) * modulus >> 64

    def encrypt(x: int) -> int:
        left, right = divmod(x, columns)
        for turn in range(0, 24 if size < 4096 else 8, 2):
            left = (left + shift(turn, right, rows)) % rows
            right = (right + shift(turn + 1, left, columns)) % columns
        return left * columns + right

    def walk(x: int) -> int:
        x = encrypt(x)
        return x if x < size else walk(x)

    return [walk(x) for x in range(size)] if size > 1 else [0]


class Blend:
    """Which dataset each next sample of an entry comes from, or which task each replay row."""

    def __init__(self, sizes: list[int], weights: list[float] | None) -> None:
        if weights is None:
            parts = [(size, i, i) for i, size in enumerate(sizes)]
        else:
            top = max(math.frexp(weight)[1] - 1 for weight in weights)
            parts = [(max(math.ldexp(w, -top), 2.0**-1000), i, i) for i, w in enumerate(weights)]
        self.taken = [0] * len(parts)
        heapq.heapify(parts)
        for number in range(len(parts), 2 * len(parts) - 1):
            left, right = heapq.heappop(parts), heapq.heappop(parts)
            total = left[0] + right[0]
            exact = weights is None
            share = (left[0] << 63) // total if exact else int(left[0] / total * 2.0**63)
            heapq.heappush(parts, (total, number, (share, left[2], right[2])))
        self.tree = parts[0][2]

    def locate(self, n: int) -> int:
        """The leaf of the n-th sample."""
        node = self.tree
        while isinstance(node, tuple):
            share, left, right = node
            before, after = (share * n + 2**62) >> 63, (share * (n + 1) + 2**62) >> 63
            node, n = (left, before) if after > before else (right, n - before)
        return node

    def next(self) -> tuple[int, int]:
        """The next sample's dataset, and how many samples that dataset gave before it."""
        leaf = self.locate(sum(self.taken))
        self.taken[leaf] += 1
        return leaf, self.taken[leaf] - 1


class Consumed(NamedTuple):
    """A fresh row, or one trained before the run; its ordinal is its place in the list."""

    batch: int  # -1: before the run
    span: tuple[int, int]  # segment, position in that segment's stream
    dataset: int
    sample: int


class Batch(NamedTuple):
    span: tuple[int, int]
    rows: list[tuple]  # kind, span, dataset, sample, ordinal, slot
    had_pool: bool


@dataclass
class Run:
    """A run walked row by row, everything consumed so far kept in a list."""

    segments: list
    skipped: set[int]
    dropped: dict[int, set[str]] = field(default_factory=dict)  # by segment: tasks that leave it
    consumed: list[Consumed] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)

    def __post_init__(self) -> None:
        specs = [spec for _, spec in self.segments]
        entries = [entry for spec in specs for entry in spec.stream]
        self.sizes = {one.name: one.num_samples for entry in entries for one in entry.datasets}
        self.names = list(self.sizes)
        self.tasks = list(dict.fromkeys(entry.task for entry in entries))
        self.cursors = dict.fromkeys(self.names, 0)
        self.orders: dict[tuple[str, int], list[int]] = {}
        self.known: Counter[tuple] = Counter()  # entries trained before, as segments had them
        self.buffer = make_buffer(specs, self.tasks)
        starts = [first for first, _ in self.segments]
        for number, (first, end) in enumerate(zip(starts, [*starts[1:], math.inf], strict=True)):
            assert len(self.batches) == first
            self.walk_segment(number, end)

    def spans(self) -> list[tuple[int, int]]:
        """What trained or was trained before, segment by segment in the order of the stream."""
        return sorted({one.span for one in self.consumed})

    def walk_segment(self, number: int, end: float) -> None:
        stream = self.segments[number][1].stream
        done = Counter(batch.span[1] for batch in self.batches)
        fresh_done = Counter(one.span[1] for one in self.consumed if one.batch >= 0)
        here: Counter[tuple] = Counter()
        if gone := self.dropped.get(number):
            self.buffer.drop(lambda ordinal: self.task_of(ordinal) in gone)
        for position, entry in enumerate(stream):
            if entry.trained_before:
                identity = (entry.task, *((one.name, one.weight) for one in entry.datasets))
                here[identity] += 1
                if here[identity] > self.known[identity]:
                    self.take_all((number, position), entry)
        self.known |= here
        for position, entry in enumerate(stream):
            if not entry.trained_before:
                self.train((number, position), entry, done[position], fresh_done[position], end)

    def take_all(self, span: tuple[int, int], entry) -> None:
        blend = blend_of(entry)
        for _ in range(sum(one.num_samples for one in entry.datasets)):
            place, k = blend.next()
            self.consume(-1, span, entry.datasets[place].name, k)
            self.enter(len(self.consumed) - 1, span, True)

    def train(self, span: tuple[int, int], entry, done: int, fresh_done: int, end: float) -> None:
        first_of_segment, spec = self.segments[span[0]]
        alpha = Fraction(spec.replay.alpha) if spec.replay else Fraction(0)
        n = spec.global_batch_size
        rows_left = -(-(entry.fresh_tokens or 0) // spec.seq_length) - fresh_done
        known = {batch for batch in self.skipped if batch < first_of_segment}
        blend, starts = blend_of(entry), dict(self.cursors)
        t = fresh_expected = replayed = 0
        while t < entry.steps - done if entry.steps else fresh_expected < rows_left:
            if len(self.batches) >= end:
                return
            if t == 0:
                self.begin(span)
            share = math.floor(alpha * n * (t + 1)) - math.floor(alpha * n * t)
            # The length was decided when the segment began, its own skips not known.
            fresh_expected += n - (share if self.pool(span, entry.task, known) else 0)
            pool = self.pool(span, entry.task, self.skipped)
            replay = share if pool else 0
            batch, first = len(self.batches), len(self.consumed)
            drawn = [self.draw(span, pool, batch, row, replayed + row) for row in range(replay)]
            for _ in range(n - replay):
                place, k = blend.next()
                name = entry.datasets[place].name
                self.consume(batch, span, name, starts[name] + k)
                self.cursors[name] = starts[name] + k + 1
            rows = [(0, *self.consumed[o][1:], o, -1) for o in range(first, len(self.consumed))]
            rows += [(1, *self.consumed[o][1:], o, slot) for o, slot in drawn]
            for ordinal in range(first, len(self.consumed)) if batch not in self.skipped else ():
                self.enter(ordinal, span, self.replays_own(span))
            order = permutation(n, keyed_hash(spec.seed, PLACEMENT, batch))
            self.batches.append(Batch(span, [rows[place] for place in order], bool(pool)))
            replayed += replay
            t += 1

    def pool(self, span: tuple[int, int], task: str, skipped: set[int]) -> dict[str, list[int]]:
        """Ordinals to draw from by task, in the order of tasks; all under one name if uniform."""
        replay = self.segments[span[0]][1].replay
        pools: dict[str, list[int]] = {name: [] for name in self.tasks}
        for ordinal, one in enumerate(self.consumed):
            itself = one.batch >= 0 and one.span[1] == span[1]
            if one.batch in skipped or (itself and not (replay and replay.include_current_task)):
                continue
            later = range(one.span[0] + 1, span[0] + 1)
            if any(self.task_of(ordinal) in self.dropped.get(number, ()) for number in later):
                continue
            pools[self.entry(one.span).task].append(ordinal)
        if replay is None or replay.policy == "uniform":
            everything = sorted(ordinal for pool in pools.values() for ordinal in pool)
            return {"": everything} if everything else {}
        weights = self.weights(replay)
        return {name: pool for name, pool in pools.items() if pool and weights[name] > 0}

    def weights(self, replay) -> dict[str, float]:
        return dict.fromkeys(self.tasks, 1.0) | dict(replay.weights or {})

    def replays_own(self, span: tuple[int, int]) -> bool:
        replay = self.segments[span[0]][1].replay
        return bool(replay and replay.include_current_task)

    def task_of(self, ordinal: int) -> str:
        return self.entry(self.consumed[ordinal].span).task

    def group_of(self, task: str) -> int:
        return self.tasks.index(task) if len(self.buffer.groups) > 1 else 0

    def enter(self, ordinal: int, span: tuple[int, int], replayable: bool) -> None:
        if self.buffer:
            self.buffer.enter(self.group_of(self.entry(span).task), ordinal, replayable)

    def begin(self, span: tuple[int, int]) -> None:
        def may_replay(ordinal: int) -> bool:
            one = self.consumed[ordinal]
            return self.replays_own(span) or one.batch < 0 or one.span[1] != span[1]

        if self.buffer:
            self.buffer.begin(may_replay)

    def draw(
        self, span: tuple[int, int], pool: dict, batch: int, row: int, k: int
    ) -> tuple[int, int]:
        """Ordinal and slot of a batch's replay row, the k-th replay row of its span."""
        spec = self.segments[span[0]][1]
        tasks = list(pool)
        if len(tasks) > 1:
            weights = self.weights(spec.replay)
            tasks = [tasks[Blend([], [weights[task] for task in tasks]).locate(k)]]
        live = pool[tasks[0]]
        ordinal = live[keyed_hash(spec.seed, REPLAY, batch, row) * len(live) >> 64]
        if spec.replay.source == "stream":
            return ordinal, -1
        return self.buffer.draw(self.group_of(self.task_of(ordinal)), batch, row)

    def consume(self, batch: int, span: tuple[int, int], name: str, k: int) -> None:
        epoch, position = divmod(k, self.sizes[name])
        if (name, epoch) not in self.orders:
            word = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
            key = keyed_hash(self.segments[0][1].seed, PERMUTATION, word, epoch)
            self.orders[name, epoch] = permutation(self.sizes[name], key)
        sample = self.orders[name, epoch][position]
        self.consumed.append(Consumed(batch, span, self.names.index(name), sample))

    def entry(self, span: tuple[int, int]):
        """What the specification says of a span."""
        return self.segments[span[0]][1].stream[span[1]]


def blend_of(entry) -> Blend:
    weights = [one.weight for one in entry.datasets]
    return Blend([one.num_samples for one in entry.datasets], None if None in weights else weights)


def make_buffer(specs, tasks: list[str]) -> Buffer | None:
    given = [one.replay.capacity for one in specs if one.replay and one.replay.capacity]
    if not given:
        return None
    if isinstance(given[0], int):
        return Buffer(specs[0].seed, [given[0]], keyed_hash)
    rows = {task: count for one in given for task, count in one.items()}
    return Buffer(specs[0].seed, [rows.get(task, 1) for task in tasks], keyed_hash)


def walk_run(segments, skipped=(), dropped=None) -> Run:
    """Walks a run, given as (first batch, specification) pairs, to its end."""
    return Run(list(segments), set(skipped), dict(dropped or {}))
