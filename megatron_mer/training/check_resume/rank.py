"""One rank of a run under test: the training program, that also writes down its batches.

    python -m megatron_mer.training.check_resume.rank --records FOLDER --config run.yaml

It does what ``pretrain_llama_mer.py`` does. Besides, each rank that reads data writes what it got
of every batch to FOLDER/rank_NUMBER.jsonl. With --hold-after STEP it waits there to be killed; with
--loaded FOLDER it writes what it has loaded as a checkpoint before it goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, cast

import numpy as np

from megatron_mer.checkpoint import save_checkpoint
from megatron_mer.checkpoint.layout import rank_name
from megatron_mer.data.batches import RankBatch, rank_rows
from megatron_mer.data.loader import TrainLoader
from megatron_mer.engine.distributed import first_failure
from megatron_mer.training import start
from megatron_mer.training.console import Progress
from megatron_mer.training.loop import Trainer
from megatron_mer.training.main import main

_LOOK_SECONDS = 1.0  # between two looks whether the program that started the ranks still lives


class RecordingLoader:
    """A loader that writes down each batch that it hands on.

    Args:
        loader: where the batches come from.
        trainer: who trains on them; its plan says which samples they should be.
        path: the file that gets a line a batch.
    """

    def __init__(self, loader: TrainLoader, trainer: Trainer, path: Path) -> None:
        self._loader = loader
        self._trainer = trainer
        self._file = path.open("w", encoding="utf-8", buffering=1)

    def __next__(self) -> RankBatch:
        """The next batch, written down."""
        batch = next(self._loader)
        self._file.write(json.dumps(self._line(batch)) + "\n")
        return batch

    def skip(self, batch: int) -> None:
        """As `TrainLoader.skip`."""
        self._loader.skip(batch)

    def close(self) -> None:
        """As `TrainLoader.close`."""
        self._loader.close()
        self._file.close()

    def _line(self, batch: RankBatch) -> dict[str, Any]:
        plan, engine = self._trainer.plan, self._trainer.engine
        size = plan.global_batch_size(batch.batch)
        micro = self._trainer.config.batch.micro_batch_size
        mine = rank_rows(size, engine.coordinate.data, engine.layout.dp_size, micro)
        rows = plan.rows(batch.batch, mine.start, mine.stop)
        read = [
            (bool(replayed), _digest(inputs, targets[-1:], mask))
            for one in batch.micro_batches
            for inputs, targets, mask, replayed in zip(
                one.inputs, one.targets, one.mask, one.is_replay, strict=True
            )
        ]
        return {
            "batch": batch.batch,
            "first": mine.start,
            "num_unmasked": batch.num_unmasked,
            "rows": [
                ["replay" if replayed else "fresh", plan.datasets[dataset], sample, digest]
                for (replayed, digest), dataset, sample in zip(
                    read, rows.dataset.tolist(), rows.sample.tolist(), strict=True
                )
            ],
        }


def _digest(*arrays: Any) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def recorded(
    records: Path, hold_after: int | None = None, loaded: Path | None = None
) -> type[Trainer]:
    """The trainer of a rank under test.

    Args:
        records: folder for what the ranks write down.
        hold_after: the step after which a rank waits to be killed; None: it does not.
        loaded: folder for a checkpoint of the state before the first step; None: none.
    """

    class RecordingTrainer(Trainer):
        def run(self) -> None:
            if loaded is not None:
                save_checkpoint(
                    loaded,
                    self.state.updates,
                    self.engine.fragments(self._reptile_tensors()),
                    run_state={},
                    rank=self.rank,
                    world_size=self.world_size,
                    first_failure=first_failure,
                )
            super().run()

        def _loader(self) -> TrainLoader:
            path = records / f"{rank_name(self.rank)}.jsonl"
            # The loop asks a loader for nothing else.
            return cast(TrainLoader, RecordingLoader(super()._loader(), self, path))

        def _step(self, batch: int, loader: TrainLoader | None, progress: Progress) -> None:
            if hold_after is not None and self.state.updates >= hold_after:
                self._hold()
            super()._step(batch, loader, progress)

        def _hold(self) -> None:
            # The checkpoint is written beside training; here nothing more would happen to it.
            self.wait_for_checkpoint()
            (records / f"{rank_name(self.rank)}.held").touch()
            while True:
                time.sleep(_LOOK_SECONDS)

    return RecordingTrainer


def _end_with(parent: int) -> None:
    """End this process when the one that started it is gone: nobody else would."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def run(arguments: list[str] | None = None) -> int:
    """Train; returns the exit code of the training program."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--hold-after", type=int)
    parser.add_argument("--loaded", type=Path)
    parser.add_argument("--parent", type=int)
    own, rest = parser.parse_known_args(arguments)
    if own.parent is not None:
        _end_with(own.parent)
    start.Trainer = recorded(own.records, own.hold_after, own.loaded)  # type: ignore[attr-defined]
    return main(rest)


if __name__ == "__main__":
    code = run()
    sys.stdout.flush()
    sys.stderr.flush()
    # As pretrain_llama_mer.py: without the interpreter's clean-up.
    os._exit(code)
