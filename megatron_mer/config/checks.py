"""Rules between values: each names the numbers that contradict each other.

A check is a generator over the problems it finds. It may meet a section of which some values were
refused; asking for one of those ends the check, and what it found before stays.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, Final, cast

from megatron_mer.config.field_types import TOKENIZER_KINDS
from megatron_mer.config.model_checks import heads, rope_scaling, tensor_split
from megatron_mer.config.parse import NotParsedError, Partial, as_far_as_parsed
from megatron_mer.config.replay_checks import replay_buffer, replay_weights
from megatron_mer.config.schedule_checks import segments, unused_or_above_peak, warmup_too_long
from megatron_mer.config.schema import (
    DatasetConfig,
    RunConfig,
    TaskConfig,
)
from megatron_mer.errors import Problem

Problems = Iterator[Problem]


def check_run(run: RunConfig | Partial) -> list[Problem]:
    """Finds every contradiction inside a configuration that needs no number of ranks."""
    config = cast(RunConfig, run)
    found: list[Problem] = []
    for check in _RUN_CHECKS:
        found += as_far_as_parsed(check(config))
    for index, entry in enumerate(_entries(config)):
        for entry_check in _ENTRY_CHECKS:
            found += as_far_as_parsed(entry_check(entry, f"stream.{index}"))
    return found


def check_layout(config: RunConfig, world_size: int) -> list[Problem]:
    """Finds what keeps a configuration from running on a number of ranks.

    Args:
        config: a loaded configuration.
        world_size: number of ranks.

    Returns:
        Every problem; none means that the layout works and dp_size is
        world_size / (tp_size * pp_size).
    """
    found: list[Problem] = []
    for check in (_zero_stage, tensor_split, _stages):
        found += check(config)
    tp_size, pp_size = config.parallel.tp_size, config.parallel.pp_size
    dp_size, left = divmod(world_size, tp_size * pp_size)
    if left or dp_size < 1:
        given = f"tp_size {tp_size} x pp_size {pp_size} = {tp_size * pp_size} ranks a replica"
        remedy = (
            f"start a multiple of {tp_size * pp_size} processes, with deepspeed, torchrun or srun "
            "(its number of tasks), or change tp_size or pp_size"
        )
        allowed = f"a divisor of the number of ranks, {world_size}"
        found.append(Problem("parallel", given, allowed, remedy))
        # What dp_size would be is open, but the rows have to fit one replica in any case.
        dp_size = 1
    found += _rows(config, dp_size)
    return found


def _entries(config: RunConfig) -> tuple[TaskConfig, ...]:
    try:
        return config.stream
    except NotParsedError:
        return ()


def _datasets(config: RunConfig) -> Iterator[tuple[str, DatasetConfig]]:
    """Gives the path and the dataset of every training dataset that could be parsed."""
    for index, entry in enumerate(_entries(config)):
        try:
            train = entry.train
        except NotParsedError:
            continue
        for place, dataset in enumerate(train):
            if not isinstance(dataset, Partial):
                yield f"stream.{index}.train.{place}", dataset


def _valid_sets(config: RunConfig) -> Iterator[tuple[str, str, str]]:
    """Gives path, name and prefix of every held-out set that could be parsed."""
    for index, entry in enumerate(_entries(config)):
        try:
            valid, task = entry.valid, entry.task
        except NotParsedError:
            continue
        sets = {task: valid} if isinstance(valid, str) else valid or {}
        for name, prefix in sets.items():
            suffix = "" if isinstance(valid, str) else f".{name}"
            yield f"stream.{index}.valid{suffix}", name, prefix


# Sections ---------------------------------------------------------------------------------------


def _tokenizer(config: RunConfig) -> Problems:
    kind, colon, path = config.tokenizer.partition(":")
    if not colon or kind not in TOKENIZER_KINDS or not path:
        allowed = ", ".join(f"{kind}:PATH" for kind in TOKENIZER_KINDS)
        yield Problem("tokenizer", f"given {config.tokenizer!r}", allowed)


def _nesterov(config: RunConfig) -> Problems:
    if config.reptile is not None and config.reptile.nesterov and config.reptile.momentum == 0:
        allowed = "false, as reptile.momentum is 0"
        remedy = "give a momentum or leave nesterov out"
        yield Problem("reptile.nesterov", "given true", allowed, remedy)


def _evaluate(config: RunConfig) -> Problems:
    if config.evaluate is not None and not any(entry.valid for entry in config.stream):
        given = "no entry of the stream names held-out data"
        yield Problem("evaluate", given, "", "add valid: to the stream or leave evaluate out")


# Layout -----------------------------------------------------------------------------------------


def _zero_stage(config: RunConfig) -> Problems:
    stage = config.parallel.zero_stage
    if stage == 0:
        given = "given 0, which keeps no master weights apart from the model's"
        remedy = "with one data-parallel rank 1 shards nothing and costs no more"
        yield Problem("parallel.zero_stage", given, "1", remedy)
    elif stage >= 2:
        given = f"given {stage}, which shards gradients and does not work with pipeline stages"
        yield Problem("parallel.zero_stage", given, "1")


def _stages(config: RunConfig) -> Problems:
    pp_size, num_layers = config.parallel.pp_size, config.model.num_layers
    if pp_size > num_layers:
        given = f"{pp_size} stages for model.num_layers {num_layers}"
        yield Problem("parallel.pp_size", given, f"1 to {num_layers}")


def _rows(config: RunConfig, dp_size: int) -> Problems:
    rows, micro = config.batch.global_batch_size, config.batch.micro_batch_size
    if rows % (micro * dp_size):
        given = (
            f"{rows} rows do not divide into micro_batch_size {micro} "
            f"x dp_size {dp_size} = {micro * dp_size}"
        )
        allowed = f"a multiple of {micro * dp_size}"
        yield Problem("batch.global_batch_size", given, allowed)


def _rows_of_one_rank(config: RunConfig) -> Problems:
    rows, micro = config.batch.global_batch_size, config.batch.micro_batch_size
    if rows % micro:
        given = f"{rows} rows do not divide into micro_batch_size {micro}"
        yield Problem("batch.global_batch_size", given, f"a multiple of {micro}")


# Stream -----------------------------------------------------------------------------------------


def _trained(config: RunConfig) -> Problems:
    if all(entry.trained_before for entry in config.stream):
        given = f"each of the {len(config.stream)} entries has trained_before, so nothing is left"
        yield Problem("stream", given, "at least one entry that this run trains")


def _trained_before_use(config: RunConfig) -> Problems:
    for index, entry in enumerate(config.stream):
        if entry.trained_before and config.replay is None and not entry.valid:
            given = "given true, which without replay: and valid: has no effect"
            remedy = "add one of them or remove the entry"
            yield Problem(f"stream.{index}.trained_before", given, "", remedy)


def _init(config: RunConfig) -> Problems:
    checkpoint = config.checkpoint
    text = checkpoint.init_from
    if text is None:
        for key, default in (("init_weights", "fast"), ("init_stream", "ledger")):
            if getattr(checkpoint, key) != default:
                given = f"given {getattr(checkpoint, key)}, which without init_from has no effect"
                yield Problem(f"checkpoint.{key}", given, "", "add init_from or remove it")
        return
    place, _, step = text.rpartition("@")
    if not place or not step.isdecimal():
        remedy = "add the step (tools/inspect_checkpoint.py RUN lists them)"
        given = f"given {text!r}"
        yield Problem("checkpoint.init_from", given, "RUN@STEP, as runs/old@300", remedy)
    elif os.path.normpath(place) == os.path.normpath(config.output_dir):
        given = f"given {text!r}, which is this run's own output_dir"
        remedy = "a run resumes by itself; give the new one an output_dir of its own"
        yield Problem("checkpoint.init_from", given, "another run", remedy)


def local_path(place: str) -> str | None:
    """The path that a path or URL means; None where it is not on this machine's file systems."""
    protocol, mark, path = place.partition("://")
    if mark and protocol not in ("file", "local"):
        return None
    return os.path.expanduser(path if mark else place)


