"""The Reptile update against formulas worked out beside it, on masters that are plain tensors."""

import math

import pytest
import torch

from megatron_mer.config import ReptileConfig
from megatron_mer.continual.reptile import MasterShard, Reptile
from megatron_mer.errors import CheckpointError


class PlainMasters:
    """One rank's masters: plain tensors, counted copies published into ``weights``."""

    def __init__(self, tensors, counted=None, tied=None):
        counted = counted or [True] * len(tensors)
        tied = tied or [False] * len(tensors)
        self.shards = [
            MasterShard(f"w{i}", t, c, d)
            for i, (t, c, d) in enumerate(zip(tensors, counted, tied, strict=True))
        ]
        self.published = 0
        self.averaged = []

    def publish(self):
        self.published += 1

    def sum_over_ranks(self, values):
        return values

    def average_tied(self, deltas):
        self.averaged.append([delta.clone() for delta in deltas])


def config(**changes):
    return ReptileConfig(**{"k": 3, "epsilon": 0.5, **changes})


def random_weights(seed=0, sizes=(5, 17)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for size in sizes]


def train(masters, reptile, updates, seed=1):
    """Move the masters at random; return what every Reptile update said."""
    generator = torch.Generator().manual_seed(seed)
    said = []
    for _ in range(updates):
        for shard in masters.shards:
            shard.tensor.add_(0.1 * torch.randn(shard.tensor.shape, generator=generator))
        said.append(reptile.after_update())
    return said


def test_first_update_comes_after_k_updates():
    masters = PlainMasters(random_weights())
    said = train(masters, Reptile(config(k=3), masters), 7)
    assert [update is not None for update in said] == [False, False, True] * 2 + [False]
    assert masters.published == 2


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.5, 0.9])
def test_moves_the_share_epsilon_from_the_anchor(epsilon):
    weights = random_weights()
    start = [w.clone() for w in weights]
    masters = PlainMasters(weights)
    reptile = Reptile(config(k=1, epsilon=epsilon), masters)
    moved = [0.3 * w for w in random_weights(seed=4)]
    for weight, by in zip(weights, moved, strict=True):
        weight += by
    update = reptile.after_update()
    for weight, anchor, by in zip(weights, start, moved, strict=True):
        torch.testing.assert_close(weight, anchor + epsilon * by)
    assert update.delta_norm == pytest.approx(math.sqrt(sum(float((b**2).sum()) for b in moved)))
    assert update.delta_cosine is None


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "nesterov": True}])
def test_an_anchor_in_the_hosts_memory_changes_no_bit(options):
    weights = {place: PlainMasters(random_weights()) for place in ("device", "host")}
    said, anchors = [], []
    for place, masters in weights.items():
        reptile = Reptile(config(k=2, anchor=place, **options), masters)
        said.append(train(masters, reptile, 6))
        with reptile.at_anchor():
            anchors.append([shard.tensor.clone() for shard in masters.shards])
    assert said[0] == said[1]
    assert said[0][5] is not None
    for mine, other in zip(*(m.shards for m in weights.values()), strict=True):
        assert torch.equal(mine.tensor, other.tensor)
    assert all(torch.equal(a, b) for a, b in zip(*anchors, strict=True))


def test_many_chunks_move_as_one(monkeypatch):
    small, large = (PlainMasters(random_weights(sizes=(1000, 7))) for _ in range(2))
    wanted = train(large, Reptile(config(k=2), large), 4)
    monkeypatch.setattr("megatron_mer.continual.reptile.CPU_CHUNK", 64)
    given = train(small, Reptile(config(k=2), small), 4)
    for mine, other in zip(small.shards, large.shards, strict=True):
        assert torch.equal(mine.tensor, other.tensor)
    for mine, other in zip(given[1::2], wanted[1::2], strict=True):
        assert mine.delta_norm == pytest.approx(other.delta_norm, rel=1e-6)
    assert given[3].delta_cosine == pytest.approx(wanted[3].delta_cosine, rel=1e-5)


def test_epsilon_one_changes_no_bit():
    with_it, without = random_weights(), random_weights()
    masters, plain = PlainMasters(with_it), PlainMasters(without)
    train(masters, Reptile(config(k=2, epsilon=1.0), masters), 9)
    train(plain, Reptile(config(k=100), plain), 9)
    assert masters.published == 4
    assert plain.published == 0
    assert all(torch.equal(a, b) for a, b in zip(with_it, without, strict=True))


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_is_torchs_sgd_on_minus_delta(nesterov):
    weights = random_weights()
    masters = PlainMasters(weights)
    momentum, epsilon = 0.6, 0.7
    reptile = Reptile(config(k=1, epsilon=epsilon, momentum=momentum, nesterov=nesterov), masters)
    outer = [torch.nn.Parameter(w.clone()) for w in weights]
    sgd = torch.optim.SGD(outer, lr=epsilon, momentum=momentum, nesterov=nesterov)
    for round_ in range(5):
        for index, shard in enumerate(masters.shards):
            delta = 0.2 * random_weights(seed=10 + round_)[index]
            outer[index].grad = -delta
            shard.tensor.add_(delta)
        reptile.after_update()
        sgd.step()
        for weight, wanted in zip(weights, outer, strict=True):
            torch.testing.assert_close(weight, wanted.detach(), rtol=1e-5, atol=1e-6)


