"""How long a checkpoint holds training up, beside one memcpy of the same state and its write.

    python benchmarks/checkpoint.py [--size llama-99m] [--repetitions 9] [--workdir DIR]

One rank's state as training has it: fp32 masters, Adam's two moments, Reptile's anchor, and the
last delta in bf16, 18 bytes a parameter, in the pieces that the model's parameters make of it. The
memcpy, `CheckpointWriter.save` and the whole write (with checksums, flushed to the disk with fsync,
under its final name) take turns in one process; nothing trains meanwhile. The state, its copy and
the memcpy's target take 54 bytes a parameter of memory.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.parts.measure import timed
from megatron_mer.checkpoint import CheckpointWriter, Fragment
from megatron_mer.config.schema import ModelConfig
from megatron_mer.config.sizes import SIZES
from megatron_mer.model import build_layers

MOST_STALL, MOST_SHARE = 1.3, 0.05
"""Limits: the stall in memcpys of the state, and in whole writes."""
VOCABULARY = 50_000
KINDS = {
    "master": torch.float32,
    "exp_avg": torch.float32,
    "exp_avg_sq": torch.float32,
    "anchor": torch.float32,
    "last_delta": torch.bfloat16,
}


def state(size: str) -> Iterator[Fragment]:
    """One rank's fragments: each kind one flat tensor, as the optimizer has them, cut in pieces."""
    given = dict(SIZES[size])
    given.setdefault("num_kv_heads", given["num_heads"])
    config = ModelConfig(**given, vocab_size=VOCABULARY, seq_length=2048)
    shapes = {}
    with torch.device("meta"):
        for layer, factory in build_layers(config):
            for name, parameter in factory().named_parameters():
                shapes[f"{layer}.{name}"] = parameter.shape
    total = sum(shape.numel() for shape in shapes.values())
    for kind, dtype in KINDS.items():
        flat, start = torch.randn(total).to(dtype), 0
        for name, shape in shapes.items():
            view = flat[start : start + shape.numel()]
            yield Fragment(name, kind, tuple(shape), None, 0, 1, 0, view)
            start += shape.numel()


def measure(size: str, repetitions: int, workdir: str | None) -> int:
    """Measure one model; exit code 1 if a limit is missed."""
    fragments = list(state(size))
    nbytes = sum(fragment.tensor.nbytes for fragment in fragments)
    source, target = torch.ones(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
    copies, stalls, writes = [], [], []
    with tempfile.TemporaryDirectory(dir=workdir) as folder:
        writer = CheckpointWriter(
            folder,
            rank=0,
            world_size=1,
            first_failure=lambda reason: reason,
            keep_last=1,
            snapshot_bytes=nbytes,
        )
        for step in range(repetitions + 1):
            copies.append(timed(lambda: target.copy_(source)))
            stalls.append(timed(lambda: writer.save(step, fragments, {})))  # noqa: B023
            writes.append(stalls[-1] + timed(writer.wait))
    # The first round does not count: it finds cold caches.
    copy, stall, write = (statistics.median(times[1:]) for times in (copies, stalls, writes))
    print(
        f"{size}: {nbytes / 18 / 1e6:.0f}M parameters, {nbytes / 1e9:.2f} GB in {len(fragments)} "
        f"pieces, {torch.get_num_threads()} threads\n"
        f"  memcpy of the state  {copy:7.3f} s  {nbytes / copy / 1e9:6.2f} GB/s\n"
        f"  stall of training    {stall:7.3f} s  {stall / copy:6.2f} memcpys, limit {MOST_STALL}\n"
        f"  write with fsync     {write:7.3f} s  {nbytes / write / 1e9:6.2f} GB/s\n"
        f"  stall / write        {stall / write:7.1%}    limit {MOST_SHARE:.0%}"
    )
    return int(stall / copy > MOST_STALL or stall / write > MOST_SHARE)


def main() -> int:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=sorted(SIZES), default="llama-99m")
    parser.add_argument("--repetitions", type=int, default=9, help="default 9")
    parser.add_argument("--workdir", help="where to write; default: the temporary folder")
    options = parser.parse_args()
    return measure(options.size, options.repetitions, options.workdir)


if __name__ == "__main__":
    sys.exit(main())
