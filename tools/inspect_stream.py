"""Show what a run trains on, before it starts or while it runs: batches, shares, epochs, replay.

Examples:
    python tools/inspect_stream.py --config my.yaml --summary
    python tools/inspect_stream.py --config my.yaml --steps 0:2 --text
    python tools/inspect_stream.py --run runs/mine --steps 1000 --json
    python tools/inspect_stream.py --ledger runs/mine

--config takes the training script's options too (--replay.alpha 0.5). --run and --ledger look at a
run's directory, also while it runs. Nothing is written.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import statistics
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

# A machine that only looks at runs needs no installed package and no torch.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_mer.command import run_tool
from megatron_mer.config import RunConfig, load_config
from megatron_mer.continual.plan import Plan
from megatron_mer.continual.stream import plan_spec
from megatron_mer.continual.stream_report import Spans, batch_rows, ledger_report, summarise
from megatron_mer.continual.stream_tables import RowTable, ledger_text, summary_text
from megatron_mer.data.batches import rank_rows
from megatron_mer.data.indexed_dataset import IndexedDataset
from megatron_mer.data.packing import num_samples
from megatron_mer.data.tokenizers import load_tokenizer
from megatron_mer.errors import ConfigError, DataError, Problem
from megatron_mer.log import setup_logging
from megatron_mer.training.dry_run import DOCUMENT_END, sample_texts
from megatron_mer.training.outputs import RunDirectory
from megatron_mer.training.warm_start import with_old_stream

PLAIN_WIDTH = 100  # columns where there is no terminal and COLUMNS is not set
SPEED_WINDOW = 100  # batches that the time left is estimated from
NO_UPDATE = b'"step": null'  # in the line of a batch without an update
SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class Source:
    """What is looked at: a configuration, or a run."""

    plan: Plan
    load: Callable[[], RunConfig]
    """Gives the configuration, which not everything needs."""
    batches: int | None = None
    """How far the run has come; None for a configuration."""
    seconds: float | None = None
    """Median seconds of the run's last batches."""


def parse_arguments(arguments: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line; what is left are options of the configuration."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", metavar="FILE", help="a run's YAML")
    add("--run", metavar="RUN", help="the directory of a run (its output_dir)")
    add("--summary", action="store_true", help="shares, epochs and replay of the whole run")
    add("--steps", metavar="A:B", help="the rows of batches A to B - 1; also A, A: and :B")
    add(
        "--ledger",
        nargs="?",
        const="",
        metavar="RUN",
        help="what a run has trained on as new, replayed and skipped up to now",
    )
    add("--text", action="store_true", help="with --steps: the text of each row")
    add("--dp-size", type=int, metavar="N", help="with --steps: the rank of N that gets each row")
    add("--json", action="store_true", help="JSON: one object, or with --steps one a row")
    add("--all", action="store_true", help="all datasets of a task, not only the largest 20")
    add("--width", type=int, metavar="N", help="columns of a line (default: the terminal's)")
    options, overrides = parser.parse_known_args(arguments)
    check_options(parser, options, overrides)
    return options, overrides


def check_options(
    parser: argparse.ArgumentParser, options: argparse.Namespace, overrides: list[str]
) -> None:
    """End with the usage if the options do not go together."""
    if options.ledger:
        options.run = options.run or options.ledger
        if options.run != options.ledger:
            parser.error(f"--run {options.run} and --ledger {options.ledger} name two runs")
    views = [options.summary, options.steps is not None, options.ledger is not None]
    if sum(views) != 1:
        parser.error("choose one of --summary, --steps and --ledger")
    if bool(options.config) == bool(options.run):
        parser.error("give either --config FILE or --run RUN")
    if options.ledger is not None and options.config:
        parser.error("--ledger needs a run: --ledger RUN")
    if options.run and overrides:
        parser.error(f"{overrides[0]}: a run's plan is what it is; options need --config")
    if options.steps is None and (options.text or options.dp_size is not None):
        parser.error("--text and --dp-size need --steps")
    if options.width is not None and options.width < 1:
        parser.error("--width must be at least 1")


