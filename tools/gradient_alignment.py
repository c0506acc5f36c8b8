"""Cosines between gradients at a checkpoint: fresh against replayed rows, and task against task.

Examples:
    python tools/gradient_alignment.py runs/mine
    python tools/gradient_alignment.py runs/mine@1500 --weights anchor --rows 128
    python tools/gradient_alignment.py runs/mine@all --batches 8

A step for one task helps another where their gradients point the same way; Reptile is meant to
raise that. `corrected` takes out the noise of few rows, `halves` is what so many rows reach for
equal gradients (docs/metrics.md). One process, no DeepSpeed; checkpoints of any layout. The run is
not changed, but for a JSON file and a picture in its report/.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from megatron_mer.analysis.alignment import Alignment
from megatron_mer.analysis.matrix_picture import matrix_picture
from megatron_mer.checkpoint import CheckpointInfo, CheckpointReader
from megatron_mer.checkpoint.layout import step_directories
from megatron_mer.command import run_tool
from megatron_mer.config import RunConfig, load_config
from megatron_mer.continual.plan import Plan
from megatron_mer.continual.text_table import table
from megatron_mer.data.indexed_dataset import IndexedDataset
from megatron_mer.data.packing import RowReader, num_samples
from megatron_mer.errors import CheckpointError, ConfigError, DataError, Problem
from megatron_mer.log import setup_logging
from megatron_mer.training.gradients import (
    Measured,
    Source,
    batch_sources,
    load_model,
    measure,
    task_sources,
)
from megatron_mer.training.run_state import RunState

WIDTH = 100
KINDS = {"fast": "master", "anchor": "anchor"}


@dataclass(frozen=True)
class Run:
    """A run's directory, as far as gradients need it."""

    root: Path
    config: RunConfig
    checkpoints: list[Path]
    """Those to look at, oldest first."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    own = _parse(arguments)
    setup_logging(0)
    return run_tool(lambda: _measure(own))


def _measure(own: argparse.Namespace) -> None:
    run = open_run(own.run)
    _check_device(own.device)
    _check_out(Path(own.json).parent if own.json else run.root / "report")
    found = [look(run, path, own) for path in run.checkpoints]
    _write(run, found, own)


def _check_device(name: str) -> None:
    """Raises: ConfigError: there is no such device, or torch cannot use it."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:  # A build without CUDA asserts.
        reason = str(error).splitlines()[0]
        allowed = "cpu, or a device that torch sees"
        raise ConfigError([Problem("--device", f"given {name} ({reason})", allowed)]) from error


def _check_out(out: Path) -> None:
    """Raises: ConfigError: nothing can be written there, said before minutes of measuring."""
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        given = f"{out} cannot be written"
        raise ConfigError([Problem("--json", given, "a file in a folder of yours")])


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", metavar="RUN[@STEP]", help="a run's directory; @STEP, @all; default: the newest")
    add("--weights", choices=list(KINDS), default="fast", help="default fast")
    add("--rows", type=_at_least_two, default=64, metavar="N", help="rows a task, default 64")
    add("--batches", type=_positive, default=4, metavar="N", help="batches of the run, default 4")
    add("--seed", type=int, default=1, help="key of the rows of tasks, default 1")
    add("--data", choices=("train", "valid"), default="train", help="rows of tasks, default train")
    add("--micro-batch-size", type=_positive, metavar="N", help="default: the run's")
    add("--device", default="cpu", help="cpu (default), cuda, cuda:1 ...")
    add("--json", metavar="FILE", help="default: RUN/report/gradient_alignment_step_N.json")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"given {text}; allowed: 1 and above")
    return number


def _at_least_two(text: str) -> int:
    if (number := int(text)) < 2:
        raise argparse.ArgumentTypeError(f"given {text}; allowed: 2 and above, for two halves")
    return number