def test_cosine_compares_with_the_last_delta():
    weights = [torch.zeros(4)]
    masters = PlainMasters(weights)
    reptile = Reptile(config(k=1, epsilon=0.5), masters)
    deltas = [torch.tensor(v) for v in ([1.0, 0, 0, 0], [1.0, 1, 0, 0], [-1.0, -1, 0, 0])]
    cosines = []
    for delta in deltas:
        weights[0] += delta
        cosines.append(reptile.after_update().delta_cosine)
    assert cosines[0] is None
    assert cosines[1] == pytest.approx(1 / math.sqrt(2))
    assert cosines[2] == pytest.approx(-1.0)


def test_no_cosine_and_no_memory_for_it_when_not_tracked():
    masters = PlainMasters(random_weights())
    reptile = Reptile(config(k=1, track_cosine=False), masters)
    assert list(reptile.tensors()) == ["anchor"]
    assert [u.delta_cosine for u in train(masters, reptile, 3)] == [None] * 3


def test_only_counted_copies_enter_the_norm():
    weights = [torch.zeros(3), torch.zeros(3)]
    masters = PlainMasters(weights, counted=[True, False])
    reptile = Reptile(config(k=1), masters)
    weights[0] += 2.0
    weights[1] += 5.0
    assert reptile.after_update().delta_norm == pytest.approx(math.sqrt(12.0))
    torch.testing.assert_close(weights[1], torch.full((3,), 2.5))


def test_tied_copies_move_by_the_averaged_delta():
    class Drifted(PlainMasters):
        def average_tied(self, deltas):
            for delta in deltas:
                delta.fill_(1.0)

    weights = [torch.zeros(3), torch.zeros(2)]
    masters = Drifted(weights, tied=[False, True])
    reptile = Reptile(config(k=1, epsilon=0.5), masters)
    weights[0] += 4.0
    weights[1] += 4.0
    update = reptile.after_update()
    torch.testing.assert_close(weights[0], torch.full((3,), 2.0))
    torch.testing.assert_close(weights[1], torch.full((2,), 0.5))
    assert update.delta_norm == pytest.approx(math.sqrt(3 * 16 + 2 * 1))


def test_chunks_do_not_show(monkeypatch):
    results = []
    for chunk in (1 << 22, 4):
        monkeypatch.setattr("megatron_mer.continual.reptile.CHUNK", chunk)
        weights = random_weights()
        masters = PlainMasters(weights)
        said = train(masters, Reptile(config(k=2, momentum=0.5), masters), 6)
        results.append((weights, [u.delta_norm for u in said if u]))
    for a, b in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(a, b)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-12)


@pytest.mark.parametrize("changes", [{}, {"momentum": 0.5, "nesterov": True}])
def test_state_resumes_in_mid_interval(changes):
    weights = random_weights()
    masters = PlainMasters(weights)
    reptile = Reptile(config(**changes), masters)
    train(masters, reptile, 5)
    saved = {kind: [t.clone() for t in tensors] for kind, tensors in reptile.tensors().items()}
    counters = reptile.counters()
    copies = [w.clone() for w in weights]

    said = [u for u in train(masters, reptile, 5, seed=9) if u]
    resumed_masters = PlainMasters(copies)
    resumed = Reptile(config(**changes), resumed_masters)
    for kind, tensors in resumed.tensors().items():
        for tensor, value in zip(tensors, saved[kind], strict=True):
            tensor.copy_(value)
    resumed.restore_counters(counters)
    said_again = [u for u in train(resumed_masters, resumed, 5, seed=9) if u]
    assert said == said_again
    assert len(said) == 2
    assert all(torch.equal(a, b) for a, b in zip(weights, copies, strict=True))


def test_a_smaller_k_than_the_saved_interval_is_refused():
    masters = PlainMasters(random_weights())
    reptile = Reptile(config(k=2), masters)
    with pytest.raises(CheckpointError, match=r"reptile.k: given 2.*stands 4 updates"):
        reptile.restore_counters({"updates_since": 4, "updates_done": 1})
