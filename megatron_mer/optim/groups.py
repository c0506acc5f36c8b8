"""Which parameters weight decay acts on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float
) -> list[dict[str, Any]]:
    """Splits parameters into those that decay (matrices) and those that do not (norm weights).

    Args:
        named_parameters: (name, parameter); their order is kept, and one that comes twice, as tied
            weights do, counts where it comes first.
        weight_decay: decay of the first group, >= 0.

    Returns:
        Groups for a torch optimizer, with the keys `params`, `weight_decay` and `name` ("decay" or
        "no_decay"). A group without parameters is left out, as a stage may have none of a kind.
    """
    parameters = {id(parameter): parameter for _, parameter in named_parameters}.values()
    groups: list[dict[str, Any]] = [
        {
            "name": "decay",
            "weight_decay": weight_decay,
            "params": [parameter for parameter in parameters if parameter.dim() >= 2],
        },
        {
            "name": "no_decay",
            "weight_decay": 0.0,
            "params": [parameter for parameter in parameters if parameter.dim() < 2],
        },
    ]
    return [group for group in groups if group["params"]]
