"""What the ranks of the engine's tests run; loaded by path in each rank."""

from dataclasses import replace

import torch


def build(arguments, world_size):
    """An engine with Reptile, and a function that trains it one batch further."""
    import os

    from megatron_mer.config import load_config
    from megatron_mer.continual.reptile import Reptile
    from megatron_mer.data.loader import TrainLoader
    from megatron_mer.engine.distributed import start_distributed
    from megatron_mer.engine.training_engine import TrainingEngine
    from megatron_mer.parallel import Layout
    from megatron_mer.training.preflight import prepare

    torch.set_num_threads(1)
    prepared = prepare(load_config(arguments[0], arguments[1:]), world_size)
    config = prepared.config
    parallel = config.parallel
    layout = Layout(
        tp_size=parallel.tp_size,
        pp_size=parallel.pp_size,
        dp_size=world_size // (parallel.tp_size * parallel.pp_size),
    )
    start_distributed()
    engine = TrainingEngine(config, layout, int(os.environ["RANK"]))
    loader = TrainLoader(
        plan=prepared.plan,
        datasets=prepared.datasets,
        seq_length=config.model.seq_length,
        vocab_size=config.model.vocab_size,
        dp_rank=engine.coordinate.data,
        dp_size=layout.dp_size,
        micro_batch_size=config.batch.micro_batch_size,
        eod_mask_loss=config.batch.eod_mask_loss,
        first_batch=0,
    )
    return engine, Reptile(config.reptile, engine.masters), loader