def open_run(text: str) -> Run:
    """Find a run and the checkpoints that are meant.

    Args:
        text: RUN, RUN@STEP or RUN@all.

    Raises:
        ConfigError: there is no run, or no such step.
    """
    place, _, step = text.partition("@") if not Path(text).is_dir() else (text, "", "")
    root = Path(place)
    if not (root / "config.yaml").is_file():
        given = f"given {place}, which holds no config.yaml of a run"
        raise ConfigError([Problem("RUN", given, "the output_dir of a run")])
    config = load_config(root / "config.yaml", [])
    every = sorted(step_directories(root / "checkpoints"))
    steps = {int(path.name.split("_")[1]): path for path in every if path.name.count("_") == 1}
    if not steps:
        raise ConfigError([Problem("RUN", f"given {place}, which has no checkpoint yet")])
    listed = ", ".join(map(str, sorted(steps)))
    if step == "all":
        chosen = [steps[one] for one in sorted(steps)]
    elif not step:
        chosen = [steps[max(steps)]]
    elif step.isdigit() and int(step) in steps:
        chosen = [steps[int(step)]]
    else:
        raise ConfigError([Problem("RUN@STEP", f"given step {step}", f"{listed}, or all")])
    return Run(root, config, chosen)


def look(run: Run, path: Path, own: argparse.Namespace) -> dict[str, Any]:
    """Measure one checkpoint.

    Raises:
        CheckpointError: it is not whole, or has no anchor.
        DataError: a dataset is not where the run read it.
    """
    reader = CheckpointReader(path)
    info = CheckpointInfo.read(path)
    if own.weights == "anchor" and run.config.reptile is None:
        raise CheckpointError(f"{run.root} was trained without Reptile: it has no anchor")
    device = torch.device(own.device)
    model = load_model(run.config, reader, KINDS[own.weights], device)
    micro = own.micro_batch_size or run.config.batch.micro_batch_size
    measured = []
    for sources in (_batches(run, info, own.batches), _tasks(run, own)):
        if len(sources) >= 1:
            masks = run.config.batch.eod_mask_loss
            measured.append(measure(model, sources, micro, masks))
        else:
            measured.append(None)
    content = {
        "run": str(run.root),
        "step": info.step,
        "weights": own.weights,
        "data": own.data,
        "rows": own.rows,
        "batches": own.batches,
        "seed": own.seed,
        "fresh_and_replay": _json(measured[0]),
        "tasks": _json(measured[1]),
    }
    _show(content, measured)
    return content


def _batches(run: Run, info: CheckpointInfo, count: int) -> list[Source]:
    """Fresh and replayed rows of the batches that follow the checkpoint, or else its last ones."""
    batches = RunState.from_json(info.run_state).batches
    plan = Plan.from_history(info.run_state["history"])
    first = min(batches, max(0, plan.total_batches - count))
    chosen = range(first, min(first + count, plan.total_batches))
    rows = [plan.rows(batch) for batch in chosen]
    used = sorted({int(number) for each in rows for number in each.dataset})
    saved = info.run_state["settings"].get("prefixes", {})
    names = [plan.datasets[number] for number in used]
    datasets = [IndexedDataset(saved.get(name, name)) for name in names]
    places = {number: place for place, number in enumerate(used)}
    reader = _reader(run, datasets)
    return batch_sources(
        reader,
        (
            (each.kind, np.array([places[int(n)] for n in each.dataset], np.int32), each.sample)
            for each in rows
        ),
    )


def _reader(run: Run, datasets: list[IndexedDataset]) -> RowReader:
    vocab_size = run.config.model.vocab_size
    if vocab_size is None:
        raise ConfigError([Problem("model.vocab_size", "the run's config.yaml has none")])
    return RowReader(datasets, run.config.model.seq_length, vocab_size)


