"""Quality of the keyed permutation, above all on small domains, where Feistel networks fail."""

import itertools

import numpy as np
import pytest

from megatron_mer import _index
from megatron_mer.continual.plan import Plan
from megatron_mer.continual.spec import DatasetSpec, EntrySpec, PlanSpec

Z = 4.0  # standard deviations; the keys are fixed, so a test passes or fails for good


def chi_square_limit(freedom: int) -> float:
    """Upper limit of a chi-square value at Z (Wilson and Hilferty, 1931)."""
    part = 2 / (9 * freedom)
    return freedom * (1 - part + Z * part**0.5) ** 3


def chi_square(counts: np.ndarray, expected: float) -> float:
    return float(((counts - expected) ** 2).sum() / expected)


def keys(count: int, seed: int = 1) -> list[int]:
    return [int(key) for key in np.random.default_rng(seed).integers(0, 2**64, count, np.uint64)]


def everything(size: int) -> np.ndarray:
    return np.arange(size, dtype=np.uint64)


@pytest.mark.parametrize("size", [*range(1, 40), 63, 64, 65, 100, 4095, 4096, 4097, 10_000])
def test_is_a_bijection_with_its_inverse(size: int) -> None:
    permutation = _index.Permutation(size)
    for key in keys(3):
        images = permutation.forward(key, everything(size))
        assert sorted(images.tolist()) == list(range(size))
        assert permutation.inverse(key, images).tolist() == list(range(size))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_orders_of_a_tiny_domain_are_equally_likely(size: int) -> None:
    orders = dict.fromkeys(itertools.permutations(range(size)), 0)
    permutation = _index.Permutation(size)
    total = 24_000
    for key in keys(total):
        orders[tuple(permutation.forward(key, everything(size)).tolist())] += 1
    value = chi_square(np.array(list(orders.values())), total / len(orders))
    assert value < chi_square_limit(len(orders) - 1)


def test_orders_are_equally_likely_over_seeds_and_epochs_of_a_run() -> None:
    orders = dict.fromkeys(itertools.permutations(range(3)), 0)
    epochs, seeds = 100, 60
    for seed in range(seeds):
        entry = EntrySpec("t", (DatasetSpec("d", 3),), steps=epochs * 3, max_epochs=epochs)
        plan = Plan(PlanSpec(seed, 1, 8, None, (entry,)))
        samples = [int(plan.rows(batch).sample[0]) for batch in range(plan.total_batches)]
        for epoch in range(epochs):
            orders[tuple(samples[3 * epoch : 3 * epoch + 3])] += 1
    value = chi_square(np.array(list(orders.values())), epochs * seeds / 6)
    assert value < chi_square_limit(5)


@pytest.mark.parametrize(("size", "total"), [(7, 20_000), (9, 20_000), (100, 20_000)])
def test_every_sample_comes_at_every_position(size: int, total: int) -> None:
    permutation = _index.Permutation(size)
    counts = np.zeros((size, size))
    for key in keys(total):
        counts[np.arange(size), permutation.forward(key, everything(size)).astype(int)] += 1
    # Rows and columns of the table have fixed sums, which takes (size - 1) / size off the value.
    value = chi_square(counts, total / size) * (size - 1) / size
    assert value < chi_square_limit((size - 1) ** 2)


@pytest.mark.parametrize("size", [7, 100])
@pytest.mark.parametrize("distance", [1, 2])
def test_neighbours_are_independent(size: int, distance: int) -> None:
    permutation = _index.Permutation(size)
    counts = np.zeros((size, size))
    total = 60_000
    for number, key in enumerate(keys(total, seed=distance)):
        first = number % (size - distance)
        pair = permutation.forward(key, np.array([first, first + distance], dtype=np.uint64))
        counts[pair[0], pair[1]] += 1
    assert not counts.diagonal().any()
    cells = counts[~np.eye(size, dtype=bool)]
    assert chi_square(cells, total / cells.size) < chi_square_limit(cells.size - 1)


@pytest.mark.parametrize("size", [10_000, 2**33])
@pytest.mark.parametrize("lag", [1, 2, 7, 100, 128])
def test_no_serial_correlation(size: int, lag: int) -> None:
    permutation = _index.Permutation(size)
    total = 0.0
    for key in keys(20):
        images = permutation.forward(key, everything(10_000)).astype(np.float64) / size - 0.5
        total += 12 * float((images[lag:] * images[:-lag]).mean())
    assert abs(total / 20) < Z / np.sqrt(20 * 10_000)


@pytest.mark.parametrize("size", [2**33, 2**33 + 1, 2**62, 2**62 - 57])
def test_huge_domains(size: int) -> None:
    permutation = _index.Permutation(size)
    random = np.random.default_rng(5).integers(0, size, 50_000, np.uint64)
    last = np.uint64(size) - np.uint64(1) - everything(1000)
    for indices in (everything(50_000), random, last):
        images = permutation.forward(77, indices)
        assert int(images.max()) < size
        assert len(np.unique(images)) == len(np.unique(indices))
        assert np.array_equal(permutation.inverse(77, images), indices)
    images = permutation.forward(77, everything(50_000))
    buckets = np.bincount((images.astype(np.float64) / size * 500).astype(int), minlength=500)
    assert chi_square(buckets, 100) < chi_square_limit(499)


def test_keys_and_epochs_give_different_orders() -> None:
    permutation = _index.Permutation(1000)
    first, second = (permutation.forward(key, everything(1000)) for key in (1, 2))
    assert (first == second).mean() < 0.02


def test_refuses_what_it_cannot_permute() -> None:
    for size in (0, 2**62 + 1):
        with pytest.raises(ValueError, match=str(size)):
            _index.Permutation(size)
    with pytest.raises(ValueError, match="index 7"):
        _index.Permutation(7).forward(1, np.array([7], dtype=np.uint64))
    with pytest.raises(TypeError):
        _index.Permutation(7).forward(1, np.array([1], dtype=np.int32))
    with pytest.raises(TypeError):
        _index.Permutation(7).forward(1, np.array([1.0]))