def host_reads(arguments, world_size):
    """How often a step asks for a tensor's value, by micro batches: on a GPU each is a wait."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    engine, _, loader = build(arguments, world_size)
    counts = []
    for _ in range(2):
        with Reads() as reads:
            engine.train_step(next(loader), 1.0e-3)
        counts.append(reads.count)
    loader.close()
    return {"micro_batches": engine.num_micro_batches, "reads": counts[1]}


def snapshot(engine):
    """(masters by name, module weights by name), copied."""
    masters = {s.name: s.tensor.clone() for s in engine.masters.shards}
    weights = {name: p.detach().clone() for p, name in engine._names.items()}
    return masters, weights


def rest_after_reptile(arguments, world_size):
    """Train to a Reptile update and make one step of rate 0; say what had moved when."""
    engine, reptile, loader = build(arguments, world_size)
    for _ in range(3):
        engine.train_step(next(loader), 1.0e-3)
        before = snapshot(engine)
        update = reptile.after_update()
    after = snapshot(engine)
    outcome = engine.train_step(next(loader), 0.0)
    rested = snapshot(engine)
    loader.close()
    same = [
        all(torch.equal(a[name], b[name]) for name in a) for a, b in zip(after, rested, strict=True)
    ]
    gap = max(float((before[0][n] - after[0][n]).abs().max()) for n in after[0])
    moved = max(float((before[1][n] - after[1][n]).abs().max()) for n in after[1])
    pieces = all(
        torch.equal(
            after[1][p.name].flatten()[p.start : p.start + p.numel].float(),
            after[0][p.name].bfloat16().float(),
        )
        for p in engine.masters.pieces
    )
    return {
        "updated": update is not None,
        "applied": outcome.applied,
        "masters_rest": same[0],
        "weights_rest": same[1],
        "masters_moved_by_reptile": gap,
        "weights_moved_by_reptile": moved,
        "weights_are_rounded_masters": pieces,
    }


def fp32_start(arguments, world_size):
    """How far the masters lie from the fp32 initial weights, and from their bf16 rounding."""
    from megatron_mer.model import init_parameter

    engine, _, loader = build(arguments, world_size)
    loader.close()
    exact = rounded = 0.0
    for piece, shard in zip(engine.masters.pieces, engine.masters.shards, strict=True):
        config = engine.config
        whole = init_parameter(piece.parameter, piece.name, config.model, config.seed)
        value = whole.flatten()[piece.start : piece.start + piece.numel]
        exact = max(exact, float((shard.tensor - value).abs().max()))
        rounded = max(rounded, float((shard.tensor - value.bfloat16().float()).abs().max()))
    names = sorted(shard.name for shard in engine.masters.shards if shard.counted)
    numel = sum(shard.tensor.numel() for shard in engine.masters.shards if shard.counted)
    return {"exact": exact, "rounded": rounded, "counted": names, "numel": numel}


def rewrite(arguments, world_size, target, source=None):
    """Write a checkpoint of five batches, or of what `source` holds, at this run's layout.

    Says how large the ranks' masters are and whether what is beside the pieces (padding) is zero.
    """
    import threading
    from pathlib import Path

    import torch.distributed as dist

    from megatron_mer.checkpoint import CheckpointReader
    from megatron_mer.checkpoint.save import write_manifest, write_rank

    engine, reptile, loader = build(arguments, world_size)
    if source is None:
        for _ in range(5):
            engine.train_step(next(loader), 1.0e-3)
            reptile.after_update()
    else:
        engine.load(CheckpointReader(source, dist.get_rank()), 5, reptile.tensors())
    loader.close()
    fragments = [
        replace(one, tensor=one.tensor.detach().clone())
        for one in engine.fragments(reptile.tensors())
    ]
    write_rank(Path(target), fragments, dist.get_rank(), world_size, threading.Event())
    dist.barrier()
    if dist.get_rank() == 0:
        write_manifest(Path(target), 5, world_size, b"{}", permanent=False)
    flats = [*engine.masters.flat, *(flat for m in engine.masters.moments().values() for flat in m)]
    rest = [flat.detach().clone() for flat in flats]
    for piece in engine.masters.pieces:
        for start in range(0, len(rest), len(engine.masters.flat)):
            engine.masters.view(rest[start:], piece).zero_()
    return {
        "elements": sum(shard.tensor.numel() for shard in engine.masters.shards),
        "allocated": sum(flat.numel() for flat in engine.masters.flat),
        "padding_is_zero": not any(flat.any() for flat in rest),
    }


def averaged_tied(arguments, world_size):
    """Give every stage's copy of the embedding another delta; say what averaging made of them."""
    from megatron_mer.engine import masters as module

    module.CHUNK = 5000  # pieces begin and end inside of chunks
    engine, _, loader = build(arguments, world_size)
    loader.close()
    masters = engine.masters
    tied = [
        (piece, torch.arange(piece.start, piece.start + piece.numel).float())
        for piece, shard in zip(masters.pieces, masters.shards, strict=True)
        if shard.tied
    ]
    deltas = [places * (1.0 + engine.coordinate.pipe) for _, places in tied]
    masters.average_tied(deltas)
    wanted = [places * 1.5 for _, places in tied]
    return {
        "pieces": len(tied),
        "cuts": [[piece.start, piece.start + piece.numel] for piece, _ in tied],
        "pipe": engine.coordinate.pipe,
        "right": all(torch.equal(a, b) for a, b in zip(deltas, wanted, strict=True)),
    }


def limited(arguments, world_size):
    """Shorten the time limit of every group; rank 1 then comes too late to one collective each."""
    import time

    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    from megatron_mer.engine.distributed import set_time_limit
    from megatron_mer.engine.peers import is_gone

    engine, _, loader = build(arguments, world_size)
    outcome = engine.train_step(next(loader), 1.0e-3)
    loader.close()
    groups = list(distributed_c10d._world.pg_map)
    before = [_limit_of(group) for group in groups]
    set_time_limit(1.0)
    after = [_limit_of(group) for group in groups]
    own = next(group for group in groups if group is not dist.group.WORLD and group.size() > 1)
    seconds, gone = None, None
    if dist.get_rank() == 0:
        begin = time.monotonic()
        try:
            dist.all_reduce(torch.zeros(1), group=own)
        except RuntimeError as error:
            seconds, gone = time.monotonic() - begin, is_gone(error) or str(error)
    else:
        time.sleep(4.0)
    return {
        "applied": outcome.applied,
        "before": before,
        "after": after,
        "seconds": seconds,
        "gone": gone,
    }


def _limit_of(group):
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
