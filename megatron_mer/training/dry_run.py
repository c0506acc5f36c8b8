"""What a start would do, said without doing it: nothing is trained, written or made."""

from __future__ import annotations

import os
import platform
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_mer.config import RunConfig
from megatron_mer.continual.stream_report import Spans, batch_rows, summarise
from megatron_mer.continual.stream_tables import RowTable, summary_text
from megatron_mer.continual.text_table import table, wrap
from megatron_mer.data.batches import rank_rows
from megatron_mer.data.indexed_dataset import IndexedDataset
from megatron_mer.data.tokenizers import Tokenizer
from megatron_mer.errors import CheckpointError, ConfigError
from megatron_mer.optim.schedule import horizon
from megatron_mer.training.advice import bubble_advice
from megatron_mer.training.learning_rate import lr_of
from megatron_mer.training.outputs import RunDirectory
from megatron_mer.training.preflight import Prepared
from megatron_mer.training.resume import changes, incomparable, resumed, settings
from megatron_mer.training.run_state import RunState

if TYPE_CHECKING:
    from megatron_mer.checkpoint import CheckpointInfo

SHOWN_ROWS = 16
"""Rows of the first batch that are shown."""
SHOWN_RANKS = 16
"""Lines of the table of ranks."""
DOCUMENT_END = " ¶ "
"""Stands where a document of a sample ends."""


@dataclass(frozen=True)
class _Start:
    """What a start would begin with."""

    prepared: Prepared
    state: RunState
    checkpoint: CheckpointInfo | None = None
    changes: tuple[str, ...] = ()
    """What it would take up of the configuration."""
    refusal: ConfigError | None = None


def describe_start(
    prepared: Prepared,
    world_size: int,
    fresh: bool,
    accept: Collection[str],
    width: int,
    fewest: bool = False,
) -> Iterator[str]:
    """Say what a start with this configuration would do.

    Args:
        prepared: the checked run.
        world_size: number of ranks.
        fresh: as for a start.
        accept: as for a start.
        width: columns of the terminal.
        fewest: nobody said how many ranks there are, so that they are as few as the layout allows.

    Yields:
        Paragraphs: the plan, the layout, the learning rate, the output directory, the first batch.

    Raises:
        MegatronMerError: what the start would raise; a refused resume after all that can be said.
    """
    outputs = RunDirectory(prepared.config.output_dir)
    _check_writable(outputs)
    start = _start(prepared, outputs, fresh, accept)
    yield wrap(f"{prepared.config.name}: a dry run; nothing is trained or written", width)
    yield summary_text(summarise(start.prepared.plan), width)
    yield _layout(prepared, world_size, width, fewest)
    if advice := bubble_advice(prepared.config, world_size):
        yield wrap(advice, width)
    trains = start.state.batches < start.prepared.plan.total_batches
    if trains:
        yield _learning_rate(start, width)
    yield _output_dir(start, outputs, fresh, width)
    if start.refusal is not None:
        raise start.refusal
    if trains:
        yield _first_batch(start, world_size, width)


def sample_texts(
    dataset: IndexedDataset,
    sample: int,
    seq_length: int,
    tokenizer: Tokenizer,
    most: int | None = None,
) -> list[str]:
    """The text of a sample, in the parts of documents that it is made of.

    Args:
        dataset: its corpus.
        sample: its number.
        seq_length: S.
        tokenizer: the one that wrote the corpus.
        most: decode at most so many of its first tokens; None: all S + 1.

    Raises:
        DataError: the corpus has no such sample, or ids that are not the tokenizer's.
    """
    start, count = sample * seq_length, seq_length + 1
    tokens = dataset.tokens(start, start + (count if most is None else min(most, count)))
    return document_texts(tokens, tokenizer)


def document_texts(tokens: NDArray[np.integer[Any]], tokenizer: Tokenizer) -> list[str]:
    """The text of tokens, in the parts of documents that they are made of.

    Raises:
        DataError: some are not the tokenizer's.
    """
    texts, first = [], 0
    for end in [*np.flatnonzero(tokens == tokenizer.eod_id).tolist(), len(tokens)]:
        texts.append(tokenizer.decode(tokens[first:end]))
        first = end + 1
    return texts


