"""What was learned, kept and forgotten, from the held-out losses at the ends of the entries.

The *matrix* L has a row before the first step (row 0) and one at the end of each entry of the
stream, a column for each held-out set, validation cross-entropy in nats a token as values. With T
the last row (retained, learned and forgetting as in "Revisiting Replay and Gradient Alignment for
Continual Pre-Training of Large Language Models", arXiv 2508.01908):

- retained_j = L_j(T);
- learned_j = L_j(end of j's last entry), that is row 0 for a set trained before this run only;
- forgetting_j = L_j(T) - min L_j(i) over i < T from the end of j's first training on. Positive is
  forgetting, negative is backward transfer. Its mean leaves out the sets of the last task;
- backward_transfer_j = learned_j - L_j(T): positive is an improvement after j's own training
  (Lopez-Paz and Ranzato 2017, losses in place of accuracies). Its mean leaves out the same sets;
- forward_transfer_j = L_j(0) - L_j(the row before j's first training): positive is an improvement
  by the tasks before it. There is none for a set with no task before it.

Where a quantity does not exist (a task that a stopped run never reached, the forgetting of a task
trained once and last; a set that came with a task appended later, before it came) it is None and
not in the mean. A loss that is NaN makes every quantity NaN that depends on it, the means too.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

START_LABEL = "start"


@dataclass(frozen=True)
class MatrixRow:
    """The losses of all held-out sets at one moment."""

    entry: int | None
    """Index of the stream's entry that just ended; None: before the first step."""
    task: str | None
    """Task of that entry; None: before the first step."""
    losses: Mapping[str, float]
    """Held-out set -> nats a token; the same sets in every row."""

    @property
    def label(self) -> str:
        """How the row is called in a table: "2 fr" for a task that ended as entry 2."""
        return START_LABEL if self.task is None else f"{self.entry} {self.task}"


@dataclass(frozen=True)
class SetScores:
    """The measures of one held-out set, in nats a token; None: it does not exist."""

    task: str
    retained: float | None
    learned: float | None
    forgetting: float | None
    backward_transfer: float | None
    forward_transfer: float | None


MEASURES = ("retained", "learned", "forgetting", "backward_transfer", "forward_transfer")


class ForgettingMatrix:
    """The matrix of a run and what follows from it.

    Args:
        rows: Row 0 first, then the ends of entries in the order of training, a task perhaps twice.
        set_tasks: Held-out set -> its task. A task may have several sets.
        trained_before: Tasks that were trained before this run.

    Raises:
        ValueError: no row 0, a row with other sets, or a set without a task.
    """

    def __init__(
        self,
        rows: Sequence[MatrixRow],
        set_tasks: Mapping[str, str],
        trained_before: Collection[str] = (),
    ) -> None:
        self.rows = tuple(rows)
        self.sets = tuple(set_tasks)
        self._set_tasks = dict(set_tasks)
        self._trained_before = frozenset(trained_before)
        self._check()
        self.losses: npt.NDArray[np.float64] = np.array(
            [[row.losses.get(name, np.nan) for name in self.sets] for row in self.rows],
            dtype=np.float64,
        ).reshape(len(self.rows), len(self.sets))
        """(rows, sets), nats a token; NaN where a row has no such set."""

    def _check(self) -> None:
        if not self.rows or self.rows[0].task is not None:
            raise ValueError("the first row must be the one before the first step")
        if any(row.task is None for row in self.rows[1:]):
            raise ValueError("a row after the first is not the end of an entry: it has no task")
        for row in self.rows:
            if self.sets and not set(row.losses) & set(self.sets):
                raise ValueError(
                    f"row {row.label!r} has the sets {sorted(row.losses)}, none of which is among "
                    f"{sorted(self.sets)}"
                )

    def scores(self) -> dict[str, SetScores]:
        """The measures of each set."""
        return {name: self._scores(column, name) for column, name in enumerate(self.sets)}

    def means(self) -> dict[str, float | None]:
        """The mean of each measure over the sets that have it, less those the module leaves out."""
        scores = self.scores()
        last = self.rows[-1].task
        earlier = [score for score in scores.values() if score.task != last]
        result = {}
        for measure in MEASURES:
            after = measure in ("forgetting", "backward_transfer")
            chosen = earlier if after else list(scores.values())
            result[measure] = _mean([getattr(score, measure) for score in chosen])
        return result

    def _trainings(self, task: str) -> list[int]:
        """Rows at whose end the task had just been trained; row 0 if that was before this run."""
        before = [0] if task in self._trained_before else []
        return before + [at for at, row in enumerate(self.rows) if at and row.task == task]

    def _scores(self, column: int, name: str) -> SetScores:
        task = self._set_tasks[name]
        trained = self._trainings(task)
        if not trained:
            return SetScores(task, None, None, None, None, None)
        losses = [row.losses.get(name) for row in self.rows]
        first, final, learned = trained[0], losses[-1], losses[trained[-1]]
        past = losses[first:-1]
        best = None if not past or None in past else float(self.losses[first:-1, column].min())
        return SetScores(
            task=task,
            retained=final,
            learned=learned,
            forgetting=_less(final, best),
            backward_transfer=_less(learned, final),
            forward_transfer=_less(losses[0], losses[first - 1]) if first > 1 else None,
        )


