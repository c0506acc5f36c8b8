"""What a resumed run may change, checked before anything of it is touched."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from megatron_mer.config import ReptileConfig, RunConfig
from megatron_mer.continual.history import KINDS, Difference, differences
from megatron_mer.continual.plan import Plan
from megatron_mer.data.indexed_dataset import IndexedDataset
from megatron_mer.errors import ConfigError, DataError, Problem
from megatron_mer.optim.extension import horizon_on_resume, horizon_problems
from megatron_mer.training.preflight import Prepared
from megatron_mer.training.run_state import RunState, saved_model

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
            **{name: data.content for name, data in prepared.gone.items()},
            **{name: data.content_id() for name, data in prepared.datasets.items()},
        },
        "prefixes": {
            **{name: data.prefix for name, data in prepared.gone.items()},
            **{name: os.path.abspath(data.prefix) for name, data in prepared.datasets.items()},
        },
        "evaluate": asdict(config.evaluate) if config.evaluate else None,
        "optimizer": _json(asdict(config.optimizer)),
        "schedule": _json(asdict(config.schedule)),
        "reptile": _json(asdict(config.reptile)) if config.reptile else None,
        "init": _init(config),
    }


def _init(config: RunConfig) -> str | None:
    if config.checkpoint.init_from is None:
        return None
    return f"{config.checkpoint.init_weights} of {config.checkpoint.init_from}"


def _json(section: dict[str, Any]) -> dict[str, Any]:
    return {key: list(v) if isinstance(v, tuple) else v for key, v in section.items()}


def resumed(
    prepared: Prepared, saved: Mapping[str, Any], accept: Collection[str] = ()
) -> tuple[Prepared, RunState]:
    """The run that goes on from a checkpoint, after checking that this configuration may do so.

    Args:
        prepared: the checked run; its plan begins at batch 0.
        saved: the checkpoint's run state.
        accept: kinds of changes to the plan that the user wants, of `continual.history.KINDS`.

    Returns:
        The run with the plan that continues the checkpoint's, and its counters.

    Raises:
        ConfigError: with every difference that is not accepted, would change what was trained, or
            that the checkpoint has no weights for.
        CheckpointError: the run state is of another version.
    """
    state = RunState.from_json(saved)
    found = differences(saved["history"], prepared.plan.spec, state.batches)
    problems = [_refused(one) for one in found if one.accept is None or one.accept not in accept]
    problems += _content(saved, prepared)
    problems += _fixed(saved["settings"], settings(prepared))
    problems += _reptile(saved, prepared.config)
    if all(one.accept for one in found):  # Else there is no plan whose length could be asked for.
        try:
            prepared = _with_plan(prepared, saved, found)
        except ConfigError as error:
            raise ConfigError([*problems, *error.problems]) from error
        problems += horizon_problems(
            prepared.config.schedule,
            prepared.config.optimizer.lr,
            state.horizon,
            state.updates,
            prepared.plan.total_batches,
        )
    if problems:
        raise ConfigError(problems)
    # A constant may be given an end in mid-run; a cosine's is the same number.
    state.horizon = horizon_on_resume(
        prepared.config.schedule, state.horizon, state.updates, prepared.plan.total_batches
    )
    return prepared, state


def _with_plan(prepared: Prepared, saved: Mapping[str, Any], changed: list[Difference]) -> Prepared:
    """The run with the plan that it has if all changes are accepted, and the data for it."""
    spec, history = prepared.plan.spec, saved["history"]
    if changed:
        plan = Plan.continued(history, spec, min(one.batch for one in changed))
    else:
        plan = Plan.extended(history, spec)
    retired = dict(_retired(prepared, plan, saved))
    return replace(prepared, plan=plan, datasets={**prepared.datasets, **retired})


def _retired(
    prepared: Prepared, plan: Plan, saved: Mapping[str, Any]
) -> Iterator[tuple[str, IndexedDataset]]:
    """Opens what left the configuration but may still be replayed, from where it lay.

    Raises:
        ConfigError: it is not there any more, or has other content.
    """
    for name in plan.datasets_from(int(saved["batches"])):
        if name in prepared.datasets:
            continue
        if name in prepared.gone:
            given = f"there is no dataset {prepared.gone[name].prefix}, which batches from "
            given += f"{saved['batches']} on read as {name!r}"
            remedy = "bring it back: the replay buffer has only samples of what was trained on"
            raise ConfigError([Problem("stream", given, remedy=remedy)])
        prefix = str(saved["settings"].get("prefixes", {}).get(name, name))
        text = f"dataset {name!r}, trained on and now in the replay pool, left the configuration"
        remedy = "bring it back, go on without replay, or begin anew with --fresh"
        try:
            dataset = IndexedDataset(prefix)
        except DataError as error:
            given = f"{text}, and where it lay it cannot be read: {error}"
            raise ConfigError([Problem("stream", given=given, remedy=remedy)]) from error
        if dataset.content_id() != saved["settings"]["content"].get(name):
            given = f"{text}, and {prefix} has other content now"
            raise ConfigError([Problem("stream", given=given, remedy=remedy)])
        yield name, dataset


def _refused(difference: Difference) -> Problem:
    if difference.accept is None:
        remedy = f"{difference.remedy}, or begin anew with --fresh"
        return Problem("resume", given=str(difference), remedy=remedy)
    remedy = (
        f"accept it with --accept {difference.accept} ({KINDS[difference.accept]}), undo it, or "
        "begin anew with --fresh"
    )
    return Problem("resume", given=str(difference), remedy=remedy)


def changes(
    prepared: Prepared, saved: Mapping[str, Any], accept: Collection[str] = ()
) -> list[str]:
    """The changes that a resumed run takes up from here on, a line each."""
    found = differences(saved["history"], prepared.plan.spec, int(saved["batches"]))
    unused = sorted(set(accept) - {one.accept for one in found})
    was, now = saved["settings"], settings(prepared)
    cut = (was["tp_size"], now["tp_size"])
    return [
        *(f"accepted, {one}" for one in found),
        *([f"parallel.tp_size was {cut[0]}, is {cut[1]} from here on"] if cut[0] != cut[1] else []),
        *(f"--accept {kind}: nothing of the kind changed" for kind in unused),
        *(
            f"{section}.{key} was {(was[section] or {}).get(key)}, is {value} from here on"
            for section in _FREE
            for key in {**(was[section] or {}), **(now[section] or {})}
            if (was[section] or {}).get(key) != (value := (now[section] or {}).get(key))
        ),
    ]


def incomparable(prepared: Prepared, saved: Mapping[str, Any]) -> list[str]:
    """What the changes make of the measures, a warning each."""
    was, now = saved["settings"]["evaluate"] or {}, settings(prepared)["evaluate"] or {}
    keys = [key for key in ("max_batches", "max_samples") if was.get(key) != now.get(key)]
    if not keys:
        return []
    names = " and ".join(f"evaluate.{key}" for key in keys)
    return [
        f"{names} changed: held-out losses from here on are of other samples than those before, so "
        "that forgetting across the change does not compare"
    ]


def _fixed(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Problem]:
    """What belongs to the weights: model, tokenizer, precision, loss, data."""
    old = saved_model(was)
    for key, value in now["model"].items():
        # The plan's comparison names another seq_length.
        if key == "from_hf" and value is None:  # The weights are the run's own by now.
            continue
        if key not in ("size", "seq_length") and old.get(key) != value:
            given = f"given {value}, but the run began with {old.get(key)}"
            yield Problem(f"model.{key}", given, remedy=_REMEDY)
    if was.get("init") != now["init"]:
        given = f"given {now['init']}, but the run began with {was.get('init')}"
        yield Problem("checkpoint.init_from", given, remedy=_REMEDY)
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


def _content(saved: Mapping[str, Any], prepared: Prepared) -> Iterator[Problem]:
    """A name stands for the same data for good, and the same data for one name."""
    was, now = saved["settings"], settings(prepared)
    names = {content: name for name, content in was["content"].items() if content}
    sizes = Plan.from_history(saved["history"]).dataset_sizes
    for name, content in now["content"].items():
        old = was["content"].get(name)
        if old and old != content and sizes.get(name) == prepared.plan.dataset_sizes.get(name):
            given = f"dataset {name!r} has the content {content:.22}..., the run began with "
            given += f"{old:.22}...: its content changed"
            remedy = "bring it back, or give the new data another name and prefix"
            if content.startswith("edges:"):
                given = f"dataset {name!r} had a sidecar when the run began, and has none now"
                remedy = f"bring {now['prefixes'][name]}.json back"
            yield Problem("stream", given, remedy=remedy)
        known = names.get(content)
        if name not in was["content"] and known is not None:
            given = f"dataset {name!r} holds the data that the run knows as {known!r}: under two "
            given += "names its samples would come twice"
            yield Problem("stream", given, remedy=f"write `name: {known}` beside its prefix")


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
