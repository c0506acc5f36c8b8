"""The reports of `stream_report` as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_mer.continual.stream_report import MANY_EPOCHS, MOST_REPLAY_ROWS, Spans
from megatron_mer.continual.text_table import (
    display_width,
    one_line,
    pad,
    percent,
    shorten,
    shorten_middle,
    table,
    wide_table,
    wrap,
)

SHOWN_DATASETS = 20
"""Datasets of a task that tables show unless all are asked for."""

_TEXT_BESIDE = 30  # columns that a text needs to stand beside its row and not below it
_MOST_NAME = 24  # columns of a name in a list of rows

Data = Mapping[str, Any]


def summary_text(summary: Data, width: int, all_datasets: bool = False) -> str:
    """The text of `stream_report.summarise`.

    Args:
        summary: what it returned.
        width: columns of the terminal.
        all_datasets: show every dataset, not only those of each task that matter most.
    """
    head = (
        f"{summary['batches']:,} batches: {summary['rows']:,} rows of {summary['seq_length']:,} "
        f"tokens, {summary['tokens']:,} tokens in all"
    )
    parts = [
        wrap(head, width),
        _task_table(summary, width),
        _dataset_table(summary, width, all_datasets),
        *_many_epochs(summary, width),
        *_replayed(summary, width),
        *_exhausted(summary, width, all_datasets),
    ]
    return "\n\n".join(parts)


def ledger_text(report: Data, width: int, all_datasets: bool = False) -> str:
    """The text of `stream_report.ledger_report`.

    Args:
        report: what it returned.
        width: columns of the terminal.
        all_datasets: show every dataset, not only the largest of each task.
    """
    head = f"{report['batches']:,} of {report['total_batches']:,} batches done"
    if report["skipped_batches"]:
        head += f", {report['skipped_batches']:,} of them skipped (not finite)"
    legend = (
        "fresh: rows trained on as new. skipped: new rows of skipped batches, spent and never "
        "replayed. replayed: rows of this task or dataset that came again as replay. replay rows: "
        "what was replayed during the task; share: among the rows of its batches that had anything "
        "to replay. epochs: how often the dataset has been read."
    )
    parts = [
        wrap(head, width),
        *_segments(report, width),
        _ledger_tasks(report, width),
        _ledger_datasets(report, width, all_datasets),
        wrap(legend, width),
    ]
    return "\n\n".join(parts)


class RowTable:
    """A list of rows that is printed as it comes, so its columns are known ahead.

    Args:
        spans: the plan laid out.
        width: columns of the terminal.
        text: rows have a "text".
        rank: rows have a "dp_rank".
    """

    def __init__(self, spans: Spans, width: int, text: bool = False, rank: bool = False) -> None:
        plan = spans.plan
        rows = max(segment.spec.global_batch_size for segment in plan.segments)
        largest = max(plan.dataset_sizes.values())
        tasks = {entry.task for entry in plan.entries}
        sizes = {
            "batch": len(f"{plan.total_batches:,}"),
            "place": len(f"{rows:,}"),
            **({"dp_rank": 4} if rank else {}),
            "kind": 6,
            "task": min(_MOST_NAME, max(map(display_width, tasks))),
            "dataset": min(_MOST_NAME, max(map(display_width, plan.datasets))),
            "sample": len(f"{largest:,}"),
            "epoch": 5,
        }
        heads = {"dp_rank": "rank"}
        self._heads = {key: heads.get(key, key) for key in sizes}
        self._sizes = {key: max(size, len(self._heads[key])) for key, size in sizes.items()}
        self._width = width
        self._rest = width - sum(self._sizes.values()) - 2 * len(sizes) if text else 0
        self._below = text and self._rest < _TEXT_BESIDE

    def head(self) -> str:
        """The columns' names over a rule."""
        cells = dict(self._heads)
        line = self._cells(cells) + ("" if self._rest == 0 or self._below else "  text")
        return f"{shorten(line, self._width)}\n{'-' * self._width}"

    def line(self, row: Data) -> str:
        """One row, on two lines where the terminal is too narrow for its text."""
        cells = {
            key: f"{row[key]:,}" if isinstance(row[key], int) else one_line(row[key])
            for key in self._sizes
        }
        line = self._cells(cells)
        if "text" not in row:
            return shorten(line, self._width)
        text = one_line(row["text"])
        if self._below:
            return f"{shorten(line, self._width)}\n{shorten('    ' + text, self._width)}"
        return f"{line}  {shorten(text, self._rest)}"

    def _cells(self, cells: Data) -> str:
        return "  ".join(
            pad(shorten_middle(cells[key], size), size, left=key not in ("kind", "task", "dataset"))
            for key, size in self._sizes.items()
        )


