"""TensorBoard: event files beside the run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from megatron_mer.training.tracker_rows import Row, summary_rows


class TensorboardTracker:
    """Writes event files that TensorBoard reads while the run goes on.

    A resumed run writes a new file, at whose beginning readers drop what an earlier one holds of
    later steps. Files are flushed at each checkpoint, so nothing up to it is missing.

    Args:
        folder: of the event files.
        step: steps that the run has behind it.

    Raises:
        OSError: the folder cannot be written.
    """

    name = "tensorboard"

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        begun = any(folder.glob("events.out.tfevents.*"))
        self.last_step = step if begun and step > 0 else -1
        # The writer types its methods only in part.
        self._writer: Any = SummaryWriter(str(folder), purge_step=self.last_step + 1)

    def log(self, step: int, row: Row) -> None:
        """Record the numbers of a step."""
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Write the events to their file."""
        self._writer.flush()

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Add the measures of a run that is done, at its last step, and close the file."""
        if summary:
            for name, value in summary_rows(summary):
                self._writer.add_scalar(f"summary/{name}", value, int(summary["steps"]))
        self._writer.close()
