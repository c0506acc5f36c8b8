"""What replay from a buffer and from the stream costs a training step; what the buffer's disk does.

    python benchmarks/replay.py [--part step|disk|memory|all] [--steps 200] [--workdir DIR]

step: the quick start's model in fp32, one process. Batches of three runs take turns, so that
whatever else the machine does meets all three: replay (alpha 0.25) from a buffer, from the stream,
and none. A step is what the training loop does of it: waiting for rows, the update, and what the
buffer does after it. The first rounds do not count. Needs what `make quickstart` prepares.

disk: records of 2,048 tokens of 2 bytes, appended, and drawn at random, beside plain writes and
reads of as many bytes by the system's calls in Python, in turns, with the files in the page cache.
Appending is measured with fsync too.

memory: of the buffer's tables and threads while from 1 to 10 times its capacity enter.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from decimal import Decimal
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.parts.measure import ROOT, timed
from megatron_mer.continual.plan import Plan
from megatron_mer.continual.spec import DatasetSpec, EntrySpec, PlanSpec, ReplaySpec
from megatron_mer.data.record_store import RecordFormat, RecordStore

MOST_SLOWER = 0.01
"""Limit: the step with replay over the step without."""
WARM_UP = 20
CONFIG = ROOT / "examples/quickstart/run.yaml"
FIRST_BATCH = 150  # the quick start's second task: the first with something to replay
VARIANTS = {
    "no replay": ["--replay", "null"],
    "stream": ["--replay.source", "stream"],
    "buffer": ["--replay.source", "buffer", "--replay.capacity_samples", "450"],
}


def measure_steps(steps: int, workdir: str | None) -> bool:
    """Print the times of a step; whether the limit is met."""
    os.chdir(ROOT)  # The quick start's paths are relative.
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory(dir=workdir) as folder, ExitStack() as stack:
        runs = dict(_steps(Path(folder), stack))
        for batch in range(FIRST_BATCH, FIRST_BATCH + WARM_UP + steps):
            for name, step in runs.items():
                times[name].append(step(batch))
    plain = times["no replay"][WARM_UP:]
    print(f"step of the quick start's model, {steps} batches of each, in turns:")
    worst = 0.0
    for name, values in times.items():
        counted = values[WARM_UP:]
        ratios = [own / other for own, other in zip(counted, plain, strict=True)]
        ratio = statistics.median(ratios)
        worst = max(worst, ratio - 1) if name != "no replay" else worst
        print(
            f"  {name:10} {statistics.median(counted) * 1e3:8.3f} ms   {ratio - 1:+7.2%} of the "
            "step without replay (median of pairs)"
        )
    print(f"  limit {MOST_SLOWER:+.0%}{'' if worst <= MOST_SLOWER else '   MISSED'}")
    return worst <= MOST_SLOWER


def _steps(folder: Path, stack: ExitStack) -> Iterator[tuple[str, Callable[[int], float]]]:
    """For each variant what does one batch and returns its seconds; one model for all of them."""
    from megatron_mer.config import load_config
    from megatron_mer.engine.distributed import start_distributed
    from megatron_mer.engine.training_engine import TrainingEngine
    from megatron_mer.launch.environment import rank_environment
    from megatron_mer.parallel import Layout
    from megatron_mer.training.preflight import prepare
    from megatron_mer.training.run_buffer import open_buffer

    rank_environment(os.environ).export(os.environ)
    engine = None
    for name, options in VARIANTS.items():
        # fp32: not every CPU computes bf16 at a speed that says anything.
        output = ["--output_dir", str(folder / name), "--parallel.pp_size=1", "--precision=fp32"]
        config = load_config(CONFIG, [*output, *options])
        prepared = prepare(config, world_size=1)
        if engine is None:
            start_distributed()
            engine = TrainingEngine(prepared.config, Layout.of(config.parallel, 1), 0)
        (folder / name).mkdir()
        buffer = open_buffer(prepared, None, FIRST_BATCH, engine, 0, folder / name / "checkpoints")
        if buffer:
            stack.callback(buffer.close)
        yield name, _step(prepared, engine, buffer, stack)


def _step(prepared, engine, buffer, stack: ExitStack) -> Callable[[int], float]:  # type: ignore[no-untyped-def]
    from megatron_mer.data.loader import TrainLoader

    config = prepared.config
    loader = stack.enter_context(
        TrainLoader(
            plan=prepared.plan,
            datasets=prepared.datasets,
            seq_length=config.model.seq_length,
            vocab_size=config.model.vocab_size,
            dp_rank=0,
            dp_size=1,
            micro_batch_size=config.batch.micro_batch_size,
            first_batch=FIRST_BATCH,
            keep_rows=True,
            buffer=buffer.rows if buffer else None,
        )
    )

    def step(batch: int) -> float:
        begin = time.perf_counter()
        data = next(loader)
        outcome = engine.train_step(data, 1e-3, (buffer.report() if buffer else 0.0,))
        if buffer:
            buffer.apply(batch)
            buffer.settle(outcome.reports[:, 0].tolist())
        return time.perf_counter() - begin

    return step


def measure_disk(workdir: str | None, rows: int = 16_384, at_once: int = 1_024) -> None:
    """Print rows a second of records, and of plain calls for the same bytes."""
    record = RecordFormat(2048, 50_000, False, 1)
    size = record.record_bytes
    generator = np.random.default_rng(1)
    tokens = generator.integers(0, 50_000, (at_once, 2049))
    order = generator.permutation(rows).reshape(-1, at_once)
    identity = np.stack([np.arange(rows), np.zeros(rows), np.arange(rows)], 1).astype(np.int64)
    names = ("append", "append, fsync", "plain write", "plain write, fsync", "draw", "plain read")
    times: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(dir=workdir) as folder:
        for number in range(6):
            place = Path(folder) / str(number)
            place.mkdir()
            store = RecordStore(place, record, 1024)
            blocks = [np.arange(at, at + at_once) for at in range(0, rows, at_once)]
            appended = timed(lambda: [store.write(b, identity[b], tokens) for b in blocks])  # noqa: B023
            flushed = timed(store.sync)
            with _plain(place / "plain", size) as (write, read, flush):
                written = timed(lambda: [write(int(row)) for b in blocks for row in b])  # noqa: B023
                plain_flushed = timed(flush)
                drawn = timed(lambda: [store.read(b, identity[b]) for b in order])  # noqa: B023
                plain = timed(lambda: [read(int(row)) for b in order for row in b])
            store.close()
            both = (appended, appended + flushed, written, written + plain_flushed, drawn, plain)
            for name, value in zip(names, both, strict=True):
                times[name].append(value)
    print(f"records of {size} bytes, {rows} rows, {at_once} a call, files in the page cache:")
    for name, values in times.items():
        median = statistics.median(values[1:])
        rate = rows / median
        print(f"  {name:18} {rate:10,.0f} rows/s  {rate * size / 1e6:8,.0f} MB/s")


@contextmanager
def _plain(path: Path, size: int):  # type: ignore[no-untyped-def]
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    content, target = bytes(size), bytearray(size)
    try:
        yield (
            lambda row: os.pwrite(descriptor, content, row * size),
            lambda row: os.preadv(descriptor, [target], row * size),
            lambda: os.fsync(descriptor),
        )
    finally:
        os.close(descriptor)


def measure_memory(capacity: int = 200_000) -> None:
    """Print the memory of the buffer's tables as rows enter."""
    rows = 4096
    batches = 10 * capacity // rows + 1
    entry = EntrySpec("a", (DatasetSpec("a", 2 * 10 * capacity),), steps=batches)
    replay = ReplaySpec(Decimal(0), source="buffer", capacity=capacity)
    plan = Plan(PlanSpec(1, rows, 2048, replay, (entry,)))
    log = plan.buffer_log(max(capacity // 64, 1))
    print(f"resident memory of a process with a buffer of {capacity} rows, by rows that entered:")
    marks = {round(times * capacity / rows): times for times in (1, 2, 4, 6, 8, 10)}
    for batch in range(1, batches + 1):
        log.advance(batch)
        log.settle(batch)
        if batch in marks:
            print(f"  {marks[batch]:3} x the capacity: {_resident() / 2**20:8.1f} MiB")


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> int:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("step", "disk", "memory", "all")
    parser.add_argument("--part", choices=parts, default="all", help="default all")
    parser.add_argument("--steps", type=int, default=200, help="of each run; default 200")
    parser.add_argument("--workdir", help="where to write; default: the temporary folder")
    options = parser.parse_args()
    held = True
    if options.part in ("memory", "all"):
        measure_memory()
    if options.part in ("disk", "all"):
        measure_disk(options.workdir)
    if options.part in ("step", "all"):
        held = measure_steps(options.steps, options.workdir)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
