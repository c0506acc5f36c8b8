"""What the ranks of the memory tests run; loaded by path in each rank."""

import os
from collections import Counter

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Adds up, after each operation, the bytes of all storages that tensors still hold.

    Storages are watched, not counted: what a thread of the communication library frees, which no
    profiler of this thread sees, is gone here too. What lies inside an operation is not seen.
    """

    def __init__(self):
        super().__init__()
        self.peak = 0
        self.at_peak = Counter()
        self.where = ""
        self.phase = "build"
        self._live = {}
        self._seen = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        fresh = False
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                storage = leaf.untyped_storage()
                # A later storage may lie at an earlier one's address.
                held = self._live.get(storage._cdata)
                if held is None or held[0].expired() or held[1] != storage.nbytes():
                    self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                    self._seen += storage.nbytes()
                    fresh = True
        # Most new storages cannot make a new peak, even if nothing has gone meanwhile.
        if fresh and self._seen > self.peak:
            self._count(str(function))
        return result

    def _count(self, name):
        self._live = {key: one for key, one in self._live.items() if not one[0].expired()}
        held = self._seen = sum(size for _, size in self._live.values())
        if held > self.peak:
            self.peak, self.where = held, f"{self.phase}: {name}"
            self.at_peak = Counter(size for _, size in self._live.values())


def batch(config, layout):
    """One data-parallel rank's share of a batch, of random tokens."""
    import numpy as np

    from megatron_mer.data.batches import MicroBatch, RankBatch

    rows, length = config.batch.micro_batch_size, config.model.seq_length
    count = config.batch.global_batch_size // (rows * layout.dp_size)
    draw = np.random.default_rng(1).integers(0, config.model.vocab_size, (rows, length + 1))
    micro = MicroBatch(
        inputs=draw[:, :-1].copy(),
        targets=draw[:, 1:].copy(),
        mask=np.ones((rows, length), np.float32),
        is_replay=np.zeros(rows, bool),
    )
    tokens = config.batch.global_batch_size * length
    return RankBatch(batch=0, micro_batches=[micro] * count, num_unmasked=tokens)


def train(config, layout, live):
    """What a run holds and does: engine, Reptile, its place for a checkpoint, steps."""
    from megatron_mer.checkpoint.snapshot import Snapshot
    from megatron_mer.continual.reptile import Reptile
    from megatron_mer.engine.training_engine import TrainingEngine

    engine = TrainingEngine(config, layout, int(os.environ["RANK"]))
    reptile = Reptile(config.reptile, engine.masters) if config.reptile else None
    extra = reptile.tensors() if reptile else {}
    place = Snapshot(engine.checkpoint_bytes(extra))
    data = batch(config, layout) if engine.reads_data else None
    for step in range(2):
        live.phase = f"step {step}"
        engine.train_step(data, 1.0e-3)
        live.phase = f"after {step}"
        if reptile:
            reptile.after_update()
        place.take(engine.fragments(extra))


def peak(arguments, world_size):
    """Bytes of tensors that were live at most, in building an engine and in two steps.

    The second step has the moments that the first one made.
    """
    from megatron_mer.config import load_config
    from megatron_mer.engine.distributed import start_distributed
    from megatron_mer.parallel import Layout

    torch.set_num_threads(1)
    config = load_config(arguments[0], arguments[1:])
    layout = Layout.of(config.parallel, world_size)
    start_distributed()
    with LiveBytes() as live:
        train(config, layout, live)
    large = sorted(live.at_peak.items(), key=lambda one: -one[0] * one[1])[:25]
    return {"peak": live.peak, "where": live.where, "large": large}
