"""The trainer: one batch after another, and what is due after each."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_mer.checkpoint import CheckpointWriter
from megatron_mer.checkpoint.copier import NoCopies
from megatron_mer.continual.entries import Entry
from megatron_mer.continual.reptile import Reptile, ReptileUpdate
from megatron_mer.data.batches import RankBatch, Rows
from megatron_mer.data.loader import TrainLoader
from megatron_mer.engine.distributed import device, first_failure
from megatron_mer.engine.training_engine import StepOutcome, TrainingEngine
from megatron_mer.errors import RunStopped
from megatron_mer.launch.requests import Request
from megatron_mer.log import get_logger
from megatron_mer.model import Dimensions
from megatron_mer.training.bounds import agreed_bound
from megatron_mer.training.console import Progress
from megatron_mer.training.copies import SECONDS_AT_THE_END
from megatron_mer.training.evaluation import Evaluator, evaluation_line, finite
from megatron_mer.training.exports import AfterCheckpoint
from megatron_mer.training.guard import Guard
from megatron_mer.training.learning_rate import lr_of
from megatron_mer.training.outputs import RunDirectory
from megatron_mer.training.preflight import Prepared
from megatron_mer.training.resume import settings
from megatron_mer.training.run_buffer import RunBuffer
from megatron_mer.training.run_state import RunState
from megatron_mer.training.skipped import note_skipped
from megatron_mer.training.sources import SourceLosses
from megatron_mer.training.step_log import StepLog
from megatron_mer.training.summary import show_results, write_results
from megatron_mer.training.trackers import Trackers
from megatron_mer.training.usage import Usage

logger = get_logger(__name__)


class Trainer:
    """Trains a prepared run from where its state stands to the end of its stream.

    The order after each batch is: optimizer update, Reptile, metrics, evaluation, checkpoint. A
    checkpoint between the update and Reptile would lose the Reptile update on resume.

    Args:
        prepared: the checked run.
        engine: the model under DeepSpeed, at ``state``.
        reptile: its Reptile, None without.
        state: where the run stands; moved on in place.
        outputs: the run's directory.
        rank: this rank.
        world_size: number of ranks.
        guard: what it is asked for from outside, and what watches that it moves.
        trackers: metric services, caught up with the files; None: there are none.
        buffer: the replay buffer as it was at ``state``; None: replay is from the stream.
    """

    def __init__(
        self,
        prepared: Prepared,
        engine: TrainingEngine,
        reptile: Reptile | None,
        state: RunState,
        outputs: RunDirectory,
        rank: int,
        world_size: int,
        guard: Guard,
        trackers: Trackers | None = None,
        buffer: RunBuffer | None = None,
    ) -> None:
        self.config = prepared.config
        self.plan = prepared.plan
        self.engine = engine
        self.reptile = reptile
        self.state = state
        self.outputs = outputs
        self.rank = rank
        self.world_size = world_size
        self.guard = guard
        self.trackers = trackers or Trackers()
        self.buffer = buffer
        self._waited_for_buffer = 0.0
        self.evaluator = Evaluator(prepared.valid, engine, prepared.config.batch.micro_batch_size)
        self._sources = SourceLosses(prepared.plan)
        self._usage = Usage(prepared.config, world_size, device())
        self._prepared = prepared
        self._settings = settings(prepared)
        self._saved_at = -1
        self._log = StepLog(prepared.plan.total_batches)
        self._copies = AfterCheckpoint(prepared.config, outputs) if rank == 0 else NoCopies()
        self._checkpoints = CheckpointWriter(
            outputs.checkpoints,
            rank=rank,
            world_size=world_size,
            first_failure=first_failure,
            keep_last=prepared.config.checkpoint.keep_last,
            keep_every=prepared.config.checkpoint.keep_every,
            snapshot_bytes=engine.checkpoint_bytes(self._reptile_tensors()),
            pin_memory=device().type == "cuda",
            committed=self._committed,
            in_use=self._copies.in_hand,
            progress=guard.progress,
            measured=guard.pace.checkpoint,
        )
        self._copies.start()

    def run(self) -> None:
        """Train to the end and write the results. Collective."""
        self.guard.before_the_first_step(self.state.updates)
        if self.state.batches == 0:
            self._evaluate("start", None)
        elif self.state.evaluation_due:
            self._evaluate_what_is_due(self.state.evaluation_due)
        loader = self._loader() if self.engine.reads_data else None
        progress = Progress(self.plan.total_batches, enabled=self.rank == 0)
        progress.start(self.state.batches)
        try:
            for batch in range(self.state.batches, self.plan.total_batches):
                self._step(batch, loader, progress)
        finally:
            progress.stop()
            if loader is not None:
                loader.close()
        self._finish()

    def _loader(self) -> TrainLoader:
        config = self.config
        return TrainLoader(
            plan=self.plan,
            datasets=self._prepared.datasets,
            seq_length=config.model.seq_length,
            vocab_size=Dimensions.of(config.model).vocab_size,
            dp_rank=self.engine.coordinate.data,
            dp_size=self.engine.layout.dp_size,
            micro_batch_size=config.batch.micro_batch_size,
            eod_mask_loss=config.batch.eod_mask_loss,
            first_batch=self.state.batches,
            keep_rows=self.rank == 0,
            buffer=self.buffer.rows if self.buffer else None,
            prefetch=config.replay.prefetch if config.replay else 2,
        )

    def _step(self, batch: int, loader: TrainLoader | None, progress: Progress) -> None:
        begin = time.perf_counter()
        lr = lr_of(self.config, self.plan, batch, self.state.updates, self.state.horizon)
        data = next(loader) if loader else None
        waited = time.perf_counter() - begin
        outcome = self.engine.train_step(data, lr, self._report(data, waited))
        update = self._count(batch, outcome, loader)
        if self.buffer:
            self._waited_for_buffer = self.buffer.apply(batch)
            self.buffer.settle(outcome.reports[:, 4].tolist())
        seconds = time.perf_counter() - begin
        self.state.seconds += seconds
        self.guard.step_ended(seconds)
        entry = self.plan.entry_of(batch)
        if data is not None and data.rows is not None:
            line = self._metrics(batch, entry, lr, outcome, data.rows, update, seconds)
            self.outputs.check_lock()
            self.outputs.append_metrics(line)
            self.trackers.metrics(line)
            self._log.show(line, progress, ends=self.state.batches == entry.last_batch)
        self._checkpoints.advance(outcome.reports[:, 3].tolist())
        self._after(batch, entry, outcome)

    def _report(self, data: RankBatch | None, waited: float) -> tuple[float, ...]:
        """What every rank hears of this one: waits, memory, how far its writes are."""
        # A batch that was there in time waited for nothing; else for what the buffer took of it.
        replay = min(waited, data.buffer_seconds) if data else 0.0
        return (
            waited,
            replay + self._waited_for_buffer,
            self._usage.memory_gib(),
            self._checkpoints.report(),
            self.buffer.report() if self.buffer else 0.0,
            self.guard.report(),
        )

    def _count(
        self, batch: int, outcome: StepOutcome, loader: TrainLoader | None
    ) -> ReptileUpdate | None:
        """Move the counters; mark a batch without an update; let Reptile count an update."""
        self.state.batches = batch + 1
        if outcome.applied:
            self.state.updates += 1
            self.state.skipped_in_a_row = 0
            return self.reptile.after_update() if self.reptile else None
        if loader is not None:
            loader.skip(batch)
        else:
            self.plan.mark_skipped(batch)
        self.state.skipped_in_a_row += 1
        note_skipped(batch, outcome.loss, self.state.skipped_in_a_row, self.rank)
        return None

    def _metrics(
        self,
        batch: int,
        entry: Entry,
        lr: float,
        outcome: StepOutcome,
        rows: Rows,
        update: ReptileUpdate | None,
        seconds: float,
    ) -> dict[str, Any]:
        tokens = len(outcome.rows) * self.config.model.seq_length
        by_kind = self._sources.by_kind(rows, outcome.rows)
        waited, replay_waited, memory = outcome.reports[:, :3].max(0).tolist()
        line = {
            "step": self.state.updates if outcome.applied else None,
            "batch": batch,
            "task": entry.task,
            "lr": lr,
            "loss": finite(outcome.loss),
            "loss_fresh": by_kind["fresh"],
            "loss_replay": by_kind["replay"],
            "grad_norm": finite(outcome.grad_norm),
            "replay_rows": self.plan.replay_rows(batch),
            "consumed_samples": self.plan.rows_before(self.state.batches),
            "consumed_fresh_samples": self.plan.fresh_rows_before(self.state.batches),
            "step_seconds": round(seconds, 6),
            "data_wait_seconds": round(waited, 6),
            **({"replay_wait_seconds": round(replay_waited, 6)} if self.buffer else {}),
            **self._usage.speed(tokens, seconds),
            "memory_gib": round(memory, 3),
            "loss_by_task": self._sources.by_task(rows, outcome.rows),
        }
        every = self.config.metrics.by_dataset_every_steps
        if every and outcome.applied and self.state.updates % every == 0:
            line["loss_by_dataset"] = self._sources.by_dataset(rows, outcome.rows)
        if self.reptile:
            line["updates_since_reptile"] = self.reptile.updates_since
        if update:
            line["reptile_delta_norm"] = update.delta_norm
            line["reptile_delta_cosine"] = update.delta_cosine
        return line

    def _after(self, batch: int, entry: Entry, outcome: StepOutcome) -> None:
        """Evaluate and save where it is due or asked for."""
        request = self.guard.agreed(outcome.reports[:, 5])
        ends = batch + 1 == entry.last_batch
        every = self.config.evaluate.every_steps if self.config.evaluate else None
        interval = outcome.applied and every and self.state.updates % every == 0
        moment = "entry_end" if ends else "interval" if interval else None
        too_much = None
        if request.effect == "requeue":  # There may be no time for more than the checkpoint.
            self.state.evaluation_due = moment
        elif moment:
            too_much = self._evaluate(moment, entry)
        every = self.config.checkpoint.every_steps
        due = ends or (outcome.applied and every and self.state.updates % every == 0)
        self.guard.answer(request, self.state.updates)
        if due or request:
            self.save(permanent=ends)
        if too_much:
            self._bound(too_much)
        self._obey(request)

    def _obey(self, request: Request) -> None:
        """Do what is asked for; the checkpoint that answers it was begun. Collective.

        Raises:
            RunStopped: the run is to end; a checkpoint is there.
        """
        if request.effect not in ("stop", "requeue"):
            return
        self.wait_for_checkpoint()
        if request.effect == "stop":
            self.guard.no_more_steps()
            self._copies.finish(SECONDS_AT_THE_END)
        raise self.guard.stop(request, self.state.updates, saved=True)

    def _evaluate_what_is_due(self, moment: str) -> None:
        """Make up for what the last start had no time for; its checkpoint is written again."""
        entry = self.plan.entry_of(self.state.batches - 1)
        too_much = self._evaluate(moment, entry)
        self.state.evaluation_due = None
        self.save(permanent=moment == "entry_end")
        if too_much:
            self._bound(too_much)

    def _evaluate(self, moment: str, entry: Entry | None) -> str | None:
        """Evaluate every held-out set and write the line.

        Args:
            moment: ``start``, ``entry_end`` (a row of the forgetting matrix) or ``interval``.
            entry: the entry in training, None before the first step.

        Returns:
            On every rank, what is above the bound on forgetting; None if nothing is.
        """
        begin = time.perf_counter()
        losses = self.evaluator.evaluate()
        anchor = None
        if self.reptile and moment == "entry_end":
            anchor = self.evaluator.evaluate_anchor(self.reptile, losses)
        seconds = time.perf_counter() - begin
        self.state.seconds += seconds
        self.guard.pace.evaluation(seconds)
        if not losses:
            return None
        if self.rank == 0:
            line = evaluation_line(moment, entry, self.state, self.reptile, losses, anchor, seconds)
            self.outputs.append_evaluation(line)
            self.trackers.evaluation(line)
            shown = "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
            where = "before the first step" if entry is None else f"step {self.state.updates}"
            logger.info("held-out loss, %s: %s", where, shown)
        return agreed_bound(self.config, self.outputs, self.rank, self.state.updates)

    def _bound(self, text: str) -> None:
        """Do what the configuration says of too much forgetting. Collective.

        Raises:
            RunStopped: it says to stop; a checkpoint is there.
        """
        if self.rank == 0:
            logger.warning("%s", text)
        bounds = self.config.evaluate.bounds if self.config.evaluate else None
        if bounds is None or bounds.action == "warn":
            return
        self.save()
        self.wait_for_checkpoint()
        self.guard.no_more_steps()
        self._copies.finish(SECONDS_AT_THE_END)
        raise RunStopped(
            f"{text}; a checkpoint was saved. Start again to go on to the next evaluation, raise "
            "the bound, or change replay (--accept replay)"
        )

    def save(self, permanent: bool = False) -> None:
        """Begin to write a checkpoint of everything; training goes on meanwhile. Collective.

        Args:
            permanent: it stays for good, as those at ends of entries do.
        """
        if self._saved_at == self.state.batches:
            return
        if self.rank == 0:
            self.outputs.sync()
            self.trackers.flush()
        self._checkpoints.save(
            self.state.updates,
            self.engine.fragments(self._reptile_tensors()),
            self.state.to_json(
                history=self.plan.history(),
                settings=self._settings,
                reptile=self.reptile.counters() if self.reptile else None,
                buffer=self.buffer.saved(self.state.updates) if self.buffer else None,
            ),
            permanent,
            self.buffer.flush() if self.buffer else None,
        )
        self._saved_at = self.state.batches
        if self.rank == 0:
            self.outputs.write_json("plan.json", self.plan.history())

    def wait_for_checkpoint(self) -> None:
        """Return when the last checkpoint is on the disk. Collective."""
        self._checkpoints.wait()

    def close(self) -> None:
        """Return when this rank writes no checkpoint any more; an unfinished one is given up."""
        self._checkpoints.close()
        self._copies.close()

    def _committed(self, step: int) -> None:
        self.outputs.write_status("running", step)
        self.guard.saved(step)
        if self.buffer:
            self.buffer.committed()
        self._copies.offer(step)

    def _reptile_tensors(self) -> Mapping[str, Sequence[Tensor]]:
        return self.reptile.tensors() if self.reptile else {}

    def _finish(self) -> None:
        """Write summary, ledger and picture; say that the run is done."""
        self.save()
        self.wait_for_checkpoint()
        self.guard.no_more_steps()
        if self.buffer:
            self.buffer.finish()
        if self.rank == 0:
            self.trackers.finish(write_results(self.outputs, self._prepared, self.state))
            show_results(self.outputs)
        dist.barrier()
        self.guard.close()
        if self.rank == 0:
            self.outputs.write_status("done", self.state.updates)
        self._copies.finish(SECONDS_AT_THE_END)