def _start(
    prepared: Prepared, outputs: RunDirectory, fresh: bool, accept: Collection[str]
) -> _Start:
    checkpoint = None if fresh else _checkpoint(outputs)
    if checkpoint is None:
        if prepared.plan.exhausted:
            raise ConfigError(prepared.plan.exhausted)
        steps = horizon(prepared.config.schedule, prepared.plan.total_batches)
        return _Start(prepared, RunState(horizon=steps))
    saved = checkpoint.run_state
    try:
        continued, state = resumed(prepared, saved, accept)
    except ConfigError as error:
        return _Start(prepared, RunState.from_json(saved), checkpoint, refusal=error)
    said = (*changes(continued, saved, accept), *incomparable(continued, saved))
    return _Start(continued, state, checkpoint, said)


def _checkpoint(outputs: RunDirectory) -> CheckpointInfo | None:
    """The checkpoint that a start would resume from."""
    if not outputs.has_checkpoint():
        return None
    # It imports torch, which takes seconds: only where there is something to look at.
    from megatron_mer.checkpoint import find_latest

    try:
        return find_latest(outputs.checkpoints)
    except OSError as error:
        raise CheckpointError(f"{outputs.checkpoints} cannot be read: {error}") from error


def _check_writable(outputs: RunDirectory) -> None:
    """Refuse what could not be made, without making it."""
    place = outputs.root.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise ConfigError(
            f"output_dir: given {outputs.root}, but {place} is no directory that can be written; "
            "choose another with --output_dir PATH"
        )


def _layout(prepared: Prepared, world_size: int, width: int, fewest: bool) -> str:
    parallel, batch = prepared.config.parallel, prepared.config.batch
    tp_size, pp_size = parallel.tp_size, parallel.pp_size
    dp_size = world_size // (tp_size * pp_size)
    rows, micro = batch.global_batch_size, batch.micro_batch_size
    each = rows // dp_size
    few = " (the fewest that this layout runs on; --ranks N shows others)" if fewest else ""
    head = (
        f"{_some(world_size, 'rank')}{few}: tp_size {tp_size} x pp_size {pp_size} x dp_size "
        f"{dp_size}. A batch has {_some(rows, 'row')}: {each:,} for each data-parallel rank, in "
        f"{_some(each // micro, 'micro batch', 'es')} of {micro:,}."
    )
    cells = [["ranks", "pipeline stage", "rows of a batch"]]
    # Ranks count along the axes (pipe, data, model), the last one fastest.
    for number in range(min(pp_size * dp_size, SHOWN_RANKS)):
        stage, data = divmod(number, dp_size)
        own = rank_rows(rows, data, dp_size, micro)
        ranks = _range(number * tp_size, (number + 1) * tp_size)
        cells.append([ranks, f"{stage} of {pp_size}", _range(own.start, own.stop)])
    hidden = world_size - SHOWN_RANKS * tp_size
    more = f"\n… {hidden:,} more ranks in the same order" if hidden > 0 else ""
    return f"{wrap(head, width)}\n{table(cells, width)}{more}"