def open_config(path: str, overrides: list[str]) -> Source:
    """Plan what a configuration says, also if its data do not last."""
    config = load_config(path, overrides)
    if RunDirectory(config.output_dir).has_checkpoint():
        print(
            f"note: {config.output_dir} holds a run that has begun. This is the plan of a new one; "
            "`--run` shows the plan of that run, and `pretrain_llama_mer.py --dry-run --accept "
            "KIND` what a changed configuration makes of it",
            file=sys.stderr,
        )
    config = with_old_stream(config)
    prefixes = prefixes_of(config)
    seq_length = config.model.seq_length
    problems: list[Problem] = []
    sizes = {}
    for name, prefix in prefixes.items():
        try:
            sizes[name] = num_samples(IndexedDataset(prefix).num_tokens, seq_length, prefix)
        except DataError as error:
            problems.append(Problem(f"dataset {name}", str(error)))
    if problems:
        raise ConfigError(problems)
    rows = config.batch.global_batch_size
    spec = plan_spec(config.stream, config.replay, config.seed, rows, seq_length, sizes)
    return Source(Plan(spec, allow_exhausted=True), lambda: config)


def prefixes_of(config: RunConfig) -> dict[str, str]:
    """Where each training dataset lies, by its name."""
    return {one.name: one.prefix for task in config.stream for one in task.train}


def open_run(directory: str) -> Source:
    """The plan of a run and how far it has come, from its directory alone."""
    folder = Path(directory)
    path = folder / "plan.json"
    try:
        history = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        text = f"given {directory}, which has no plan.json"
        allowed = "the directory (output_dir) of a run that was started"
        raise ConfigError([Problem("--run", text, allowed)]) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    plan = Plan.from_history(history)
    metrics = folder / "metrics.jsonl"
    try:
        batches, seconds = follow_metrics(metrics, plan)
    except ValueError as error:
        raise DataError(f"{metrics} and {path} are not of one run: {error}") from error
    return Source(plan, lambda: load_config(folder / "config.yaml"), batches, seconds)


