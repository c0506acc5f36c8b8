"""The training loss by where the rows came from: fresh or replayed, task, dataset."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_mer.continual.plan import Plan
from megatron_mer.data.batches import Rows

KINDS = ("fresh", "replay")
"""Names of `Rows.kind`."""

BySource = dict[str, dict[str, list[float | None]]]
"""Name -> kind -> [nats a token, tokens]; a kind without rows is left out, no finite loss: None."""


class SourceLosses:
    """Splits the losses of a batch's rows; only ids are compared, names are looked up last.

    Args:
        plan: of the run; its entries and datasets name the sources.
    """

    def __init__(self, plan: Plan) -> None:
        self._datasets = plan.datasets
        self._tasks = list(dict.fromkeys(entry.task for entry in plan.entries))
        numbers = {task: number for number, task in enumerate(self._tasks)}
        self._task_of_entry = np.array([numbers[entry.task] for entry in plan.entries])

    def by_kind(self, rows: Rows, losses: NDArray[np.float64]) -> dict[str, float | None]:
        """Nats a token over fresh and over replayed rows; None where there are none.

        Args:
            rows: the N rows of a batch.
            losses: (N, 2) their summed token losses in nats, and their unmasked tokens.
        """
        found = _split(np.zeros(len(losses), dtype=np.int64), ["all"], rows, losses)["all"]
        return {kind: found[kind][0] if kind in found else None for kind in KINDS}

    def by_task(self, rows: Rows, losses: NDArray[np.float64]) -> BySource:
        """Loss and tokens by task and kind; arguments as for `by_kind`."""
        return _split(self._task_of_entry[rows.entry], self._tasks, rows, losses)

    def by_dataset(self, rows: Rows, losses: NDArray[np.float64]) -> BySource:
        """Loss and tokens by dataset and kind; arguments as for `by_kind`."""
        return _split(rows.dataset.astype(np.int64), self._datasets, rows, losses)


def _split(
    sources: NDArray[np.int64], names: Sequence[str], rows: Rows, losses: NDArray[np.float64]
) -> BySource:
    """Sum over the rows with equal (source, kind), sources in the order of their names."""
    keys = sources * len(KINDS) + rows.kind
    present = np.bincount(keys).nonzero()[0]
    totals = np.bincount(keys, weights=losses[:, 0])[present]
    tokens = np.bincount(keys, weights=losses[:, 1])[present]
    split: BySource = {}
    for key, total, count in zip(present.tolist(), totals.tolist(), tokens.tolist(), strict=True):
        source, kind = divmod(key, len(KINDS))
        mean = total / count if count and math.isfinite(total) else None
        split.setdefault(names[source], {})[KINDS[kind]] = [mean, int(count)]
    return split
