"""A run that starts from another run's weights: what of that run it needs before torch is there.

The new run has a stream, a schedule and counters of its own. From the old one it takes weights
(`engine.TrainingEngine.start_from`) and, unless told otherwise, what that run was trained on as
entries with `trained_before`, so that replay reaches back beyond its own first batch.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_mer.config import DatasetConfig, RunConfig, TaskConfig, load_config
from megatron_mer.config.checks import check_run
from megatron_mer.continual.plan import Plan
from megatron_mer.errors import CheckpointError, ConfigError, Problem
from megatron_mer.log import get_logger
from megatron_mer.training.outputs import RunDirectory
from megatron_mer.training.run_state import RunState, saved_model

logger = get_logger(__name__)

_KEY = "checkpoint.init_from"

# Those that decide the shapes of the weights; the others are taken up with a line in the log.
_SHAPES = (
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "ffn_hidden_size",
    "vocab_size",
    "tie_embeddings",
)
_MEANINGS = ("rope_base", "rope_scaling", "norm_eps")


@dataclass(frozen=True)
class OldRun:
    """A checkpoint of another run."""

    root: Path
    """That run's directory."""
    path: Path
    """The checkpoint's."""
    run_state: Mapping[str, Any]
    """What that run kept in it."""


@functools.lru_cache(maxsize=1)
def old_run(text: str) -> OldRun:
    """The checkpoint that `checkpoint.init_from` names, whole by the sizes of its files.

    Args:
        text: RUN@STEP.

    Raises:
        ConfigError: there is no such run or step, or it is not whole.
    """
    # Checkpoints import torch, which a run without a warm start does not need so early.
    from megatron_mer.checkpoint import CheckpointInfo
    from megatron_mer.checkpoint.layout import parse_step, step_directories

    place, _, step = text.rpartition("@")
    root = Path(place)
    steps = {parse_step(path.name): path for path in step_directories(root / "checkpoints")}
    listed = ", ".join(str(step) for step in sorted(s for s in steps if s is not None))
    if not steps:
        here = "which holds no checkpoint" if root.exists() else "which does not exist"
        given = f"given {text}: {root}, {here}"
        raise ConfigError([Problem(_KEY, given, "RUN@STEP, the output_dir of a run and a step")])
    if int(step) not in steps:
        raise ConfigError([Problem(_KEY, f"given step {step} of {root}", listed)])
    try:
        info = CheckpointInfo.read(root / "checkpoints" / steps[int(step)].name)
        RunState.from_json(info.run_state)
    except CheckpointError as error:
        others = f"another of its steps {listed}"
        raise ConfigError([Problem(_KEY, f"given {text}: {error}", others)]) from error
    return OldRun(root, info.path, info.run_state)


def with_old_stream(config: RunConfig, fresh: bool = False) -> RunConfig:
    """The configuration with what the old run was trained on before its stream.

    A run that has begun keeps the entries that it began with: the old run may be gone by then.

    Args:
        config: as it was loaded.
        fresh: the run begins anew, whatever lies in its directory.

    Raises:
        ConfigError: the old run is not there, or its entries and the stream contradict each other.
    """
    text = config.checkpoint.init_from
    if text is None or config.checkpoint.init_stream == "none":
        return config
    if any(entry.trained_before for entry in config.stream):
        return config
    outputs = RunDirectory(config.output_dir)
    if not fresh and outputs.has_checkpoint():
        began = load_config(outputs.root / "config.yaml").stream
        entries = [entry for entry in began if entry.trained_before]
    else:
        entries = list(_usable(config, _entries(config, old_run(text))))
        for entry in entries:
            names = ", ".join(dataset.name for dataset in entry.train)
            logger.info("trained before, by %s: task %s (%s)", text, entry.task, names)
        _refuse_gone(text, entries)
    made = replace(config, stream=(*entries, *config.stream))
    if problems := check_run(made):
        given = f"what {text} was trained on stands before the stream, where it contradicts it"
        remedy = "name such entries yourself (trained_before: true), or set init_stream: none"
        raise ConfigError([Problem(_KEY, given, remedy=remedy), *problems])
    return made


def _refuse_gone(text: str, entries: Iterable[TaskConfig]) -> None:
    """A buffer is not inherited: what the old run was trained on is read from its datasets.

    Raises:
        ConfigError: some are not there.
    """
    prefixes = (one.prefix for entry in entries for one in entry.train)
    if gone := [prefix for prefix in prefixes if not Path(f"{prefix}.idx").exists()]:
        given = f"given {text}, which was trained on {', '.join(gone)}: not there any more"
        remedy = (
            "bring them back, set init_stream: none, or name a stand-in yourself as an entry with "
            "trained_before: true"
        )
        raise ConfigError([Problem(_KEY, given, remedy=remedy)])


def _usable(config: RunConfig, entries: Iterator[TaskConfig]) -> Iterator[TaskConfig]:
    """Without replay an entry that has no held-out set would do nothing."""
    return (entry for entry in entries if config.replay is not None or entry.valid)