# Summary ----------------------------------------------------------------------------------------


def _task_table(summary: Data, width: int) -> str:
    head = ["task", "first batch", "batches", "fresh rows", "fresh tokens", "replay rows", "replay"]
    cells = [head]
    for task in summary["tasks"]:
        if task["trained_before"]:
            cells.append([task["label"], "before", *["-"] * 5])
            continue
        first, batches = task["first_batch"], task["end_batch"] - task["first_batch"]
        counts = _counts(task, task["fresh_tokens"])
        cells.append([task["label"], f"{first:,}", f"{batches:,}", *counts])
    tokens = summary["fresh_rows"] * summary["seq_length"]
    cells.append(["total", "", f"{summary['batches']:,}", *_counts(summary, tokens)])
    return table(cells, width, droppable=("batches", "fresh rows"))


def _counts(counts: Data, fresh_tokens: int) -> list[str]:
    fresh, replayed = f"{counts['fresh_rows']:,}", f"{counts['replay_rows']:,}"
    return [fresh, f"{fresh_tokens:,}", replayed, percent(counts["replay_share"])]


def _dataset_table(summary: Data, width: int, all_datasets: bool) -> str:
    head = ["task", "dataset", "wanted", "share", "samples", "tokens", "epochs", "at end", ""]
    cells = [head]
    for task in summary["tasks"]:
        shown = _shown(task["datasets"], all_datasets, _urgency)
        for at, dataset in enumerate(shown):
            cells.append([task["label"] if at == 0 else "", *_dataset_cells(dataset)])
        cells += _hidden(len(task["datasets"]) - len(shown), len(head))
    legend = (
        "wanted, share: of the task's fresh rows, as configured and as they come. epochs: how "
        "often the dataset has been read when the task ends; at end: when the run ends."
    )
    lines = table(cells, width, names=2, droppable=("tokens", "wanted", "at end"))
    return f"{lines}\n{wrap(legend, width)}"


def _dataset_cells(dataset: Data) -> list[str]:
    after = dataset["epochs_after_task"]
    many = f"over {MANY_EPOCHS}" if dataset["epochs_after_run"] > MANY_EPOCHS else ""
    return [
        dataset["name"],
        percent(dataset["share_wanted"]),
        percent(dataset["share"]),
        f"{dataset['samples']:,}",
        f"{dataset['tokens']:,}",
        "-" if after is None else f"{after:,.2f}",
        f"{dataset['epochs_after_run']:,.2f}",
        "too few" if dataset["exhausted"] else many,
    ]


def _urgency(dataset: Data) -> tuple[bool, float, int]:
    """What to show first: what does not last, then what repeats most, then what gives most."""
    epochs = dataset["epochs_after_run"]
    return dataset["exhausted"], epochs if epochs > MANY_EPOCHS else 0, dataset["samples"]


def _shown(datasets: Sequence[Data], all_datasets: bool, urgency: Any) -> Sequence[Data]:
    if all_datasets or len(datasets) <= SHOWN_DATASETS:
        return datasets
    return sorted(datasets, key=urgency, reverse=True)[:SHOWN_DATASETS]


def _hidden(number: int, columns: int, at: int = 1) -> list[list[str]]:
    """A line that says how many datasets are not shown, in the column `at`; none if all are."""
    if number == 0:
        return []
    return [[f"… {number:,} more (--all)" if column == at else "" for column in range(columns)]]


def _many_epochs(summary: Data, width: int) -> Iterator[str]:
    datasets = [one for task in summary["tasks"] for one in task["datasets"]]
    many = {one["name"] for one in datasets if one["epochs_after_run"] > MANY_EPOCHS}
    if many:
        number = "1 dataset is" if len(many) == 1 else f"{len(many):,} datasets are"
        yield wrap(
            f"Warning: {number} read more than {MANY_EPOCHS} times. Up to about {MANY_EPOCHS} "
            "epochs repeated data trains nearly as well as new data, beyond that it is worth much "
            "less (Muennighoff et al. 2023, arXiv 2305.16264).",
            width,
        )


