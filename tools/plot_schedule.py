"""Draw the learning rate over a run, or the kinds of schedules beside each other.

Examples:
    python tools/plot_schedule.py --config my.yaml --out lr.png
    python tools/plot_schedule.py --config my.yaml --schedule.kind wsd --schedule.per_task true
    python tools/plot_schedule.py --kinds --steps 10000 --lr 3e-4 --out kinds.png

--config takes the training script's options too. A table says where the phases begin. Nothing of a
run is changed; the picture shows a new run, not what a resumed one changed on its way.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args, get_type_hints

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_mer.analysis.schedule_picture import Span, schedule_picture, thinned
from megatron_mer.command import run_tool
from megatron_mer.config import RunConfig, ScheduleConfig, load_config
from megatron_mer.continual.text_table import table
from megatron_mer.errors import ConfigError, DataError, Problem
from megatron_mer.optim.schedule import check_schedule, horizon, lr_at
from megatron_mer.optim.shapes import Phases
from megatron_mer.training.learning_rate import entry_span, lr_of
from megatron_mer.training.preflight import prepare

WIDTH = 100
KINDS = get_args(get_type_hints(ScheduleConfig)["kind"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    own, options = _parse(arguments)
    return run_tool(lambda: _draw(own, options))


def _draw(own: argparse.Namespace, options: list[str]) -> None:
    if own.kinds:
        if options:
            remedy = "leave it out, or give --config"
            raise ConfigError([Problem(options[0], "given with --kinds", remedy=remedy)])
        if own.steps < 100 or own.lr <= 0:
            given = f"--steps {own.steps} --lr {own.lr:g}"
            raise ConfigError([Problem("--kinds", given, "at least 100 steps, a rate above 0")])
        _kinds(own.steps, own.lr, Path(own.out or "schedules.png"), own.only)
    elif own.config:
        config = load_config(own.config, options)
        _run(config, Path(own.out or f"{config.name}_schedule.png"))
    else:
        given = "neither --config nor --kinds"
        raise ConfigError([Problem("plot_schedule.py", given, "one of them")])


def _parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", metavar="FILE", help="a run's YAML")
    add("--kinds", action="store_true", help="every kind of schedule with its defaults")
    add("--only", metavar="KIND", choices=KINDS, help="with --kinds: this one alone")
    add("--steps", type=int, default=1000, metavar="N", help="with --kinds: steps, default 1000")
    add("--lr", type=float, default=3e-4, help="with --kinds: peak rate, default 3e-4")
    add("--out", metavar="PNG", help="the picture; default NAME_schedule.png, or schedules.png")
    return parser.parse_known_args(arguments)


def _kinds(steps: int, lr: float, out: Path, only: str | None) -> None:
    """Draw the kinds with 1 % of warm-up and a tenth of the peak as floor."""
    curves, cells = {}, [["kind", "phase", "from step", "rate there"]]
    for kind in KINDS:
        if only not in (None, kind):
            continue
        floor = 0.0 if kind == "constant" else lr / 10
        config = ScheduleConfig(kind=kind, warmup_steps=max(1, steps // 100), min_lr=floor)
        check_schedule(config, lr, steps)
        curves[kind] = [(step, lr_at(config, lr, steps, step)) for step in thinned(steps)]
        phases = Phases.of(config, lr, steps)
        for name, step in _phases(phases):
            cells.append([kind, name, f"{step:,}", f"{phases.rate(step):.4g}"])
    title = f"{only or 'Schedules'}, {steps:,} steps to a peak of {lr:g}"
    _write(curves, out, [], title, cells)


def _phases(phases: Phases) -> list[tuple[str, int]]:
    """Where each phase begins."""
    found = [("warm-up", 0)] if phases.warm else []
    if phases.cool > phases.warm:
        found.append(("cooldown", phases.warm))
    if phases.decay > phases.cool:
        found.append(("constant", phases.cool))
    if phases.kind != "constant":
        found += [("decay", phases.decay), ("end", phases.end)]
    return found


def _run(config: RunConfig, out: Path) -> None:
    """Draw a run's own schedule; lengths given in fresh tokens are known from its data."""
    parallel = config.parallel
    prepared = prepare(config, parallel.tp_size * parallel.pp_size, fresh=True)
    config, plan = prepared.config, prepared.plan
    total = horizon(config.schedule, plan.total_batches)

    def rate(step: int) -> float:
        return lr_of(config, plan, step, step, total)

    trained = [one for one in plan.entries if not one.trained_before]
    if config.schedule.per_task:
        schedules = [(one.task, *entry_span(plan, one.first_batch)) for one in trained]
    else:
        schedules = [("all", 0, total)]
    cells = [["task", "phase", "from step", "rate there"]]
    for task, first, last in schedules:
        phases = Phases.of(config.schedule, config.optimizer.lr, last - first)
        for name, step in _phases(phases):
            # An entry's end is the next one's beginning.
            inside = first + step < (last if config.schedule.per_task else plan.total_batches)
            if inside:
                cells.append([task, name, f"{first + step:,}", f"{rate(first + step):.4g}"])
    begin = total
    for number, part in enumerate(config.schedule.then):
        if begin < plan.total_batches:
            name = f"then.{number}: {part.kind}"
            cells.append(["all", name, f"{begin:,}", f"{rate(begin):.4g}"])
        begin += part.steps or 0
    final = plan.total_batches - 1
    cells.append(["", "the last step", f"{final:,}", f"{rate(final):.4g}"])
    curve = [(step, rate(step)) for step in thinned(plan.total_batches)]
    spans = [(one.first_batch, one.last_batch, one.task) for one in trained]
    _write({config.name: curve}, out, spans, f"{config.name}: learning rate", cells)


def _write(
    curves: Mapping[str, Sequence[tuple[int, float]]],
    out: Path,
    spans: Sequence[Span],
    title: str,
    cells: Sequence[Sequence[str]],
) -> None:
    try:
        schedule_picture(curves, out, spans, title)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{out}: the picture cannot be written: {reason}") from error
    print(table(cells, WIDTH, names=2))
    print(f"picture: {out}")


if __name__ == "__main__":
    sys.exit(main())
