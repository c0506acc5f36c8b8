"""Say how much memory a run takes on each rank, before it starts, and what makes it fit.

Examples:
    python tools/plan_memory.py --config my.yaml --ranks 64
    python tools/plan_memory.py --config my.yaml --ranks 64 --fits 70
    python tools/plan_memory.py --config my.yaml --ranks 8 --parallel.pp_size 2 --json

It takes the training script's options too. Nothing is built, so it needs neither a GPU nor the
data, and with model.vocab_size given not the tokenizer. Counted are the bytes of tensors; CUDA's
context, NCCL and what the allocator cannot use take some GiB more. See docs/memory.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_mer.analysis.memory.advice import (
    Change,
    fitting_changes,
    needed,
    single_changes,
    worst_stage,
)
from megatron_mer.analysis.memory.plan import StageMemory, plan_memory
from megatron_mer.analysis.memory.shape import Device
from megatron_mer.command import run_tool
from megatron_mer.config import RunConfig, check_layout, load_config, resolve_vocab
from megatron_mer.continual.text_table import table
from megatron_mer.data.tokenizers import load_tokenizer
from megatron_mer.errors import ConfigError
from megatron_mer.parallel.topology import Layout, num_micro_batches

GIB = 1 << 30
WIDTH = 100
DOES_NOT_FIT = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    own, overrides = _parse(arguments)
    return run_tool(lambda: _plan(own, overrides))


def _parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", metavar="FILE", required=True, help="a run's YAML")
    add("--ranks", type=int, metavar="N", required=True, help="number of ranks, one a GPU")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="where it trains; default: cuda")
    add(
        "--fits",
        type=float,
        metavar="GIB",
        help=f"name what makes a rank take at most this; exit code {DOES_NOT_FIT}: it takes more",
    )
    add("--json", action="store_true", help="one JSON object, in bytes")
    own, overrides = parser.parse_known_args(arguments)
    if own.ranks < 1:
        parser.error("--ranks must be at least 1")
    if own.fits is not None and own.fits <= 0:
        parser.error("--fits must be above 0")
    return own, overrides


def _plan(own: argparse.Namespace, overrides: list[str]) -> int:
    config = load_config(own.config, overrides)
    if config.model.vocab_size is None:
        config = resolve_vocab(config, load_tokenizer(config.tokenizer).vocab_size)
    if problems := check_layout(config, own.ranks):
        raise ConfigError(problems)
    layout = Layout.of(config.parallel, own.ranks)
    stages = plan_memory(config, layout, own.device)
    worst = worst_stage(stages, own.device)
    fits = own.fits is None or needed(worst, own.device) <= own.fits * GIB
    if fits:
        changes = single_changes(config, own.ranks, own.device) if own.fits is None else []
    else:
        changes = fitting_changes(config, own.ranks, own.device, int(own.fits * GIB))
    if own.json:
        print(json.dumps(_as_json(config, layout, own, stages, worst, fits, changes), indent=2))
    else:
        print(_as_text(config, layout, own, stages, worst, fits, changes))
    return 0 if fits else DOES_NOT_FIT


def _as_json(
    config: RunConfig,
    layout: Layout,
    own: argparse.Namespace,
    stages: Sequence[StageMemory],
    worst: StageMemory,
    fits: bool,
    changes: Sequence[Change],
) -> dict[str, Any]:
    return {
        "name": config.name,
        "device": own.device,
        "ranks": layout.world_size,
        "layout": {"tp": layout.tp_size, "pp": layout.pp_size, "dp": layout.dp_size},
        "worst_stage": worst.stage.index,
        "needed_bytes": needed(worst, own.device),
        "fits": None if own.fits is None else fits,
        "stages": [_stage_json(one) for one in stages],
        "changes": [
            {
                "settings": {key: new for key, _, new in change.settings},
                "needed_bytes": needed(change.worst, own.device),
                "slowdown": round(change.slowdown, 3),
            }
            for change in changes
        ],
    }


def _stage_json(memory: StageMemory) -> dict[str, Any]:
    return {
        "stage": memory.stage.index,
        "blocks": memory.stage.blocks,
        "micro_batches_in_flight": memory.stage.in_flight,
        "always": dict(memory.always),
        "phases": {name: dict(parts) for name, parts in memory.phases.items()},
        "peak_phase": memory.peak_phase,
        "device_bytes": memory.peak,
        "host": dict(memory.host),
        "host_bytes": memory.host_total,
    }


def _as_text(
    config: RunConfig,
    layout: Layout,
    own: argparse.Namespace,
    stages: Sequence[StageMemory],
    worst: StageMemory,
    fits: bool,
    changes: Sequence[Change],
) -> str:
    count = num_micro_batches(config, layout.dp_size)
    lines = [
        f"{config.name}: {layout.world_size} ranks, tp {layout.tp_size} x pp {layout.pp_size} x "
        f"dp {layout.dp_size}, {config.precision}; a step is {count} micro batches of "
        f"{config.batch.micro_batch_size} rows of {config.model.seq_length} tokens; activation "
        f"checkpointing {config.parallel.activation_checkpointing}; GiB a rank",
        "",
        _worst_table(worst, own.device),
    ]
    if len(stages) > 1:
        lines += ["", _stage_table(stages)]
    lines += ["", *_verdict(own, worst, fits, changes)]
    return "\n".join(lines)


def _worst_table(worst: StageMemory, device: Device) -> str:
    phases = list(worst.phases)
    where = "GPU" if device == "cuda" else "memory"
    cells = [[f"stage {worst.stage.index}, the fullest", "where", *phases]]
    cells += [[name, where, *[_gib(size)] * len(phases)] for name, size in worst.always.items()]
    parts = [name for one in worst.phases.values() for name, size in one.items() if size]
    for name in dict.fromkeys(parts):
        cells.append([name, where, *(_gib(worst.phases[one].get(name, 0)) for one in phases)])
    cells.append([f"all on the {where}" if device == "cuda" else "all but the next", where])
    cells[-1] += [_gib(worst.total(one)) for one in phases]
    place = "host, pinned" if device == "cuda" else "memory"
    cells += [[name, place, *[_gib(size)] * len(phases)] for name, size in worst.host.items()]
    return table(cells, WIDTH, names=2)


def _stage_table(stages: Sequence[StageMemory]) -> str:
    cells = [
        ["stage", "blocks", "in flight", "weights", "optimizer", "gradients", "Reptile",
         "activations", "logits", "peak", "host"]
    ]  # fmt: skip
    for one in stages:
        parts = {**one.always, **one.phases["backward"]}
        reptile = sum(size for name, size in parts.items() if name.startswith("Reptile"))
        sums = (
            parts["weights"],
            parts["fp32 masters"] + parts["Adam moments"],
            parts["gradients"] + parts.get("gradient sums", 0),
            reptile,
            parts["activations"],
            parts.get("kept logits", 0) + parts["logits and loss"],
        )
        head = [str(one.stage.index), str(one.stage.blocks), str(one.stage.in_flight)]
        tail = [_gib(one.peak), _gib(one.host_total)]
        cells.append([*head, *map(_gib, sums), *tail])
    return table(cells, WIDTH)


def _verdict(
    own: argparse.Namespace, worst: StageMemory, fits: bool, changes: Sequence[Change]
) -> list[str]:
    what = f"{_gib(needed(worst, own.device))} GiB a rank at most, in the {worst.peak_phase} phase"
    if own.fits is None:
        return [what, "", _change_table("one change", changes, own.device)] if changes else [what]
    if fits:
        return [f"fits: {what}; {own.fits:g} are there"]
    if not changes:
        return [f"does not fit: {what}; no change of this tool's makes it fit into {own.fits:g}"]
    cheapest = f"{changes[0]}: {_gib(needed(changes[0].worst, own.device))} GiB a rank"
    lines = [f"does not fit: {what}; {own.fits:g} are there", f"cheapest change: {cheapest}"]
    return [*lines, "", _change_table("what makes it fit", changes, own.device)]


def _change_table(head: str, changes: Sequence[Change], device: Device) -> str:
    cells = [[head, "GiB a rank", "step time"]]
    cells += [
        [str(one), _gib(needed(one.worst, device)), f"x {one.slowdown:.2f}"] for one in changes
    ]
    return table(cells, WIDTH)


def _gib(size: int) -> str:
    gib = size / GIB
    return f"{gib:,.2f}" if gib >= 0.1 or not gib else f"{gib:.2g}"


if __name__ == "__main__":
    sys.exit(main())
