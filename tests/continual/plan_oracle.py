"""The plan written down naively: each batch in turn, each pool a list, each permutation whole.

Shares no code with the package. Slow, and short enough to be read against the documentation.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from fractions import Fraction

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
    """Which dataset each next sample of an entry comes from."""

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

    def next(self) -> tuple[int, int]:
        """The next sample's dataset, and how many samples that dataset gave before it."""
        node, n = self.tree, sum(self.taken)
        while isinstance(node, tuple):
            share, left, right = node
            before, after = (share * n + 2**62) >> 63, (share * (n + 1) + 2**62) >> 63
            node, n = (left, before) if after > before else (right, n - before)
        self.taken[node] += 1
        return node, self.taken[node] - 1


class Walk:
    """The run walked row by row, everything consumed so far kept in a list."""

    def __init__(self, spec):
        self.spec = spec
        self.names = list(spec.datasets)
        self.orders: dict[tuple[str, int], list[int]] = {}
        self.cursors = dict.fromkeys(self.names, 0)
        self.consumed: list[tuple[int, int, int, int]] = []  # batch, entry, dataset, sample
        for index, entry in enumerate(spec.stream):
            if entry.trained_before:
                blend = self.blend_of(entry)
                for _ in range(sum(one.num_samples for one in entry.datasets)):
                    self.consume(index, blend, dict.fromkeys(self.names, 0), -1)

    def blend_of(self, entry) -> Blend:
        sizes = [one.num_samples for one in entry.datasets]
        weighted = entry.datasets[0].weight is not None
        return Blend(sizes, [one.weight for one in entry.datasets] if weighted else None)

    def sample_of(self, name: str, k: int) -> int:
        epoch, position = divmod(k, self.spec.datasets[name])
        if (name, epoch) not in self.orders:
            word = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
            key = keyed_hash(self.spec.seed, PERMUTATION, word, epoch)
            self.orders[name, epoch] = permutation(self.spec.datasets[name], key)
        return self.orders[name, epoch][position]

    def consume(self, index: int, blend: Blend, starts: dict[str, int], batch: int) -> None:
        place, taken = blend.next()
        name = self.spec.stream[index].datasets[place].name
        k = starts[name] + taken
        if not self.spec.stream[index].trained_before:
            self.cursors[name] = k + 1
        self.consumed.append((batch, index, self.names.index(name), self.sample_of(name, k)))

    def rows(self, batch: int, first: int, replay: int, pool: list[int]) -> list[tuple[int, ...]]:
        """The rows of a batch whose fresh ones were consumed from ordinal ``first`` on."""
        consumed = self.consumed
        rows = [(0, *consumed[o][1:], o) for o in range(first, len(consumed))]
        for row in range(replay):
            at = keyed_hash(self.spec.seed, REPLAY, batch, row) * len(pool) >> 64
            rows.append((1, *consumed[pool[at]][1:], pool[at]))
        n = self.spec.global_batch_size
        order = permutation(n, keyed_hash(self.spec.seed, PLACEMENT, batch))
        return [rows[place] for place in order]


def walk_run(spec, skipped=()):
    """Yields (batch, entry, rows), rows being (kind, entry, dataset, sample, ordinal) tuples."""
    skipped = set(skipped)
    alpha = Fraction(spec.replay.alpha) if spec.replay else Fraction(0)
    current_too = spec.replay is not None and spec.replay.include_current_task
    walk = Walk(spec)
    consumed = walk.consumed
    n = spec.global_batch_size
    batch = 0
    for index, entry in enumerate(spec.stream):
        if entry.trained_before:
            continue
        blend, starts, begun = walk.blend_of(entry), dict(walk.cursors), len(consumed)
        wanted = -(-(entry.fresh_tokens or 0) // spec.seq_length)
        local = fresh_if_none_skipped = 0
        found_pool = False
        had_pool = begun > 0  # what the length is decided by
        while local < entry.steps if entry.steps else fresh_if_none_skipped < wanted:
            limit = len(consumed) if current_too else begun
            pool = [o for o in range(limit) if consumed[o][0] not in skipped]
            found_pool = found_pool or bool(pool)
            share = math.floor(alpha * n * (local + 1)) - math.floor(alpha * n * local)
            replay = share if found_pool else 0
            fresh_if_none_skipped += n - (share if had_pool else 0)
            had_pool = had_pool or current_too
            first = len(consumed)
            for _ in range(n - replay):
                walk.consume(index, blend, starts, batch)
            yield batch, index, walk.rows(batch, first, replay, pool)
            batch += 1
            local += 1
