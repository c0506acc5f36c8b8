"""Checkpoints at ends of entries, written for Hugging Face as well: `checkpoint.export_hf`.

One thread of rank 0 does it from the files of the checkpoint, a tensor at a time, while training
goes on. What a kill left undone the next start does. A failure costs the export, not the run.
"""

from __future__ import annotations

import queue
import re
import threading
from pathlib import Path

from megatron_mer.checkpoint.find import CheckpointInfo, broken, is_permanent
from megatron_mer.checkpoint.huggingface import Exported, TokenizerFiles, kept_tokenizer
from megatron_mer.checkpoint.layout import parse_step, step_directories, step_name
from megatron_mer.checkpoint.save import WriteStopped
from megatron_mer.config import RunConfig
from megatron_mer.continual.plan import Plan
from megatron_mer.data.tokenizers import load_tokenizer
from megatron_mer.log import get_logger
from megatron_mer.training.copies import copier
from megatron_mer.training.outputs import RunDirectory

FOLDER = "hf"

logger = get_logger(__name__)


def export_name(info: CheckpointInfo) -> str:
    """Name of the export of a checkpoint: its step and the task that ended there."""
    plan = Plan.from_history(info.run_state["history"])
    task = plan.entry_of(max(0, int(info.run_state["batches"]) - 1)).task
    return f"{info.path.name}_{re.sub(r'[^A-Za-z0-9._-]', '_', task)}"


class Exporter:
    """Exports the permanent checkpoints of a run, one after the other.

    Args:
        config: the run's.
        outputs: its directory; the exports go into `hf` there.
    """

    def __init__(self, config: RunConfig, outputs: RunDirectory) -> None:
        self._config = config
        self._outputs = outputs
        self._waiting: queue.Queue[int | None] = queue.Queue()
        self._stop = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin with what an earlier start left undone."""
        for path in reversed(step_directories(self._outputs.checkpoints)):
            step = parse_step(path.name)
            if step is not None and not self._is_there(path.name):
                self._waiting.put(step)
        self._thread = threading.Thread(target=self._work, name="exports", daemon=True)
        self._thread.start()

    def offer(self, step: int) -> None:
        """Export the checkpoint of a step, if one of an entry's end has it."""
        self._waiting.put(step)

    def finish(self) -> None:
        """Return when everything that was offered is exported."""
        self._waiting.put(None)
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        """Give up what is waiting, and return when nothing is written any more."""
        self._stop = True
        self.finish()

    def _is_there(self, name: str) -> bool:
        return any(self._folder().glob(f"{name}_*"))

    def _folder(self) -> Path:
        return self._outputs.root / FOLDER

    def _work(self) -> None:
        while (step := self._waiting.get()) is not None:
            path = self._outputs.checkpoints / step_name(step)
            try:
                if not self._stop and broken(path) is None and is_permanent(path):
                    self._export(path)
            except WriteStopped:
                return
            except Exception as error:  # noqa: BLE001 - no export may keep a run from training
                text = "%s was not written for Hugging Face (%s: %s); the run goes on, and "
                text += "tools/convert_checkpoint.py to-hf makes up for it"
                logger.error(text, path.name, type(error).__name__, error)

    def _export(self, path: Path) -> None:
        exported = Exported.of(path, "fast", None)
        target = self._folder() / export_name(exported.info)
        files, eod_id = kept_tokenizer(path), None
        if files is None:
            files = TokenizerFiles.of(self._config.tokenizer)
            eod_id = load_tokenizer(self._config.tokenizer).eod_id
        exported.write(target, files, eod_id, stop=self._stopped)
        logger.info("%s is written for Hugging Face", target)

    def _stopped(self) -> bool:
        return self._stop


class AfterCheckpoint:
    """What rank 0 does with each checkpoint once it is whole: copy it, export it.

    Args:
        config: the run's.
        outputs: its directory.
    """

    def __init__(self, config: RunConfig, outputs: RunDirectory) -> None:
        self._copies = copier(config, outputs)
        self._exports = Exporter(config, outputs) if config.checkpoint.export_hf else None

    def start(self) -> None:
        """Begin with what an earlier start left undone."""
        self._copies.start()
        if self._exports:
            self._exports.start()

    def offer(self, step: int) -> None:
        """A checkpoint is whole in the directory."""
        self._copies.offer(step)
        if self._exports:
            self._exports.offer(step)

    def in_hand(self) -> str | None:
        """The checkpoint that is being copied; what is exported stays in any case."""
        return self._copies.in_hand()

    def finish(self, seconds: float | None) -> None:
        """Return when all is exported, and copied or so many seconds have passed."""
        if self._exports:
            self._exports.finish()
        self._copies.finish(seconds)

    def close(self) -> None:
        """Give up what is not done."""
        if self._exports:
            self._exports.close()
        self._copies.close()
