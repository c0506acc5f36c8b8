"""Rewrite a checkpoint for another layout, offline: one process, a fragment in memory at a time.

Loading takes any layout as it is, so nobody needs this to resume. It spares a run that starts on
many ranks the reading across files: afterwards each tensor rank finds its slices cut, and each rank
most of what it wants in the file with its number.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_mer.checkpoint.files import remove_directory
from megatron_mer.checkpoint.find import CheckpointInfo, damaged, is_permanent
from megatron_mer.checkpoint.layout import TEMPORARY, Fragment, slice_shape, step_name
from megatron_mer.checkpoint.load import CheckpointReader, Parameter
from megatron_mer.checkpoint.save import commit, write_manifest, write_rank
from megatron_mer.errors import CheckpointError, ConfigError, Problem

# What tensor parallelism cuts evenly; the names of `model`'s keys in a checkpoint's run state.
_CUT = ("num_heads", "ffn_hidden_size")


def reshard(
    source: Path,
    directory: Path,
    tp_size: int,
    ranks: int,
    cut_dim: Callable[[str], int | None],
    num_slices: Callable[[str, int, int], int],
    progress: Callable[[int, int], None] = lambda rank, ranks: None,
) -> Path:
    """Write a checkpoint's content as `ranks` ranks with `tp_size` tensor ranks would have it.

    Each tensor rank's slices, put one after the other in the model's order, are cut into
    ranks / tp_size equal parts: the order in which pipeline stages, and the data ranks of each, own
    them. Any pipeline and data sizes load from it, with that tp_size or another.

    Args:
        source: directory of one checkpoint.
        directory: gets step_NUMBER and `latest`; made when missing, holds no checkpoint yet.
        tp_size: tensor-parallel ranks.
        ranks: all ranks, a multiple of tp_size.
        cut_dim: the dim along which tensor parallelism cuts a parameter, None: every rank has all
            of it.
        num_slices: into how many slices a parameter is cut, by its name, tp_size and the model's
            heads of keys and values.
        progress: called before each rank's file with its number and how many there are.

    Returns:
        The new checkpoint's directory.

    Raises:
        ConfigError: the sizes do not fit, or there is a checkpoint.
        CheckpointError: the source is not whole, or the target cannot be written.
    """
    _check_sizes(tp_size, ranks)
    if any(directory.glob("step_*")):
        given = f"given {directory}, which holds a checkpoint already"
        raise ConfigError([Problem("DEST", given, "a folder without one")])
    if problem := damaged(source):
        raise CheckpointError(f"the checkpoint is not whole: {problem}")
    info = CheckpointInfo.read(source)
    model = info.run_state["settings"]["model"]
    _check_model(model, tp_size)
    reader = CheckpointReader(source, verified=True)
    parameters = _in_order(reader.parameters(), cut_dim)
    final = directory / step_name(info.step)
    temporary = final.with_name(final.name + TEMPORARY)
    try:
        _check_space(directory, _stored_bytes(parameters, tp_size))
        cuts = [num_slices(one.name, tp_size, model["num_kv_heads"]) for one in parameters]
        _write(reader, parameters, cuts, temporary, tp_size, ranks, progress)
        settings = {**info.run_state["settings"], "tp_size": tp_size}
        run_state = json.dumps({**info.run_state, "settings": settings}, indent=1).encode()
        write_manifest(temporary, info.step, ranks, run_state, is_permanent(source))
        commit(directory, temporary, final)
    except OSError as error:
        raise CheckpointError(
            f"{final} was not written ({error}); {source} is as it was. Check the space and the "
            "rights there"
        ) from error
    finally:
        if temporary.exists():
            with contextlib.suppress(OSError):
                remove_directory(temporary)
    return final


def _check_sizes(tp_size: int, ranks: int) -> None:
    problems = []
    if tp_size < 1:
        problems.append(Problem("tp_size", f"given {tp_size}", "1 and above"))
    elif ranks < 1 or ranks % tp_size:
        problems.append(Problem("ranks", f"given {ranks}", f"a multiple of tp_size {tp_size}"))
    if problems:
        raise ConfigError(problems)


def _check_model(model: Mapping[str, Any], tp_size: int) -> None:
    problems = [
        Problem("tp_size", f"given {tp_size}", f"a divisor of {key}, which is {model[key]}")
        for key in _CUT
        if model[key] % tp_size
    ]
    heads = model["num_kv_heads"]
    if heads % tp_size and tp_size % heads:
        allowed = f"a divisor or a multiple of num_kv_heads, which is {heads}"
        problems.append(Problem("tp_size", f"given {tp_size}", allowed))
    if problems:
        raise ConfigError(problems)


def _check_space(directory: Path, needed: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(f"{needed:,} bytes are needed, {free:,} are free")


def _stored_bytes(parameters: list[Parameter], tp_size: int) -> int:
    copies = (1 if one.tp_dim is not None else tp_size for one in parameters)
    return sum(one.nbytes * count for one, count in zip(parameters, copies, strict=True))


def _in_order(found: Iterator[Parameter], cut_dim: Callable[[str], int | None]) -> list[Parameter]:
    """By kind in the model's order, each with the dim that tensor parallelism cuts."""

    def place(parameter: Parameter) -> tuple[Any, ...]:
        parts = re.split(r"(\d+)", parameter.name)
        first = ("embedding", "layers", "final_norm", "head")
        begin = parameter.name.partition(".")[0]
        number = int(parts[1]) if begin == "layers" else 0
        return (first.index(begin) if begin in first else len(first), number, parameter.name)

    return [replace(one, tp_dim=cut_dim(one.name)) for one in sorted(found, key=place)]


