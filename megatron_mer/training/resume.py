"""What a resumed run may change, checked before anything of it is touched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from megatron_mer.config import ReptileConfig, RunConfig
from megatron_mer.continual.stream import differences
from megatron_mer.errors import ConfigError, Problem
from megatron_mer.log import get_logger
from megatron_mer.training.preflight import Prepared
from megatron_mer.training.run_state import RunState

logger = get_logger(__name__)

_REMEDY = "undo the change, or begin anew with --fresh"

# Sections whose changes a resumed run takes up, each with one line in the log.
_FREE = ("optimizer", "schedule", "reptile", "evaluate")


def settings(prepared: Prepared) -> dict[str, Any]:
    """What a checkpoint keeps of the configuration, to be compared on resume. JSON types."""
    config = prepared.config
    return {
        "model": asdict(config.model),
        "precision": config.precision,
        "tokenizer": prepared.tokenizer.fingerprint,
        "tp_size": config.parallel.tp_size,
        "eod_mask_loss": config.batch.eod_mask_loss,
        "content": {
            name: dataset.sidecar.bin_sha256 if dataset.sidecar else None
            for name, dataset in prepared.datasets.items()
        },
        "evaluate": asdict(config.evaluate) if config.evaluate else None,
        "optimizer": _json(asdict(config.optimizer)),
        "schedule": _json(asdict(config.schedule)),
        "reptile": _json(asdict(config.reptile)) if config.reptile else None,
    }


def _json(section: dict[str, Any]) -> dict[str, Any]:
    return {key: list(v) if isinstance(v, tuple) else v for key, v in section.items()}


def resumed_state(prepared: Prepared, saved: Mapping[str, Any]) -> RunState:
    """The counters of a checkpoint, after checking that this configuration may continue it.

    Args:
        prepared: the checked run; the batches that were skipped are marked in its plan.
        saved: the checkpoint's run state.

    Raises:
        ConfigError: with every difference that would change what was trained, or that the
            checkpoint has no weights for.
        CheckpointError: the run state is of another version.
    """
    state = RunState.from_json(saved)
    problems = [
        Problem("resume", given=difference, remedy=_REMEDY)
        for difference in differences(saved["history"], prepared.plan)
    ]
    problems += _fixed(saved["settings"], settings(prepared))
    problems += _reptile(saved, prepared.config)
    problems += _horizon(prepared, state)
    if problems:
        raise ConfigError(problems)
    prepared.plan.restore_skipped(saved["history"])
    return state


def changes(prepared: Prepared, saved: Mapping[str, Any]) -> list[str]:
    """The changes that a resumed run takes up from here on, a line each."""
    was, now = saved["settings"], settings(prepared)
    return [
        f"{section}.{key} was {(was[section] or {}).get(key)}, is {value} from here on"
        for section in _FREE
        for key in {**(was[section] or {}), **(now[section] or {})}
        if (was[section] or {}).get(key) != (value := (now[section] or {}).get(key))
    ]


def _fixed(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Problem]:
    """What belongs to the weights: model, tokenizer, precision, loss, data, tensor slices."""
    for key, value in now["model"].items():
        if key != "size" and was["model"].get(key) != value:
            given = f"given {value}, but the run began with {was['model'].get(key)}"
            yield Problem(f"model.{key}", given, remedy=_REMEDY)
    if was["precision"] != now["precision"]:
        given = f"given {now['precision']}, but the run began with {was['precision']}"
        yield Problem("precision", given, remedy=_REMEDY)
    if was["tokenizer"] != now["tokenizer"]:
        given = (
            f"its model has SHA-256 {now['tokenizer'][:16]}..., the run began with one of "
            f"{was['tokenizer'][:16]}..."
        )
        yield Problem("tokenizer", given, remedy=_REMEDY)
    if was["eod_mask_loss"] != now["eod_mask_loss"]:
        given = f"given {now['eod_mask_loss']}, but the run began with {was['eod_mask_loss']}"
        yield Problem("batch.eod_mask_loss", given, remedy=_REMEDY)
    for name, checksum in now["content"].items():
        if name in was["content"] and was["content"][name] != checksum:
            given = (
                f"dataset {name!r} has the SHA-256 {str(checksum)[:16]}..., the run began with "
                f"{str(was['content'][name])[:16]}...: its content changed"
            )
            yield Problem("stream", given, remedy="bring the old one back, or give it another name")
    if was["tp_size"] != now["tp_size"]:
        given = f"given {now['tp_size']}, but the checkpoint is cut for {was['tp_size']}"
        remedy = "resume with the same; pp_size and the number of data-parallel ranks may change"
        yield Problem("parallel.tp_size", given, str(was["tp_size"]), remedy)


def _kinds(reptile: Mapping[str, Any] | None) -> tuple[bool, ...]:
    """Which tensors Reptile keeps: anchor, velocity, last delta."""
    if reptile is None:
        return (False, False, False)
    momentum = bool(reptile["momentum"])
    return (True, momentum, bool(reptile["track_cosine"]) and not momentum)


def _reptile(saved: Mapping[str, Any], config: RunConfig) -> Iterator[Problem]:
    was = saved["settings"]["reptile"]
    now = asdict(config.reptile) if config.reptile else None
    if _kinds(was) != _kinds(now):
        given = f"{_describe(now)}, but the checkpoint was written with {_describe(was)}"
        remedy = "it keeps other tensors; " + _REMEDY
        yield Problem("reptile", given, remedy=remedy)
    elif isinstance(config.reptile, ReptileConfig) and saved["reptile"]:
        since = int(saved["reptile"]["updates_since"])
        if since >= config.reptile.k:
            given = (
                f"given {config.reptile.k}, but the checkpoint stands {since} updates after its "
                "last Reptile update"
            )
            yield Problem("reptile.k", given, f"> {since} on this resume")


def _describe(reptile: Mapping[str, Any] | None) -> str:
    if reptile is None:
        return "no reptile section"
    return f"reptile momentum {reptile['momentum']}, track_cosine {reptile['track_cosine']}"


def _horizon(prepared: Prepared, state: RunState) -> Iterator[Problem]:
    """The learning-rate schedule's length is fixed at first launch."""
    schedule, total = prepared.config.schedule, prepared.plan.total_batches
    if schedule.kind == "constant":
        return
    wanted = schedule.total_steps
    if wanted is not None and wanted != state.horizon:
        given = f"{wanted}, but the run began with a schedule of {state.horizon} steps"
        yield Problem("schedule.total_steps", given, str(state.horizon), _REMEDY)
    if wanted is None and total > state.horizon:
        given = (
            f"now {total} batches, but the learning-rate schedule was fixed at first launch to end "
            f"after {state.horizon} steps, where the rate is {schedule.min_lr:g}"
        )
        allowed = f"schedule.total_steps: {state.horizon}, which trains what follows at that rate"
        yield Problem("stream", given, allowed, "say so explicitly, or begin anew with --fresh")
