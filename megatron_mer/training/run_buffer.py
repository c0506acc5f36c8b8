"""The replay buffer in a run: opened at its start, moved on after each batch, with checkpoints."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_mer.checkpoint.layout import step_name
from megatron_mer.continual.replay_buffer import FAILED, NOTHING_TO_WRITE, ReplayBuffer, Share
from megatron_mer.data.record_store import RecordStore
from megatron_mer.engine.distributed import first_failure
from megatron_mer.engine.training_engine import TrainingEngine
from megatron_mer.errors import CheckpointError, DataError, TrainingError
from megatron_mer.log import get_logger
from megatron_mer.training.buffer_folder import About, BufferFolder, folder_of, saved_buffer
from megatron_mer.training.preflight import Prepared
from megatron_mer.training.rank_0 import from_rank_0

logger = get_logger(__name__)


class RunBuffer:
    """One rank's part in the run's replay buffer.

    Args:
        about: what the folder holds.
        folder: of the buffer, on rank 0.
        buffer: what reads and writes its records, on ranks that read data.
    """

    def __init__(
        self, about: About, folder: BufferFolder | None, buffer: ReplayBuffer | None, path: str
    ) -> None:
        self._about = about
        self._folder = folder
        self._path = path
        self._settled = 0.0
        self._due: deque[tuple[int, set[int], int]] = deque()
        self.rows = buffer
        """For the loader."""

    def apply(self, batch: int) -> float:
        """A batch is done, and marked if it was skipped: its rows enter.

        Returns:
            Seconds that the disk held training up.
        """
        return self.rows.apply(batch) if self.rows else 0.0

    def report(self) -> float:
        """What this rank has to say after a step, for `settle`."""
        return self.rows.report() if self.rows else NOTHING_TO_WRITE

    def settle(self, reports: Sequence[float]) -> None:
        """Read what all ranks have written from the buffer. Costs nothing unless one failed.

        Raises:
            TrainingError: on all ranks when any could not write.
        """
        if min(reports) == FAILED:
            reason = first_failure(self.rows.failure() if self.rows else None)
            raise TrainingError(
                f"the replay buffer in {self._path} could not be written ({reason}); checkpoints "
                "and the records that they need are whole. Check the space and the rights there, "
                "then start again: the run resumes"
            )
        if self.rows:
            # Every rank has come to this step, so all have settled what was told in the last one.
            self._prune(self._settled)
            self.rows.settle(reports)
            self._settled = min(reports)

    def saved(self, step: int) -> dict[str, Any] | None:
        """What a checkpoint of this moment says of the buffer; on rank 0, whose state is kept."""
        if self.rows is None or self._folder is None:
            return None
        live, tail = self.rows.live_segments(), self.rows.tail
        self._folder.note(step_name(step), live, tail)
        return saved_buffer(self._about, self._folder.path, live, tail)

    def flush(self) -> Callable[[], None] | None:
        """What a checkpoint has to wait for, in its own thread."""
        return self.rows.flush() if self.rows else None

    def committed(self) -> None:
        """A checkpoint has its name: what none needs any more may go soon. On rank 0."""
        if self._folder and self.rows:
            self._due.append((self.rows.batch, *self._folder.needed()))

    def finish(self) -> None:
        """No rank reads rows any more, and the last checkpoint has its name."""
        self._prune(NOTHING_TO_WRITE)

    def _prune(self, settled: float) -> None:
        """Remove what no checkpoint needs, as far as all ranks have settled."""
        while self.rows and self._due and self._due[0][0] <= settled:
            _, needed, tail = self._due.popleft()
            try:
                self.rows.prune(needed, tail)
            except OSError as error:
                logger.warning("old segments of the replay buffer cannot be removed: %s", error)

    def ready(self, built: bool) -> None:
        """The start found or built all that it needs: note that, and remove the rest. On rank 0."""
        if built and self._folder and self.rows:
            self._folder.built(self._about, self.rows.tail)
        self.committed()
        self.finish()

    def close(self) -> None:
        """Write nothing any more."""
        if self.rows:
            self.rows.close()
        if self._folder:
            self._folder.close()


def open_buffer(
    prepared: Prepared,
    run_state: Mapping[str, Any] | None,
    batches: int,
    engine: TrainingEngine,
    rank: int,
    checkpoints: Path,
) -> RunBuffer | None:
    """Open the run's buffer as it was at its checkpoint, or begin it. Collective.

    Args:
        prepared: the run; its plan has every skipped batch.
        run_state: of the checkpoint; None: the run begins.
        batches: that the run has behind it.
        engine: says what this rank reads.
        rank: this rank.
        checkpoints: folder of the run's checkpoints.

    Returns:
        None: the run replays from no buffer.

    Raises:
        ConfigError: its folder is another run's, or cannot be used.
        DataError: it has to be built, and a dataset is not there.
        CheckpointError: the checkpoint has another buffer than the plan.
    """
    plan, config = prepared.plan, prepared.config
    if not plan.has_buffer:
        return None
    saved = (run_state or {}).get("buffer")
    folder: BufferFolder | None = None
    if rank == 0:
        folder = BufferFolder(config, prepared.tokenizer.fingerprint, checkpoints)
    about, build = from_rank_0(rank, lambda: folder and folder.open(saved, plan.num_slots))
    path = str(folder_of(config))
    buffer = None
    if engine.reads_data:
        at = engine.coordinate
        writes = at.pipe == 0 and at.model == 0
        buffer = ReplayBuffer(
            plan,
            RecordStore(path, about.record_format(), about.segment_records),
            prepared.datasets,
            batches,
            Share(at.data, engine.layout.dp_size) if writes else None,
            sync=os.environ.get("CROSS_SIZE", "1") != "1",
        )
    run_buffer = RunBuffer(about, folder, buffer, path)
    try:
        _make_ready(run_buffer, saved, build, rank)
    except BaseException:
        run_buffer.close()
        raise
    return run_buffer


def _make_ready(buffer: RunBuffer, saved: Mapping[str, Any] | None, build: bool, rank: int) -> None:
    """Compare with the checkpoint, build what is not there, remove what is not needed."""
    reason = None
    rows = buffer.rows
    if rows is not None and saved is not None and rows.tail != int(saved["tail"]):
        reason = f"its log has {saved['tail']} records in the checkpoint, {rows.tail} by the plan"
    if reason is None and rows is not None and build:
        try:
            rows.build()
        except (DataError, OSError) as error:
            reason = str(error)
    reason = first_failure(reason)
    if reason is not None:
        raise CheckpointError(f"the replay buffer cannot be opened: {reason}")
    if rank == 0:
        buffer.ready(build)
