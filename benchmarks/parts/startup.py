"""Start-up: from a configuration of a thousand large datasets to the rows of the first batch.

Each measurement runs in a process of its own: `startup.py WORK ARGUMENT...` prints its figures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import yaml

from benchmarks.parts.corpora import (
    document_lengths,
    small_tokenizer,
    sparse_dataset,
    write_index,
)
from benchmarks.parts.measure import ROOT, Row, Sample, Work, interleaved
from benchmarks.parts.peer import Peer

DATASETS = 1000
TASKS = 4
DOCUMENTS = 10_000_000
TOKENS = 500
"""Tokens of a document."""
SEQ = 2048
SECONDS_LIMIT, MEMORY_LIMIT = 2.0, 200.0
PEER_DOCUMENTS = (200_000, 1_000_000, DOCUMENTS)


def make_datasets(folder: Path) -> Path:
    """Make the sparse datasets and a run's configuration over them.

    Returns:
        The configuration.
    """
    name, provenance = small_tokenizer(folder)
    for index in range(DATASETS):
        sparse_dataset(folder / f"set{index:04}", DOCUMENTS, TOKENS, provenance)
    shares = np.random.default_rng(0).uniform(0.1, 1.0, DATASETS)
    stream = [
        {
            "task": f"task{task}",
            "steps": 10_000,
            "train": [
                {"prefix": str(folder / f"set{index:04}"), "weight": round(float(shares[index]), 4)}
                for index in range(task, DATASETS, TASKS)
            ],
        }
        for task in range(TASKS)
    ]
    config = {
        "name": "startup",
        "seed": 1,
        "precision": "bf16",
        "model": {"size": "llama-1m", "seq_length": SEQ},
        "tokenizer": name,
        "batch": {"global_batch_size": 4096, "micro_batch_size": 8},
        "optimizer": {"lr": 1.0e-3},
        "schedule": {"kind": "cosine", "warmup_steps": 10, "min_lr": 1.0e-4},
        "stream": stream,
        "replay": {"alpha": 0.25},
        "output_dir": str(folder / "run"),
    }
    path = folder / "startup.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def make_peer_index(folder: Path, documents: int) -> Path:
    """Write a true `.idx` beside a `.bin` that is a hole.

    Returns:
        The dataset's prefix.
    """
    prefix = folder / f"peer{documents}"
    lengths = document_lengths(np.random.default_rng(0), documents, TOKENS)
    write_index(prefix, lengths)
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * int(lengths.sum()))
    return prefix


def measure(folder: Path, peer: Peer | None, repetitions: int) -> list[Row]:
    """Start-up seconds and memory; for the peer the index build of one dataset."""
    config = make_datasets(folder)
    memory: dict[str, list[float]] = {}

    def work(name: str, what: str, *arguments: object) -> Work:
        def seconds(repetition: int) -> float:
            if name == "cold":
                _forget(folder)
            found = _in_process(what, *arguments)
            if repetition > 0:  # the first round only warms up, see `interleaved`
                memory.setdefault(name, []).append(found["megabytes"])
            return found["seconds"]

        return seconds

    works = {
        "plan": work("plan", "plan", config),
        "run": work("run", "run", config),
        "cold": work("cold", "run", config),
    }
    for documents in PEER_DOCUMENTS if peer is not None else ():
        prefix = make_peer_index(folder, documents)
        works[str(documents)] = work(str(documents), "peer", prefix, folder / "cache")
    found = interleaved(works, repetitions)
    growth = {name: Sample(tuple(values)) for name, values in memory.items()}
    return [*_our_rows(found, growth), *_peer_rows(found, growth)]


def _our_rows(found: dict[str, Sample], memory: dict[str, Sample]) -> list[Row]:
    size = f"{DATASETS:,} datasets of {DOCUMENTS // 10**6}M documents"
    rows = []
    for name, what in (
        ("plan", f"open {size}, plan, first batch's rows"),
        ("run", f"{size}: read the YAML, check, open, plan, first batch's rows"),
        ("cold", "the same with the files out of the page cache"),
    ):
        rows.append(Row(what, "s", found[name], SECONDS_LIMIT))
        rows.append(Row("... growth of the process at its peak", "MB", memory[name], MEMORY_LIMIT))
    return rows


def _peer_rows(found: dict[str, Sample], memory: dict[str, Sample]) -> list[Row]:
    rows = []
    for documents in PEER_DOCUMENTS:
        theirs = found.get(str(documents))
        if theirs is None:
            continue
        what = f"megatron-core: one GPTDataset of {documents:,} documents, not cached"
        note = ""
        if documents == DOCUMENTS:
            minutes = theirs.median * DATASETS / 60
            note = f"projected, not measured: {DATASETS:,} of them {minutes:.0f} minutes"
        rows.append(Row(what, "s", peer=theirs, note=note))
        what = "... growth of the process at its peak"
        rows.append(Row(what, "MB", peer=memory[str(documents)]))
    return rows


def _forget(folder: Path) -> None:
    """Drop the datasets' pages from the page cache."""
    for path in folder.glob("set*"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _in_process(name: str, *arguments: object) -> dict[str, float]:
    result = subprocess.run(
        [sys.executable, __file__, name, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    figures: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return figures


def _status(key: str) -> float:
    """A line of /proc/self/status, in MB; `ru_maxrss` would begin at the parent's peak."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise ValueError(f"/proc/self/status has no {key}")


def _figures(work: Callable[[], Any]) -> dict[str, float]:
    before = _status("VmRSS")
    start = time.perf_counter()
    kept = work()
    seconds = time.perf_counter() - start
    figures = {"seconds": seconds, "megabytes": _status("VmHWM") - before}
    del kept
    return figures


def _run(config_path: str) -> dict[str, float]:
    """A run's whole preparation, as the training program does it."""
    from megatron_mer.config import load_config
    from megatron_mer.training.preflight import prepare

    def work() -> Any:
        prepared = prepare(load_config(config_path), world_size=1)
        return prepared, prepared.plan.rows(0)

    return _figures(work)


def _plan(config_path: str) -> dict[str, float]:
    """Datasets and plan alone, for a configuration that was read before."""
    from megatron_mer.config import load_config
    from megatron_mer.continual.plan import Plan
    from megatron_mer.continual.stream import plan_spec
    from megatron_mer.data.indexed_dataset import IndexedDataset
    from megatron_mer.data.packing import num_samples

    config = load_config(config_path)

    def work() -> Any:
        opened = {
            one.name: IndexedDataset(one.prefix) for task in config.stream for one in task.train
        }
        sizes = {name: num_samples(one.num_tokens, SEQ, name) for name, one in opened.items()}
        rows = config.batch.global_batch_size
        plan = Plan(plan_spec(config.stream, config.replay, config.seed, rows, SEQ, sizes))
        return opened, plan, plan.rows(0)

    return _figures(work)


def _peer(prefix: str, cache: str) -> dict[str, float]:
    """A GPTDataset with an empty cache: it builds its indices and saves them."""
    import shutil

    peer = Peer()
    shutil.rmtree(cache, ignore_errors=True)
    return _figures(lambda: peer.gpt(Path(prefix), SEQ, cache=Path(cache)))


if __name__ == "__main__":
    parts: dict[str, Callable[..., dict[str, float]]] = {"run": _run, "plan": _plan, "peer": _peer}
    print(json.dumps(parts[sys.argv[1]](*sys.argv[2:])))