def _write(
    reader: CheckpointReader,
    parameters: list[Parameter],
    cuts: list[int],
    temporary: Path,
    tp_size: int,
    ranks: int,
    progress: Callable[[int, int], None],
) -> None:
    def read(fragment: Fragment) -> torch.Tensor:
        values = torch.empty(fragment.numel, dtype=fragment.tensor.dtype)
        reader.fill(replace(fragment, tensor=values))
        return values

    for rank in range(ranks):
        progress(rank, ranks)
        part, tp_rank = divmod(rank, tp_size)
        slices = list(_slices(parameters, cuts, tp_rank, tp_size))
        fragments = list(_fragments(slices, part, ranks // tp_size))
        write_rank(temporary, fragments, rank, ranks, threading.Event(), read)


def _slices(
    parameters: list[Parameter], cuts: list[int], tp_rank: int, tp_size: int
) -> Iterator[tuple[Parameter, int, int]]:
    """What one tensor rank writes: parameters with the slice's number and their number of slices.

    Of several ranks with the same slice the first one writes it.
    """
    for one, parts in zip(parameters, cuts, strict=True):
        if one.tp_dim is None:
            yield one, tp_rank, tp_size
            continue
        index, replica = divmod(tp_rank, tp_size // parts)
        if replica == 0:
            yield one, index, parts


def _fragments(
    slices: list[tuple[Parameter, int, int]], part: int, parts: int
) -> Iterator[Fragment]:
    """What one rank gets: part `part` of `parts` of each kind's slices, without their content."""
    for kind in dict.fromkeys(one.kind for one, _, _ in slices):
        mine = [(one, index, count) for one, index, count in slices if one.kind == kind]
        shapes = [
            slice_shape(one.global_shape, one.tp_dim, count, index) for one, index, count in mine
        ]
        sizes = [math.prod(shape) for shape in shapes]
        total, begin = sum(sizes), 0
        low, high = total * part // parts, total * (part + 1) // parts
        for (one, index, count), size in zip(mine, sizes, strict=True):
            start, stop = max(low - begin, 0), min(high - begin, size)
            begin += size
            if start < stop:
                nothing = torch.empty(stop - start, dtype=one.dtype, device="meta")
                cut = (one.tp_dim, index, count, start)
                yield Fragment(one.name, kind, one.global_shape, *cut, nothing)