def _some(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{plural if number != 1 else ''}"


def _range(first: int, end: int) -> str:
    return f"{first:,}" if end == first + 1 else f"{first:,} to {end - 1:,}"


def _learning_rate(start: _Start, width: int) -> str:
    config, state = start.prepared.config, start.state
    cells = [["learning rate", "batch", "rate"]]
    for batch, what in sorted(_moments(start).items()):
        step = state.updates + batch - state.batches
        rate = lr_of(config, start.prepared.plan, batch, step, state.horizon)
        cells.append([what, f"{batch:,}", f"{rate:.4g}"])
    return table(cells, width)


def _moments(start: _Start) -> dict[int, str]:
    """The batches at which the learning rate is told, if none is skipped; they have names."""
    schedule, plan, state = start.prepared.config.schedule, start.prepared.plan, start.state
    skipped = state.batches - state.updates
    moments = {plan.total_batches - 1: "the last batch"}
    for entry in plan.entries:
        if not entry.trained_before:
            moments[entry.first_batch] = f"task {entry.task} begins"
    begin = horizon(schedule, state.horizon)
    for number, part in enumerate(schedule.then):
        moments[begin + skipped] = f"schedule.then.{number} begins"
        begin += part.steps or 0
    moments[schedule.warmup_steps + skipped] = "the warm-up is over"
    moments[state.batches] = "the first batch to train"
    return {
        batch: moments[batch] for batch in moments if state.batches <= batch < plan.total_batches
    }


def _output_dir(start: _Start, outputs: RunDirectory, fresh: bool, width: int) -> str:
    lines = [f"{outputs.root}: {_resume(start, outputs, fresh)}"]
    lines += [f"  {change}" for change in start.changes]
    if not fresh and (copies := _copies(start.prepared.config, outputs)):
        lines.append(f"checkpoint.copy_to: {copies}")
    status = outputs.read_status()
    host, process = status.get("host"), status.get("pid")
    if status.get("status") == "running" and host and _may_live(host, process):
        lines.append(
            f"a run seems to be alive there (host {host}, process {process}): as long as it is, a "
            "start is refused"
        )
    return "\n".join(wrap(line, width, "    ") for line in lines)


def _copies(config: RunConfig, outputs: RunDirectory) -> str | None:
    if config.checkpoint.copy_to is None:
        return None
    # It imports torch, as `_checkpoint` does.
    from megatron_mer.training.copies import describe_copies

    return describe_copies(config, outputs)


def _may_live(host: str, process: int | None) -> bool:
    """Whether a process may be alive; of other hosts nothing is known."""
    return host != platform.node() or Path(f"/proc/{process}").exists()


def _resume(start: _Start, outputs: RunDirectory, fresh: bool) -> str:
    earlier = outputs.root.is_dir() and any(outputs.root.iterdir())
    if fresh and earlier:
        if not any((outputs.root / name).exists() for name in ("status.json", ".lock")):
            raise ConfigError(
                f"output_dir: given {outputs.root}, which holds files but no run that --fresh "
                "could set aside (no status.json); choose another directory"
            )
        return f"a new run; the earlier one would be renamed to {outputs.root.name}.before_TIME"
    if start.checkpoint is None:
        init = settings(start.prepared)["init"]
        weights = f", with the weights {init}" if init else ""
        begins = "a run without a checkpoint, which begins at batch 0" if earlier else "a new run"
        if earlier and start.prepared.config.checkpoint.copy_to is not None:
            begins = "a run without a checkpoint; without a copy it would begin at batch 0"
        return begins + weights
    where = f"batch {start.state.batches:,} from {start.checkpoint.path}"
    if start.refusal is not None:
        return f"it would resume after {where}, but not with this configuration: see below"
    if start.state.batches >= start.prepared.plan.total_batches:
        return f"the run is done (after {where}); nothing would be trained"
    return f"it would resume after {where}"


def _first_batch(start: _Start, world_size: int, width: int) -> str:
    prepared, batch = start.prepared, start.state.batches
    config, spans = prepared.config, Spans(prepared.plan)
    parallel, size = config.parallel, prepared.plan.global_batch_size(batch)
    each = size // (world_size // (parallel.tp_size * parallel.pp_size))
    lines = RowTable(spans, width, text=True, rank=True)
    shown = [lines.head()]
    for row in batch_rows(spans, batch, 0, min(size, SHOWN_ROWS)):
        texts = ["(its dataset is gone; the replay buffer has it)"]
        if (dataset := prepared.datasets.get(row["dataset"])) is not None:
            length, tokenizer = config.model.seq_length, prepared.tokenizer
            texts = sample_texts(dataset, row["sample"], length, tokenizer, most=4 * width)
        more = {"dp_rank": row["place"] // each, "text": DOCUMENT_END.join(texts)}
        shown.append(lines.line({**row, **more}))
    if size > SHOWN_ROWS:
        shown.append(f"… {size - SHOWN_ROWS:,} more rows")
    title = f"Batch {batch:,}, the first to train (¶ ends a document):"
    return "\n".join([wrap(title, width), *shown])