def _copy_to(config: RunConfig) -> Problems:
    place = config.checkpoint.copy_to
    if place is None:
        return
    path = local_path(place)
    if path is None:
        host = place.partition("://")[2].partition("/")[0]
        if ":" in host.partition("@")[0] and "@" in host:
            given = "given a URL with a password, which would stand in config.yaml and in the log"
            remedy = "give it to the file system by its environment variables or configuration"
            yield Problem("checkpoint.copy_to", given, "a URL without one", remedy)
        elif not host or "::" in place:
            allowed = "PATH or PROTOCOL://PLACE, such as s3://bucket/run"
            yield Problem("checkpoint.copy_to", f"given {place!r}", allowed)
        return
    own, given = os.path.realpath(config.output_dir), os.path.realpath(path)
    if os.path.commonpath([own, given]) == own:
        text = f"given {place!r}, which lies in output_dir and would be lost with it"
        yield Problem("checkpoint.copy_to", text, "a directory outside, best on another disk")


def _dataset_names(config: RunConfig) -> Problems:
    """A name stands for one dataset, whose order and place go on when its task returns."""
    first: dict[str, tuple[str, str]] = {}
    for path, dataset in _datasets(config):
        where, prefix = first.setdefault(dataset.name, (path, dataset.prefix))
        if os.path.normpath(prefix) != os.path.normpath(dataset.prefix):
            given = f"{dataset.name!r} names {dataset.prefix} here, but {prefix} in {where}"
            remedy = "give one of them a name: of its own"
            yield Problem(f"{path}.name", given, "one dataset a name in the whole run", remedy)


