"""What apply_plan puts where; that the results are right is tested on two ranks."""

import pickle

import pytest
import torch
from torch import nn

from megatron_mer.errors import ConfigError
from megatron_mer.parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    TensorParallelGroup,
    VocabParallelEmbedding,
    apply_plan,
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
    assert (up.weight.shape, up.weight.partition_dim) == ((3, 4), 0)
    assert (down.weight.shape, down.weight.partition_dim) == ((4, 3), 1)
    assert up.weight.tensor_model_parallel
    assert up.weight.is_meta
    assert [name for name, _ in module.named_parameters()] == ["up.weight", "down.weight"]


def test_the_layer_itself_can_be_replaced():
    table = apply_plan(nn.Embedding(6, 4), {"": "vocab"}, SECOND_OF_TWO)
    assert isinstance(table, VocabParallelEmbedding)
    assert table.weight.shape == (3, 4)
    head = apply_plan(nn.Linear(4, 6, bias=False), {"": "column_region"}, SECOND_OF_TWO)
    assert isinstance(head, ColumnParallelLinear)
    assert len(head._forward_pre_hooks) == 1
    pickle.dumps(head)


def test_plans_that_do_not_fit_are_refused():
    with pytest.raises(KeyError, match="gate"):
        apply_plan(pair(), {"gate": "column"}, ONE)
    with pytest.raises(ConfigError, match=r"parallel\.tp_size: 4 .*\(6, 4\)"):
        apply_plan(pair(), {"up": "column"}, TensorParallelGroup(None, 0, 4))
    with pytest.raises(TypeError, match="bias"):
        apply_plan(nn.Linear(4, 6), {"": "column"}, SECOND_OF_TWO)
