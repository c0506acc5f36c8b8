"""Held-out losses in the loop: the same rows for every layout, without effect on training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_mer.continual.entries import Entry
from megatron_mer.continual.reptile import Reptile
from megatron_mer.data.evaluation_set import EvaluationSet
from megatron_mer.engine.training_engine import TrainingEngine
from megatron_mer.training.run_state import RunState


class Evaluator:
    """Evaluates every held-out set with the weights as they stand.

    Args:
        valid: held-out sets by name.
        engine: the model.
        micro_batch_size: rows of a micro batch, as in training.
    """

    def __init__(
        self, valid: Mapping[str, EvaluationSet], engine: TrainingEngine, micro_batch_size: int
    ) -> None:
        self._valid = valid
        self._engine = engine
        self._micro_batch_size = micro_batch_size

    def evaluate(self) -> dict[str, float]:
        """Loss of every set in nats a token, by name, equal on all ranks. Collective."""
        return {name: self._loss(held_out) for name, held_out in self._valid.items()}

    def evaluate_anchor(self, reptile: Reptile, fast: Mapping[str, float]) -> dict[str, float]:
        """The same with the weights of the last Reptile update. Collective.

        Args:
            reptile: holds the anchor.
            fast: what `evaluate` gave; right after a Reptile update the anchor has these losses.
        """
        if reptile.updates_since == 0:
            return dict(fast)
        with reptile.at_anchor():
            return self.evaluate()

    def _loss(self, held_out: EvaluationSet) -> float:
        engine = self._engine
        batches = held_out.batches(
            engine.coordinate.data, engine.layout.dp_size, self._micro_batch_size
        )
        micro_batches = (micro for batch in batches for micro in batch.micro_batches)
        return engine.evaluate(
            micro_batches if engine.reads_data else None,
            held_out.num_batches * engine.num_micro_batches,
        )


def evaluation_line(
    moment: str,
    entry: Entry | None,
    state: RunState,
    reptile: Reptile | None,
    losses: Mapping[str, float],
    anchor: Mapping[str, float] | None,
    seconds: float,
) -> dict[str, Any]:
    """A line of ``evaluations.jsonl``.

    Args:
        moment: ``start``, ``entry_end`` or ``interval``.
        entry: the entry in training, None before the first step.
        state: where the run stands.
        reptile: its Reptile, None without.
        losses: nats a token by held-out set.
        anchor: the same with the anchor; None: not evaluated.
        seconds: that it took.
    """
    line = {
        "step": state.updates,
        "batches": state.batches,
        "moment": moment,
        "entry": entry.index if entry else None,
        "task": entry.task if entry else None,
        "updates_since_reptile": reptile.updates_since if reptile else None,
        "losses": {name: finite(loss) for name, loss in losses.items()},
    }
    if anchor is not None:
        line["losses_anchor"] = {name: finite(loss) for name, loss in anchor.items()}
    return {**line, "seconds": round(seconds, 3)}


def finite(value: float | None) -> float | None:
    """JSON has no NaN or infinity."""
    return value if value is not None and math.isfinite(value) else None