def summary_dict(
    rows: Sequence[MatrixRow],
    set_tasks: Mapping[str, str],
    trained_before: Collection[str] = (),
    extras: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What `summary.json` says of a run's losses, as JSON values.

    Args:
        rows: As for `ForgettingMatrix`.
        set_tasks: As for `ForgettingMatrix`.
        trained_before: As for `ForgettingMatrix`.
        extras: Further keys, passed through; tables show "unigram_entropy" {set: nats a token}.

    Returns:
        For each measure {"mean": number, "sets": {set: number}}; "matrix" {"rows": [{label, entry,
        task}], "sets": [names], "losses": [[number]]}; "set_tasks" and "trained_before" as given;
        then the extras. None stands for what does not exist, is NaN or infinite.

    Raises:
        ValueError: as `ForgettingMatrix`; or an extra has the name of one of these keys.
    """
    summary = matrix_dict(rows, set_tasks, trained_before)
    summary["set_tasks"] = dict(set_tasks)
    summary["trained_before"] = sorted(trained_before)
    taken = sorted(summary.keys() & (extras or {}).keys())
    if taken:
        raise ValueError(f"extras would replace {', '.join(taken)}")
    return summary | dict(extras or {})


def matrix_dict(
    rows: Sequence[MatrixRow],
    set_tasks: Mapping[str, str],
    trained_before: Collection[str] = (),
) -> dict[str, Any]:
    """The measures and the matrix of `summary_dict` alone; arguments and errors as there."""
    matrix = ForgettingMatrix(rows, set_tasks, trained_before)
    scores, means = matrix.scores(), matrix.means()
    summary: dict[str, Any] = {
        measure: {
            "mean": _number(means[measure]),
            "sets": {name: _number(getattr(score, measure)) for name, score in scores.items()},
        }
        for measure in MEASURES
    }
    summary["matrix"] = {
        "rows": [{"label": row.label, "entry": row.entry, "task": row.task} for row in matrix.rows],
        "sets": list(matrix.sets),
        "losses": [[_number(value) for value in row] for row in matrix.losses],
    }
    return summary


def bits_per_byte(
    losses: Mapping[str, float | None], held_out: Mapping[str, Mapping[str, int | None]]
) -> dict[str, Any]:
    """Losses in bits a byte of text, which compare where tokenizers differ.

    bits a byte = nats a token / ln 2 * tokens / bytes (Gao et al. 2020, arXiv 2101.00027).

    Args:
        losses: Held-out set -> nats a token.
        held_out: Held-out set -> {"tokens": that the loss is a mean over, "bytes": of their text,
            None where it is not known}.

    Returns:
        {"mean": over the sets that have one, "sets": {set: bits a byte or None}}.
    """
    sets: dict[str, float | None] = {}
    for name, loss in losses.items():
        size = held_out.get(name, {})
        tokens, text = size.get("tokens"), size.get("bytes")
        if loss is None or not tokens or not text:
            sets[name] = None
        else:
            sets[name] = loss / math.log(2) * tokens / text
    return {"mean": _mean(list(sets.values())), "sets": sets}


def _less(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left - right


def _number(value: float | None) -> float | None:
    """A JSON number: None for NaN and infinity."""
    return float(value) if value is not None and np.isfinite(value) else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