def follow_metrics(path: Path, plan: Plan) -> tuple[int, float | None]:
    """How many batches a run has done, and the median seconds of its last ones.

    Batches without an update since plan.json was written are marked in the plan. A torn last line
    does not count.
    """
    last: deque[bytes] = deque(maxlen=SPEED_WINDOW)
    known = max(plan.skipped, default=-1)
    try:
        with open(path, "rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                last.append(line)
                if NO_UPDATE in line and (batch := parse_line(path, line)["batch"]) > known:
                    plan.mark_skipped(batch)
    except FileNotFoundError:
        return 0, None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if not last:
        return 0, None
    tail = [parse_line(path, line) for line in last]
    if (batches := tail[-1]["batch"] + 1) > plan.total_batches:
        raise ValueError(f"{batches} batches were done, the plan has {plan.total_batches}")
    return batches, statistics.median(line["step_seconds"] for line in tail)


def parse_line(path: Path, line: bytes) -> dict[str, Any]:
    """One line of a run's metrics."""
    try:
        values = json.loads(line)
        return {"batch": int(values["batch"]), "step_seconds": float(values["step_seconds"])}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: a line is no JSON of a step: {line[:80]!r}") from error


def chosen_batches(text: str, total: int) -> range:
    """The batches that `A:B`, `A`, `A:` or `:B` mean."""
    first, colon, end = (part.strip().replace(",", "") for part in text.partition(":"))
    try:
        start = int(first) if first or not colon else 0
        stop = int(end) if end else total if colon else start + 1
    except ValueError:
        start, stop = 0, 0
    if not 0 <= start < stop <= total:
        allowed = f"A:B with 0 <= A < B <= {total:,}, or A, A:, :B"
        raise ConfigError(
            [Problem("--steps", f"given {text!r}; the run has batches 0 to {total - 1:,}", allowed)]
        )
    return range(start, stop)


class Texts:
    """The text of samples.

    Args:
        config: names the tokenizer and the datasets.
    """

    def __init__(self, config: RunConfig) -> None:
        self._seq_length = config.model.seq_length
        self._tokenizer = load_tokenizer(config.tokenizer)
        self._prefixes = prefixes_of(config)
        self._open = cache(self._opened)

    def of(self, row: dict[str, Any], most: int | None) -> list[str]:
        """A row's text, in the parts of documents that it is made of; of `most` tokens at most."""
        dataset = self._open(row["dataset"])
        return sample_texts(dataset, row["sample"], self._seq_length, self._tokenizer, most)

    def _opened(self, name: str) -> IndexedDataset:
        if name not in self._prefixes:
            raise ConfigError(
                [
                    Problem(
                        f"dataset {name}", "the run read it, but its configuration has it no more"
                    )
                ]
            )
        dataset = IndexedDataset(self._prefixes[name])
        if dataset.sidecar is not None:
            found = dataset.sidecar.problems(self._tokenizer.fingerprint, None)
            if found:
                raise DataError("\n".join(f"{dataset.prefix} {problem}" for problem in found))
        return dataset


def rows_of(
    source: Source, batches: range, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The rows of batches, with rank and text if they were asked for."""
    spans, plan = Spans(source.plan), source.plan
    texts = Texts(source.load()) if options.text else None
    most = None if options.json else 4 * options.width
    for batch in batches:
        size = plan.global_batch_size(batch)
        ranks = options.dp_size or 1
        each = len(rank_rows(size, 0, ranks, 1))
        for row in batch_rows(spans, batch):
            if options.dp_size is not None:
                row["dp_rank"] = row["place"] // each
            if texts is not None:
                row["text"] = texts.of(row, most)
            yield row


def show_steps(source: Source, options: argparse.Namespace) -> int:
    """Print the rows of batches as they come."""
    batches = chosen_batches(options.steps, source.plan.total_batches)
    if options.dp_size is not None and options.dp_size < 1:
        raise ConfigError([Problem("--dp-size", f"given {options.dp_size}", "at least 1")])
    table = None
    for row in rows_of(source, batches, options):
        if options.json:
            print(json.dumps(row, ensure_ascii=False))
            continue
        if table is None:  # what is wrong with the first row is said without a head above it
            ranks = options.dp_size is not None
            table = RowTable(Spans(source.plan), options.width, text=options.text, rank=ranks)
            print(table.head())
        if options.text:
            row["text"] = DOCUMENT_END.join(row["text"])
        print(table.line(row))
    return 0


def show_summary(source: Source, options: argparse.Namespace) -> int:
    """Print what the whole run trains on; 2 if the data do not last."""
    summary = summarise(source.plan)
    left = None
    if source.batches is not None:
        rest = source.plan.total_batches - source.batches
        left = None if source.seconds is None else rest * source.seconds
        summary["done"] = {
            "batches": source.batches,
            "seconds_a_batch": source.seconds,
            "seconds_left": left,
        }
    if options.json:
        print(json.dumps(summary, ensure_ascii=False, indent=2))
    else:
        print(summary_text(summary, options.width, options.all))
        if source.batches is not None:
            print(f"\n{source.batches:,} batches done{time_left(source, left)}")
    # A run that began may have been driven past its data by skipped batches, and goes on.
    problems = source.plan.exhausted if source.batches is None else []
    if problems:
        print(f"error: {ConfigError(problems[:SHOWN_PROBLEMS])}", file=sys.stderr)
        if len(problems) > SHOWN_PROBLEMS:
            print(f"… and {len(problems) - SHOWN_PROBLEMS:,} more", file=sys.stderr)
        return ConfigError.exit_code
    return 0


def time_left(source: Source, seconds: float | None) -> str:
    """How long the rest takes, in words."""
    if not seconds:
        return ""
    days, rest = divmod(round(seconds), 24 * 3600)
    hours, rest = divmod(rest, 3600)
    length = f"{days} d {hours} h" if days else f"{hours} h {rest // 60} min {rest % 60} s"
    return (
        f"; the rest takes about {length}, at {source.seconds:.3g} s a batch (median of the last "
        f"{SPEED_WINDOW}, without evaluations and checkpoints)"
    )


def show_ledger(source: Source, options: argparse.Namespace) -> int:
    """Print what a run trained on as new, replayed and skipped."""
    report = ledger_report(source.plan, source.batches or 0)
    if options.json:
        print(json.dumps(report, ensure_ascii=False, indent=2))
    else:
        print(ledger_text(report, options.width, options.all))
    return 0


def inspect(options: argparse.Namespace, overrides: list[str]) -> int:
    """Show what was asked for; returns the exit code."""
    show = show_steps if options.steps is not None else show_summary
    show = show_ledger if options.ledger is not None else show
    source = open_config(options.config, overrides) if options.config else open_run(options.run)
    return show(source, options)


def main(arguments: list[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    options, overrides = parse_arguments(arguments)
    options.width = options.width or shutil.get_terminal_size((PLAIN_WIDTH, 24)).columns
    # What a dataset lacks to be trained on is the training script's to say, for each of thousands.
    setup_logging(rank=0, level=logging.ERROR)
    return run_tool(lambda: inspect(options, overrides))


if __name__ == "__main__":
    sys.exit(main())