def _prefixes(config: RunConfig) -> Problems:
    trained = [(f"{path}.prefix", dataset.prefix) for path, dataset in _datasets(config)]
    held_out = [(path, prefix) for path, _, prefix in _valid_sets(config)]
    for path, prefix in trained + held_out:
        if prefix.endswith((".bin", ".idx", "/")):
            allowed = "the path that PREFIX.bin and PREFIX.idx begin with"
            remedy = f"write {prefix[:-4]}" if prefix[-1] != "/" else "add the file's name"
            yield Problem(path, f"given {prefix!r}", allowed, remedy)


def _valid_names(config: RunConfig) -> Problems:
    first: dict[str, tuple[str, str]] = {}
    trained = {os.path.normpath(data.prefix): path for path, data in _datasets(config)}
    for path, name, prefix in _valid_sets(config):
        where, earlier = first.setdefault(name, (path, prefix))
        if os.path.normpath(earlier) != os.path.normpath(prefix):
            given = f"{name!r} names {prefix} here, but {earlier} in {where}"
            yield Problem(path, given, "one held-out set a name", "give it another name {name: P}")
        if os.path.normpath(prefix) in trained:
            given = f"{prefix} is trained on in {trained[os.path.normpath(prefix)]}"
            yield Problem(path, given, "data that no entry trains on")


def _length(entry: TaskConfig, path: str) -> Problems:
    given = [key for key in ("steps", "fresh_tokens") if getattr(entry, key) is not None]
    if entry.trained_before:
        for key in given:
            text = f"given {getattr(entry, key)}, but an entry with trained_before takes no step"
            yield Problem(f"{path}.{key}", text, "nothing", "remove it")
        if entry.max_epochs != 1:
            text = f"given {entry.max_epochs:g}, but an entry with trained_before takes no step"
            yield Problem(f"{path}.max_epochs", text, "nothing", "remove it")
        for place, dataset in enumerate(entry.train):
            if dataset.max_epochs is not None:
                where = f"{path}.train.{place}.max_epochs"
                text = f"given {dataset.max_epochs:g} in an entry with trained_before, which reads "
                yield Problem(where, text + "nothing anew", "nothing", "remove it")
    elif not given:
        yield Problem(path, "has no length", "either steps or fresh_tokens", "add one of them")
    elif len(given) == 2:
        text = f"given steps {entry.steps} and fresh_tokens {entry.fresh_tokens}"
        yield Problem(path, text, "either steps or fresh_tokens", "remove one of them")


def _train(entry: TaskConfig, path: str) -> Problems:
    weighted = sum(dataset.weight is not None for dataset in entry.train)
    if weighted not in (0, len(entry.train)):
        given = f"{weighted} of {len(entry.train)} datasets have a weight"
        yield Problem(f"{path}.train", given, "a weight for all of them or for none")
    prefixes: dict[str, list[str]] = {}
    for dataset in entry.train:
        prefixes.setdefault(dataset.name, []).append(dataset.prefix)
    for name, same in sorted(prefixes.items()):
        # Two prefixes under one name are reported for the whole run.
        if len(same) > 1 and len(set(same)) == 1:
            given = f"the dataset {name!r} stands here {len(same)} times"
            remedy = "list it once, with a weight if it should count more"
            yield Problem(f"{path}.train", given, "each dataset once", remedy)


_RUN_CHECKS: Final[tuple[Callable[[Any], Problems], ...]] = (
    _tokenizer,
    heads,
    rope_scaling,
    _zero_stage,
    tensor_split,
    _stages,
    _rows_of_one_rank,
    unused_or_above_peak,
    warmup_too_long,
    segments,
    _nesterov,
    _evaluate,
    replay_weights,
    replay_buffer,
    _trained,
    _trained_before_use,
    _init,
    _copy_to,
    _dataset_names,
    _prefixes,
    _valid_names,
)
_ENTRY_CHECKS: Final[tuple[Callable[[Any, str], Problems], ...]] = (_length, _train)