def _replayed(summary: Data, width: int) -> Iterator[str]:
    if summary["replayed"] is None:
        yield wrap(
            "Which tasks are replayed when is left out: such rows are counted one by one, and "
            f"{summary['replay_rows']:,} are more than {MOST_REPLAY_ROWS:,}.",
            width,
        )
    elif summary["replay_rows"]:
        spans = summary["replayed"]
        tasks = [
            task for task in spans[-1]["rows"] if any(span["rows"].get(task) for span in spans)
        ]
        columns = [[task, *(_count(span["rows"].get(task)) for span in spans)] for task in tasks]
        title = wrap("Rows of each task (columns) that are replayed during each task:", width)
        names = ["during", *(span["label"] for span in spans)]
        yield f"{title}\n{wide_table(names, columns, width)}"


def _count(number: int | None) -> str:
    return f"{number:,}" if number else "-"


def _exhausted(summary: Data, width: int, all_datasets: bool) -> Iterator[str]:
    for found in summary["exhausted"]:
        cells = [["dataset", "asked", "there are", "max_epochs", "needed"]]
        shown = _shown(found["datasets"], all_datasets, lambda one: one["max_epochs_needed"])
        cells += [
            [
                one["name"],
                f"{one['asked']:,}",
                f"{one['held']:,}",
                f"{one['max_epochs']:g}",
                f"{one['max_epochs_needed']:,.2f}",
            ]
            for one in shown
        ]
        cells += _hidden(len(found["datasets"]) - len(shown), 5, at=0)
        title = f"Not enough data for task {found['label']} (samples up to its end):"
        yield f"{wrap(title, width)}\n{table(cells, width)}\n{wrap(_remedy(found), width)}"


def _remedy(found: Data) -> str:
    fits = f"at most steps: {found['steps_that_fit']:,} of {found['steps']:,} fit"
    if found["fresh_tokens"] is not None:
        fits = (
            f"at most fresh_tokens: {found['fresh_tokens_that_fit']:,} of "
            f"{found['fresh_tokens']:,} fit"
        )
    if not found["steps_that_fit"]:
        fits = "nothing is left for it"
    return f"Here {fits}, or max_epochs: {found['max_epochs_needed']:g} is needed."


# Ledger -----------------------------------------------------------------------------------------


def _segments(report: Data, width: int) -> Iterator[str]:
    if len(report["segments"]) == 1:
        return
    lines = ["The run was changed on its way:"]
    for segment in report["segments"]:
        what = "; ".join(segment["changes"]) or "as it began"
        lines.append(wrap(f"  from batch {segment['first_batch']:,}: {what}", width, "    "))
    yield "\n".join(lines)


def _ledger_tasks(report: Data, width: int) -> str:
    cells = [["task", "batches", "fresh", "skipped", "replayed", "replay rows", "share"]]
    for label, task in zip(report["labels"], report["tasks"], strict=True):
        share = task["replay_share"]
        numbers = [task[key] for key in ("batches", "fresh", "skipped", "replayed", "replay_rows")]
        cells.append(
            [
                label,
                *(f"{number:,}" for number in numbers),
                "-" if share is None else percent(share),
            ]
        )
    return table(cells, width)


def _ledger_datasets(report: Data, width: int, all_datasets: bool) -> str:
    head = ["task", "dataset", "fresh", "skipped", "replayed", "epochs"]
    cells = [head]
    for label, task in zip(report["labels"], report["tasks"], strict=True):
        datasets = [{"name": name, **counts} for name, counts in task["datasets"].items()]
        shown = _shown(datasets, all_datasets, lambda one: one["fresh"] + one["replayed"])
        for at, one in enumerate(shown):
            cells.append(
                [
                    label if at == 0 else "",
                    one["name"],
                    *(f"{one[key]:,}" for key in ("fresh", "skipped", "replayed")),
                    f"{report['datasets'][one['name']]['epochs']:,.2f}",
                ]
            )
        cells += _hidden(len(datasets) - len(shown), len(head))
    return table(cells, width, names=2)
