"""Everything that can be wrong before training, found before torch is imported or a GPU touched."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TypeVar

from megatron_mer.config import RunConfig, check_layout, resolve_vocab
from megatron_mer.config.from_hf import KEY
from megatron_mer.continual.plan import Plan
from megatron_mer.continual.stream import plan_spec
from megatron_mer.data.evaluation_set import EvaluationSet
from megatron_mer.data.indexed_dataset import IndexedDataset, missing_sidecars
from megatron_mer.data.packing import num_samples
from megatron_mer.data.tokenizers import Tokenizer, load_tokenizer
from megatron_mer.errors import ConfigError, DataError, Problem
from megatron_mer.log import get_logger
from megatron_mer.optim.schedule import check_schedule
from megatron_mer.training.copy_target import copy_target_problems
from megatron_mer.training.from_hf import refuse_two_starts, with_foreign_rows
from megatron_mer.training.gone_datasets import GoneDataset, is_gone, known_datasets
from megatron_mer.training.learning_rate import check_tasks
from megatron_mer.training.outputs import RunDirectory
from megatron_mer.training.warm_start import warm_start_problems, with_old_stream

logger = get_logger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Prepared:
    """A checked run: all that the loop needs besides weights."""

    config: RunConfig
    """The resolved configuration, ``model.vocab_size`` included."""
    tokenizer: Tokenizer
    datasets: Mapping[str, IndexedDataset]
    """Training datasets by name."""
    valid: Mapping[str, EvaluationSet]
    """Held-out sets by name."""
    plan: Plan
    """From batch 0; a resumed run has its own, see `training.resume`."""
    gone: Mapping[str, GoneDataset] = field(default_factory=dict)
    """Training datasets by name that are not there any more, and need not be."""


def prepare(config: RunConfig, world_size: int, fresh: bool = False) -> Prepared:
    """Open what a run reads and decide its plan. Reads no token and imports no torch.

    Args:
        config: as ``load_config`` gave it.
        world_size: number of ranks.
        fresh: the run begins anew, whatever lies in its directory.

    Raises:
        ConfigError: with every problem that was found in layout, tokenizer, datasets and plan.
            Whether the data of a run with checkpoints last is decided where it is resumed: a plan
            that was changed on the way asks for other samples than one that begins now.
    """
    problems: list[Problem] = []
    refuse_two_starts(config)
    config = with_old_stream(config, fresh)
    tokenizer = _collect(problems, "tokenizer", lambda: load_tokenizer(config.tokenizer))
    if tokenizer is not None:
        config = _with_vocab(config, tokenizer, fresh, problems)
        fits = functools.partial(_warm_start, config, tokenizer.fingerprint, fresh)
        problems += _collect(problems, "checkpoint.init_from", fits) or []
    problems += check_layout(config, world_size)
    problems += missing_trackers(config)
    problems += copy_target_problems(config.checkpoint.copy_to)
    known = known_datasets(config, fresh)
    training = dict(_open_training(config, tokenizer, known, problems))
    names = {dataset.name for task in config.stream for dataset in task.train}
    gone = {name: known[name] for name in names & known.keys() if name not in training}
    valid = dict(_open_valid(config, tokenizer, problems))
    _warn_of_copies(training)
    if text := missing_sidecars(training.values()):
        logger.warning("%s", text)
    plan = None
    if not problems:
        # A run without checkpoints may find them in the place of its copies.
        copied = config.checkpoint.copy_to is not None
        started = not fresh and (copied or RunDirectory(config.output_dir).has_checkpoint())
        plan = _collect(problems, "stream", lambda: _plan(config, training, gone, started))
        if plan is not None and not started:
            _collect(problems, "replay.capacity_samples", plan.check_buffer)
    if problems or tokenizer is None or plan is None:
        raise ConfigError(problems)
    return Prepared(config, tokenizer, training, valid, plan, gone)


def _with_vocab(
    config: RunConfig, tokenizer: Tokenizer, fresh: bool, problems: list[Problem]
) -> RunConfig:
    """The configuration with its number of rows, as far as it can be told."""
    rows = _collect(problems, KEY, lambda: with_foreign_rows(config, tokenizer, fresh))
    if rows is None:  # What it would have been is not known, and was said.
        return config
    size = tokenizer.vocab_size
    return _collect(problems, "model.vocab_size", lambda: resolve_vocab(rows, size)) or config


def _warm_start(config: RunConfig, fingerprint: str, fresh: bool) -> list[Problem]:
    return list(warm_start_problems(config, fingerprint, fresh))


def missing_trackers(config: RunConfig) -> Iterator[Problem]:
    """Metric services that the configuration asks for and that are not installed."""
    for name in ("wandb", "tensorboard"):
        if getattr(config, name) is not None and find_spec(name) is None:
            given = f"given, but the package {name} is not installed"
            remedy = f"install it (`make venv-trackers`, or `pip install {name}`), or leave it out"
            yield Problem(name, given, remedy=remedy)


def _warn_of_copies(training: Mapping[str, IndexedDataset]) -> None:
    first: dict[str, str] = {}
    for name, dataset in training.items():
        if dataset.sidecar is None:
            continue
        other = first.setdefault(dataset.sidecar.bin_sha256, name)
        if other != name:
            text = "datasets %r and %r hold the same data: its samples come under both names"
            logger.warning(text, other, name)


def _plan(
    config: RunConfig,
    training: Mapping[str, IndexedDataset],
    gone: Mapping[str, GoneDataset],
    started: bool,
) -> Plan:
    seq_length = config.model.seq_length
    spec = plan_spec(
        stream=config.stream,
        replay=config.replay,
        seed=config.seed,
        global_batch_size=config.batch.global_batch_size,
        seq_length=seq_length,
        dataset_sizes={
            **{name: dataset.num_samples for name, dataset in gone.items()},
            **{
                name: num_samples(dataset.num_tokens, seq_length, str(dataset.prefix))
                for name, dataset in training.items()
            },
        },
    )
    plan = Plan(spec, allow_exhausted=started)
    if config.schedule.per_task:
        check_tasks(config, plan)
    else:
        check_schedule(config.schedule, config.optimizer.lr, plan.total_batches)
    return plan


def _open_training(
    config: RunConfig,
    tokenizer: Tokenizer | None,
    known: Mapping[str, GoneDataset],
    problems: list[Problem],
) -> Iterator[tuple[str, IndexedDataset]]:
    seen = set()
    for index, task in enumerate(config.stream):
        for place, dataset in enumerate(task.train):
            name = dataset.name
            if name in seen:
                continue
            seen.add(name)
            if name in known and is_gone(dataset.prefix):
                continue
            path = f"stream.{index}.train.{place}.prefix"
            opened = _open(dataset.prefix, path, config, tokenizer, problems)
            if opened is not None:
                yield name, opened


def _open_valid(
    config: RunConfig, tokenizer: Tokenizer | None, problems: list[Problem]
) -> Iterator[tuple[str, EvaluationSet]]:
    for index, task in enumerate(config.stream):
        for name, prefix in task.valid_sets.items():
            path = f"stream.{index}.valid"
            opened = _open(prefix, path, config, tokenizer, problems)
            if opened is None or tokenizer is None:
                continue
            vocab_size = config.model.vocab_size or tokenizer.vocab_size
            made = _collect(
                problems, path, functools.partial(_evaluation_set, config, opened, vocab_size)
            )
            if made is not None:
                yield name, made


def _evaluation_set(config: RunConfig, dataset: IndexedDataset, vocab_size: int) -> EvaluationSet:
    return EvaluationSet(
        dataset,
        seq_length=config.model.seq_length,
        rows_per_batch=config.batch.global_batch_size,
        max_batches=config.evaluate.max_batches if config.evaluate else None,
        vocab_size=vocab_size,
        max_samples=config.evaluate.max_samples if config.evaluate else None,
    )


def _open(
    prefix: str,
    path: str,
    config: RunConfig,
    tokenizer: Tokenizer | None,
    problems: list[Problem],
) -> IndexedDataset | None:
    dataset = _collect(problems, path, lambda: IndexedDataset(prefix))
    if dataset is None:
        return None
    length = config.model.seq_length
    _collect(problems, path, lambda: num_samples(dataset.num_tokens, length, prefix))
    if tokenizer is not None:
        problems += _tokenizer_problems(dataset, path, config, tokenizer)
    return dataset


def _tokenizer_problems(
    dataset: IndexedDataset, path: str, config: RunConfig, tokenizer: Tokenizer
) -> Iterator[Problem]:
    """What the sidecar tells against the run's tokenizer; foreign datasets have no sidecar."""
    if dataset.sidecar is None:
        return
    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    for problem in dataset.sidecar.problems(tokenizer.fingerprint, vocab_size):
        yield Problem(path, given=f"{dataset.prefix} {problem}")


def _collect(problems: list[Problem], path: str, make: Callable[[], T]) -> T | None:
    """Make something; on a user's error note it under ``path`` and go on, to find the next one."""
    try:
        return make()
    except (ConfigError, DataError) as error:
        problems.extend(error.problems or [Problem(path, given=str(error))])
        return None
