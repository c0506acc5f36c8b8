"""What apply_plan puts where; that the results are right is tested on two ranks."""

import pickle

import pytest
import torch
from torch import nn

from megatron_mer.errors import ConfigError
from megatron_mer.parallel import (
    ColumnParallelLinear,
    Cut,
    KeyValueLinear,
    RowParallelLinear,
    TensorParallelGroup,
    VocabParallelEmbedding,
    apply_plan,
    cut_of,
    enter_region,
    reduce_from_region,
)

ONE = TensorParallelGroup()
SECOND_OF_TWO = TensorParallelGroup(group=None, rank=1, size=2)


def pair():
    return nn.ModuleDict({"up": nn.Linear(4, 6, bias=False), "down": nn.Linear(6, 4, bias=False)})


def test_one_rank_changes_nothing():
    module = pair()
    before = dict(module.named_modules())
    assert apply_plan(module, {"": "region", "up": "column", "down": "row"}, ONE) is module
    assert dict(module.named_modules()) == before
    assert not module._forward_pre_hooks
    x = torch.zeros(2, requires_grad=True)
    assert enter_region(x, ONE) is x
    assert reduce_from_region(x, ONE) is x


def test_modules_are_replaced_and_their_shares_marked():
    with torch.device("meta"):
        module = apply_plan(pair(), {"up": "column", "down": "row"}, SECOND_OF_TWO)
    up, down = module["up"], module["down"]
    assert isinstance(up, ColumnParallelLinear)
    assert isinstance(down, RowParallelLinear)
    assert (up.weight.shape, up.weight.cut) == ((3, 4), Cut(dim=0, size=6, parts=2, index=1))
    assert (down.weight.shape, down.weight.cut) == ((4, 3), Cut(dim=1, size=6, parts=2, index=1))
    assert up.weight.tensor_model_parallel
    assert up.weight.is_meta
    assert [name for name, _ in module.named_parameters()] == ["up.weight", "down.weight"]


def test_the_layer_itself_can_be_replaced():
    table = apply_plan(nn.Embedding(6, 4), {"": "vocab"}, SECOND_OF_TWO)
    assert isinstance(table, VocabParallelEmbedding)
    assert table.weight.shape == (3, 4)
    head = apply_plan(nn.Linear(4, 6, bias=False), {"": "head"}, SECOND_OF_TWO)
    assert isinstance(head, ColumnParallelLinear)
    assert len(head._forward_pre_hooks) == 1
    pickle.dumps(head)


def test_a_vocabulary_that_ranks_do_not_divide_is_padded():
    for plain, kind in ((nn.Embedding(5, 4), "vocab"), (nn.Linear(4, 5, bias=False), "head")):
        for rank, held in enumerate([2, 2, 1, 0]):
            split = apply_plan(plain, {"": kind}, TensorParallelGroup(None, rank, 4))
            cut = cut_of(split.weight)
            assert (split.weight.shape, cut.size) == ((2, 4), 5)
            assert (cut.begin, cut.end) == (min(2 * rank, 5), min(2 * rank, 5) + held)
            assert split.weight.tensor_model_parallel


def test_heads_of_keys_and_values_are_repeated_where_there_are_too_few():
    """Two heads on four ranks; each counts in the gradient's norm on its first rank alone."""
    for rank in range(4):
        same = TensorParallelGroup(None, rank % 2, 2)
        group = TensorParallelGroup(None, rank, 4, kv_replicas=same)
        with torch.device("meta"):
            split = apply_plan(nn.Linear(8, 6, bias=False), {"": "kv"}, group)
        assert isinstance(split, KeyValueLinear)
        assert split.weight.shape == (3, 8)
        assert split.weight.cut == Cut(0, 6, parts=2, index=rank // 2, replica=rank % 2)
        assert split.weight.tensor_model_parallel == (rank in (0, 2))


def test_plans_that_do_not_fit_are_refused():
    with pytest.raises(KeyError, match="gate"):
        apply_plan(pair(), {"gate": "column"}, ONE)
    with pytest.raises(ConfigError, match=r"parallel\.tp_size: 4 .*\(6, 4\)"):
        apply_plan(pair(), {"up": "column"}, TensorParallelGroup(None, 0, 4))
    with pytest.raises(TypeError, match="bias"):
        apply_plan(nn.Linear(4, 6), {"": "column"}, SECOND_OF_TWO)