def _entries(config: RunConfig, old: OldRun) -> Iterator[TaskConfig]:
    """One entry a task that the old run had trained, or had itself from before.

    Its datasets are those of which the ledger has fresh samples; several are drawn in those shares.
    """
    if not old.run_state["history"]:
        text = "%s: what those weights were trained on is not known; name it, or a stand-in, as "
        logger.warning(text + "an entry with trained_before: true if it is to be replayed", _KEY)
        return
    plan = Plan.from_history(old.run_state["history"])
    prefixes = old.run_state["settings"]["prefixes"]
    taken: dict[str, dict[str, float]] = {}
    for entry in plan.ledger(int(old.run_state["batches"]))["tasks"]:
        datasets = taken.setdefault(entry["task"], {})
        for name, counts in entry["datasets"].items():
            # An entry from before that run took no step of it; all of its samples count.
            share = float(plan.dataset_sizes[name] if entry["trained_before"] else counts["fresh"])
            datasets[name] = datasets.get(name, 0.0) + share
    held_out = _held_out(config, old)
    dropped = {task for segment in plan.segments for task in segment.dropped}
    for task, datasets in taken.items():
        if task in dropped:
            logger.warning("%s: task %s was dropped from that run's buffer: not taken", _KEY, task)
            continue
        shares = {name: share for name, share in datasets.items() if share > 0}
        train = tuple(
            DatasetConfig(
                prefix=str(prefixes.get(name, name)),
                name=name,
                weight=share if len(shares) > 1 else None,
            )
            for name, share in shares.items()
        )
        if train:
            valid = held_out.get(task) or None
            yield TaskConfig(task=task, train=train, valid=valid, trained_before=True)


def _held_out(config: RunConfig, old: OldRun) -> dict[str, dict[str, str]]:
    """The old run's held-out sets by task, without those that the new stream has."""
    own = {name: prefix for entry in config.stream for name, prefix in entry.valid_sets.items()}
    places = {os.path.normpath(prefix) for prefix in own.values()}
    found: dict[str, dict[str, str]] = {}
    try:
        stream = load_config(old.root / "config.yaml").stream
    except ConfigError as error:
        logger.warning("%s: the held-out sets of that run are not known: %s", _KEY, error)
        return {}
    for entry in stream:
        for name, prefix in entry.valid_sets.items():
            if name in own or os.path.normpath(prefix) in places:
                continue
            if not Path(f"{prefix}.idx").exists():
                text = "%s: the held-out set %s of that run is left out: there is no %s.idx"
                logger.warning(text, _KEY, name, prefix)
                continue
            found.setdefault(entry.task, {})[name] = prefix
    return found


def warm_start_problems(config: RunConfig, fingerprint: str, fresh: bool) -> Iterator[Problem]:
    """Why the old run's weights do not fit this run; nothing for a run that has begun.

    Args:
        config: the run, its vocabulary size resolved.
        fingerprint: of its tokenizer.
        fresh: the run begins anew.

    Raises:
        ConfigError: there is no such checkpoint.
    """
    text = config.checkpoint.init_from
    if text is None or (not fresh and RunDirectory(config.output_dir).has_checkpoint()):
        return
    old = old_run(text)
    was = old.run_state["settings"]
    model, old_model = asdict(config.model), saved_model(was)
    for key in _SHAPES:
        if old_model.get(key) != model[key]:
            given = f"given {model[key]}, but {text} has weights for {old_model.get(key)}"
            yield Problem(f"model.{key}", given, str(old_model.get(key)))
    for key in _MEANINGS:
        if old_model.get(key) != model[key]:
            words = "model.%s was %s in %s, is %s from here on"
            logger.warning(words, key, old_model.get(key), text, model[key])
    if was["tokenizer"] != fingerprint:
        given = f"its model has SHA-256 {fingerprint[:16]}..., {text} was trained with one of "
        given += f"{was['tokenizer'][:16]}...: its weights know other tokens"
        yield Problem("tokenizer", given, "the tokenizer of that run")
    key = "checkpoint.init_weights"
    wanted = config.checkpoint.init_weights
    if wanted == "anchor" and was["reptile"] is None:
        given = f"given anchor, but {text} was trained without Reptile"
        yield Problem(key, given, "fast, fast_and_moments")
    if wanted == "fast_and_moments" and not _adam_steps(old):
        given = f"given fast_and_moments, but {text} has no moments: it stands before the first "
        yield Problem(key, given + "update", "fast")


def _adam_steps(old: OldRun) -> int:
    state = RunState.from_json(old.run_state)
    return state.updates + state.updates_before


def updates_before(config: RunConfig) -> int:
    """Updates behind the moments that a new run begins with; 0: it begins without."""
    text = config.checkpoint.init_from
    if text is None or config.checkpoint.init_weights != "fast_and_moments":
        return 0
    return _adam_steps(old_run(text))
