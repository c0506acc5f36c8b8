"""What the log says of steps."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from megatron_mer.log import get_logger
from megatron_mer.training.console import Progress

LOG_SECONDS = 10.0
"""Between two lines about steps."""
LONG_WAIT = 0.1
"""Share of a step that it may wait for the replay buffer without a word."""

logger = get_logger(__name__)


class StepLog:
    """Writes a line about a step now and then, and one about waits that are too long.

    Args:
        total_batches: of the whole run.
    """

    def __init__(self, total_batches: int) -> None:
        self._total = total_batches
        self._logged_at = self._warned_at = -math.inf

    def show(self, line: Mapping[str, Any], progress: Progress, ends: bool) -> None:
        """Show a batch.

        Args:
            line: of metrics.jsonl.
            progress: the bar.
            ends: it is the last of its entry, which always has a line.
        """
        loss = math.nan if line["loss"] is None else line["loss"]
        batches = line["batch"] + 1
        progress.update(batches, line["task"], loss, line["tokens_per_second"])
        self._warn_of_wait(line)
        if not ends and time.monotonic() - self._logged_at < LOG_SECONDS:
            return
        self._logged_at = time.monotonic()
        logger.info(
            "task %s  step %s/%d  loss %.4f  grad norm %.3f  lr %.2e  %.0f tokens/s",
            line["task"],
            "-" if line["step"] is None else line["step"],
            self._total,
            loss,
            math.nan if line["grad_norm"] is None else line["grad_norm"],
            line["lr"],
            line["tokens_per_second"],
        )

    def _warn_of_wait(self, line: Mapping[str, Any]) -> None:
        waited = line.get("replay_wait_seconds", 0.0)
        if waited <= LONG_WAIT * line["step_seconds"]:
            return
        if time.monotonic() - self._warned_at < LOG_SECONDS:
            return
        self._warned_at = time.monotonic()
        logger.warning(
            "batch %d waited %.2f s of its %.2f s for the replay buffer's disk; put replay.dir on "
            "a faster one, or read further ahead (replay.prefetch)",
            line["batch"],
            waited,
            line["step_seconds"],
        )