def _tasks(run: Run, own: argparse.Namespace) -> list[Source]:
    """Rows of each task's training data, or of its held-out sets."""
    prefixes: dict[str, list[str]] = {}
    for entry in run.config.stream:
        train = [dataset.prefix for dataset in entry.train]
        wanted = train if own.data == "train" else list(entry.valid_sets.values())
        known = prefixes.setdefault(entry.task, [])
        known += [prefix for prefix in wanted if prefix not in known]
    every = list(dict.fromkeys(prefix for many in prefixes.values() for prefix in many))
    datasets = [IndexedDataset(prefix) for prefix in every]
    length = run.config.model.seq_length
    sizes = [num_samples(one.num_tokens, length, str(one.prefix)) for one in datasets]
    tasks = {task: [every.index(one) for one in many] for task, many in prefixes.items() if many}
    if not tasks:
        raise DataError("no task of the run has held-out data; leave --data valid out")
    return task_sources(tasks, _reader(run, datasets), sizes, own.rows, own.seed)


def _json(measured: Measured | None) -> dict[str, Any] | None:
    if measured is None:
        return None
    found = measured.alignment

    def numbers(values: np.ndarray) -> Any:
        return json.loads(json.dumps(values.tolist()).replace("NaN", "null"))

    return {
        "sources": list(found.names),
        "losses": measured.losses,
        "tokens": measured.tokens,
        "norms": numbers(found.norms),
        "halves": numbers(found.halves),
        "cosines": numbers(found.cosines),
        "corrected": numbers(found.corrected),
        "dots": numbers(found.dots),
    }


def _show(content: dict[str, Any], measured: list[Measured | None]) -> None:
    print(f"\nStep {content['step']}, {content['weights']} weights")
    batches, tasks = measured
    if batches is None or len(batches.alignment.names) < 2:
        print("The batches hold no replayed rows: nothing to compare fresh rows with.")
    else:
        print("\nFresh and replayed rows of the run's own batches")
        print(_tables(batches.alignment))
    if tasks is not None:
        print(f"\nTasks, {content['rows']} rows each ({content['data']})")
        print(_tables(tasks.alignment))


def _tables(found: Alignment) -> str:
    """A line a source: cosine to every other one, agreement of its halves, norm; then corrected."""
    measured = [["cosine", *found.names, "halves", "norm"]]
    corrected = [["corrected", *found.names]]
    for at, name in enumerate(found.names):
        tail = [_text(found.halves[at]), f"{found.norms[at]:.4g}"]
        measured.append([name, *map(_text, found.cosines[at]), *tail])
        corrected.append([name, *map(_text, found.corrected[at])])
    return f"{table(measured, WIDTH)}\n\n{table(corrected, WIDTH)}"


def _text(value: float) -> str:
    return "-" if not np.isfinite(value) else f"{value:+.3f}"


def _write(run: Run, found: list[dict[str, Any]], own: argparse.Namespace) -> None:
    for content in found:
        name = f"gradient_alignment_step_{content['step']}"
        out = Path(own.json) if own.json else run.root / "report" / f"{name}.json"
        if own.json and len(found) > 1:
            out = out.with_name(f"{out.stem}_step_{content['step']}{out.suffix}")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        tasks = content["tasks"]
        if tasks is not None:
            picture = out.with_suffix(".png")
            title = f"{run.config.name}, step {content['step']}: cosines between gradients of tasks"
            matrix_picture(tasks["sources"], tasks["cosines"], picture, title)
            print(f"\n{out}, {picture}")
    if len(found) > 1:
        print("\nOver the steps: mean cosine between tasks, cosine of fresh and replayed rows")
        cells = [["step", "tasks", "fresh, replay"]]
        for content in found:
            both, tasks = content["fresh_and_replay"], content["tasks"]
            pair = both["cosines"][0][1] if both and len(both["sources"]) == 2 else None
            mean = _mean(tasks["cosines"]) if tasks else None
            cells.append([str(content["step"]), _some(mean), _some(pair)])
        print(table(cells, WIDTH))


def _mean(cosines: list[list[float | None]]) -> float | None:
    values = [
        value for at, row in enumerate(cosines) for value in row[at + 1 :] if value is not None
    ]
    return sum(values) / len(values) if values else None


def _some(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"


if __name__ == "__main__":
    sys.exit(main())
