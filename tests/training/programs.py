"""What the ranks of the distributed tests run; loaded by path in each rank."""

import json
import os
import signal
from pathlib import Path

import torch


def train(
    arguments,
    kill_after=None,
    poison=None,
    record=None,
    disk_full_at=None,
    count_blocks=False,
    buffer_full_at=None,
    slow_buffer=None,
):
    """Run the training program as its script does.

    Args:
        arguments: its command line.
        kill_after: kill this rank with SIGKILL once the line of this batch is written.
        poison: {"batch", "rank"}: make one gradient NaN there.
        record: folder to write every batch's tokens into, one file a rank.
        count_blocks: return how often a block ran forward.
        slow_buffer: {"rank", "seconds"}: how long the replay buffer's disk takes there for a write.
        disk_full_at: the last rank finds the disk full when it writes this step's checkpoint.
    """
    from megatron_mer.training import main

    torch.set_num_threads(1)
    if kill_after is not None:
        _kill_after(kill_after)
    if poison is not None:
        _poison(poison)
    if record is not None:
        _record(Path(record))
    if disk_full_at is not None:
        _disk_full(disk_full_at)
    if buffer_full_at is not None:
        _buffer_full(buffer_full_at)
    if slow_buffer is not None and int(os.environ["RANK"]) == slow_buffer["rank"]:
        _slow_buffer(slow_buffer["seconds"])
    blocks = _count_blocks() if count_blocks else []
    code = main.main(arguments)
    if code:
        raise SystemExit(code)
    return len(blocks)


def _kill_after(batch):
    from megatron_mer.training.loop import Trainer

    after = Trainer._after

    def killed(self, done, entry, outcome):
        after(self, done, entry, outcome)
        if done == batch:
            # What the tests expect on the disk would else depend on the speed of the disk.
            self.wait_for_checkpoint()
            self._copies.finish(60.0)
            os.kill(os.getpid(), signal.SIGKILL)

    Trainer._after = killed


def _poison(poison):
    from megatron_mer.engine.training_engine import TrainingEngine

    step = TrainingEngine.train_step

    def poisoned(self, batch, lr, report):
        self.steps_taken = getattr(self, "steps_taken", -1) + 1
        here = self.steps_taken == poison["batch"] and int(os.environ["RANK"]) == poison["rank"]
        parameter = next(iter(self._names))
        handle = parameter.register_hook(lambda grad: grad * float("nan")) if here else None
        try:
            return step(self, batch, lr, report)
        finally:
            if handle:
                handle.remove()

    TrainingEngine.train_step = poisoned


def _disk_full(step):
    import errno

    from megatron_mer.checkpoint import writer

    write = writer.write_rank

    def full(temporary, fragments, rank, world_size, stop):
        if f"{step:09d}" in str(temporary) and rank == world_size - 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(temporary))
        return write(temporary, fragments, rank, world_size, stop)

    writer.write_rank = full


def _buffer_full(batch):
    import errno

    from megatron_mer.continual.replay_buffer import ReplayBuffer

    apply = ReplayBuffer.apply

    def full(self, done):
        if done == batch and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            path = str(self._store.path(0))

            def refuse(*_):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

            self._store.write = refuse
            self._store.copy = refuse
        return apply(self, done)

    ReplayBuffer.apply = full


def _slow_buffer(seconds):
    import time

    from megatron_mer.data.record_store import RecordStore

    make = RecordStore.__init__

    class Slow:
        """Writes to a file a while after its descriptor was told."""

        def __init__(self, records):
            self._records = records

        def __getattr__(self, name):
            work = getattr(self._records, name)
            if name not in ("write", "store"):
                return work

            def later(descriptors, *rest):
                files = [os.readlink(f"/proc/self/fd/{one}") for one in descriptors]
                time.sleep(seconds)
                assert [os.readlink(f"/proc/self/fd/{one}") for one in descriptors] == files
                return work(descriptors, *rest)

            return later

    def slow(self, *arguments):
        make(self, *arguments)
        self._records = Slow(self._records)

    RecordStore.__init__ = slow


def _count_blocks():
    from megatron_mer.model.llama import Block

    seen = []
    forward = Block.forward

    def counted(self, x):
        seen.append(None)
        return forward(self, x)

    Block.forward = counted
    return seen


def _record(folder):
    from megatron_mer.engine.training_engine import TrainingEngine

    step = TrainingEngine.train_step

    def recorded(self, batch, lr, report):
        if batch is not None:
            rows = [
                [*inputs.tolist(), int(target[-1]), bool(replayed), mask.tolist()]
                for micro in batch.micro_batches
                for inputs, target, replayed, mask in zip(
                    micro.inputs, micro.targets, micro.is_replay, micro.mask, strict=True
                )
            ]
            at = self.coordinate
            path = folder / f"batch_{batch.batch}_data_{at.data}_pipe_{at.pipe}_model_{at.model}"
            path.write_text(json.dumps(rows))
        return step(self, batch, lr, report)

    TrainingEngine.train_step = recorded


def check_nodes(folder, limits, skewed=None):
    """Check nodes, of which each rank is one; the error's text, if there is one.

    Args:
        folder: output_dir.
        limits: keys of launch.preflight.
        skewed: {"rank", "seconds"}: whose clock is wrong, and by how much.
    """
    import time

    from megatron_mer.config import PreflightConfig
    from megatron_mer.engine.distributed import start_distributed
    from megatron_mer.errors import NodeError
    from megatron_mer.training import node_checks

    rank = int(os.environ["RANK"])
    os.environ["SLURMD_NODENAME"] = f"n{rank}"
    if skewed is not None and skewed["rank"] == rank:
        right = time.time
        time.time = lambda: right() + skewed["seconds"]
    start_distributed()
    try:
        node_checks.check_nodes(PreflightConfig(**limits), Path(folder), rank)
    except NodeError as error:
        return str(error)
    return None
