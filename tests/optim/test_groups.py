"""Weight decay acts on matrices alone."""

import torch
from torch import nn

from megatron_mer.optim.groups import parameter_groups


def parameter(*shape):
    return nn.Parameter(torch.zeros(shape))


def test_matrices_decay_and_norms_do_not():
    named = [
        ("embedding.weight", parameter(4, 2)),
        ("norm.weight", parameter(2)),
        ("linear.weight", parameter(2, 2)),
        ("final_norm.weight", parameter(2)),
    ]
    values = [value for _, value in named]
    decay, no_decay = parameter_groups(named, 0.1)
    assert (decay["name"], decay["weight_decay"]) == ("decay", 0.1)
    assert (no_decay["name"], no_decay["weight_decay"]) == ("no_decay", 0.0)
    assert [id(value) for value in decay["params"]] == [id(values[0]), id(values[2])]
    assert [id(value) for value in no_decay["params"]] == [id(values[1]), id(values[3])]


def test_tied_weights_count_once_and_empty_groups_are_left_out():
    tied = parameter(4, 2)
    groups = parameter_groups([("embedding.weight", tied), ("head.weight", tied)], 0.1)
    assert [(group["name"], len(group["params"])) for group in groups] == [("decay", 1)]
    assert parameter_groups([("norm.weight", parameter(2))], 0.1)[0]["name"] == "no_decay"
