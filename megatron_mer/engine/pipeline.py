"""A Llama as DeepSpeed pipeline stages: built layer by layer, split by a table, started by key.

No rank ever holds the whole model: each layer of this rank's stage is made without storage, its
modules are replaced by tensor-parallel ones, and only then its slice is allocated and initialised.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from megatron_mer.config import ModelConfig, RunConfig
from megatron_mer.engine.distributed import DEFAULT_TIMEOUT, device, silence_engine_prints
from megatron_mer.engine.loss import GlobalTokenLoss
from megatron_mer.engine.masters import TiedGroup
from megatron_mer.engine.tensor_plan import LLAMA_PLAN
from megatron_mer.model import build_layers, initialise_layer, layer_costs
from megatron_mer.parallel import (
    Layout,
    TensorParallelGroup,
    apply_plan,
    stage_bounds,
)


def build_layer(
    name: str,
    factory: Callable[[], nn.Module],
    config: ModelConfig,
    seed: int,
    group: TensorParallelGroup,
) -> nn.Module:
    """One layer of this tensor rank, fp32, initialised, on this rank's device."""
    with torch.device("meta"):
        layer = apply_plan(factory(), LLAMA_PLAN[name.split(".")[0]], group)
    initialise_layer(layer, name, config, seed, device())
    return layer


class _Spec(LayerSpec):
    """A layer that DeepSpeed builds on its own stage only."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        super().__init__(nn.Module)
        self._build = build

    def build(self, log: bool = False) -> nn.Module:
        return self._build()


class _TiedSpec(TiedLayerSpec):
    """A layer whose weight other stages hold a copy of."""

    def __init__(
        self,
        key: str,
        build: Callable[[], nn.Module],
        forward_fn: Callable[[nn.Module, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(key, nn.Module, forward_fn=forward_fn, tied_weight_attr="weight")
        self._build = build

    def build(self, log: bool = False) -> nn.Module:
        return self._build()


class StagedLlama(PipelineModule):
    """This rank's stage of the model.

    Args:
        config: the resolved run.
        layout: the rank grid.
        group: this rank's tensor-parallel group.
        loss: called with (output, labels) on the last stage.
    """

    def __init__(
        self,
        config: RunConfig,
        layout: Layout,
        group: TensorParallelGroup,
        loss: GlobalTokenLoss,
    ) -> None:
        bounds = stage_bounds(layer_costs(config.model), layout.pp_size)
        # DeepSpeed asks for the bounds inside its own __init__.
        object.__setattr__(self, "_stage_bounds", bounds)
        named = build_layers(config.model)
        object.__setattr__(self, "_layer_names", [name for name, _ in named])
        topology = PipeModelDataParallelTopology(
            num_pp=layout.pp_size, num_mp=layout.tp_size, num_dp=layout.dp_size
        )
        # DeepSpeed broadcasts tied weights while it builds; autograd must not record that.
        with silence_engine_prints(), torch.no_grad():
            super().__init__(_specs(named, config, group), topology=topology, loss_fn=loss)
        self._tied_process_groups = _tied_process_groups(layout, self._tied_stages(bounds))
        if config.kernels.loss == "chunked" and self.parts[self.stage_id + 1] == len(named):
            # The head's weight stays this stage's; the loss multiplies by it.
            head = self.forward_funcs.pop()
            loss.take_head((head.args[0] if isinstance(head, partial) else head).weight)

    def _partition_layers(self, method: str = "uniform") -> None:
        """Cut the layers where the costliest stage is cheapest; DeepSpeed's way counts layers."""
        self.parts = list(self._stage_bounds)
        self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])

    def canonical_names(self) -> dict[nn.Parameter, str]:
        """This stage's parameters with their names, equal on every layout, in a stable order."""
        names = {}
        for path, parameter in self.named_parameters():
            first, _, rest = path.partition(".")
            names[parameter] = (
                rest if first == "tied_modules" else f"{self._layer_names[int(first)]}.{rest}"
            )
        return names

    def _tied_stages(self, bounds: Sequence[int]) -> dict[str, list[int]]:
        """For each tied layer the stages that hold a copy, when more than one does."""
        stages: dict[str, list[int]] = {}
        for stage, (start, stop) in enumerate(itertools.pairwise(bounds)):
            for name in set(self._layer_names[start:stop]):
                if self._layer_names.count(name) > 1:
                    stages.setdefault(name, []).append(stage)
        return {name: held for name, held in stages.items() if len(held) > 1}

    def tied_groups(self) -> dict[str, TiedGroup]:
        """The tied weights of this stage, by canonical name, with the ranks that hold copies."""
        return self._tied_process_groups


def _tied_head(embedding: Any, hidden: Tensor) -> Tensor:
    logits: Tensor = embedding.logits(hidden)
    return logits


def _specs(
    named: Sequence[tuple[str, Callable[[], nn.Module]]],
    config: RunConfig,
    group: TensorParallelGroup,
) -> list[LayerSpec]:
    names = [name for name, _ in named]

    specs: list[LayerSpec] = []
    for place, (name, factory) in enumerate(named):

        def build(name: str = name, factory: Callable[[], nn.Module] = factory) -> nn.Module:
            return build_layer(name, factory, config.model, config.seed, group)

        if names.count(name) == 1:
            specs.append(_Spec(build))
        else:
            specs.append(_TiedSpec(name, build, _tied_head if place else None))
    return specs


def _tied_process_groups(
    layout: Layout, stages: Mapping[str, Sequence[int]]
) -> dict[str, TiedGroup]:
    """Make, on all ranks, the groups of the ranks that hold one tied weight's copies."""
    mine = {}
    rank = dist.get_rank()
    for name, held in sorted(stages.items()):
        for model in range(layout.tp_size):
            ranks = [
                layout.rank_of(pipe=pipe, data=data, model=model)
                for pipe in held
                for data in range(layout.dp_size)
            ]
            group = dist.new_group(ranks, timeout=DEFAULT_TIMEOUT)
            if rank in ranks:
                mine[f"{name}.weight"] = TiedGroup(process_group=group, copies=len(held))
    return mine
