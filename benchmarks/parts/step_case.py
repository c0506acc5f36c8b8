"""What the programs of a step's benchmarks train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_mer.config import (
    BatchConfig,
    DatasetConfig,
    KernelsConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ReptileConfig,
    RunConfig,
    TaskConfig,
)
from megatron_mer.config.sizes import SIZES

LR = 1.0e-3
EPSILON = 0.5
TASKS = 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained; both sides read it."""

    program: str
    """ours, eager (a plain loop over transformers' Llama) or compiled (the same, compiled)."""
    size: str = "llama-1m"
    layers: int | None = None
    """Fewer layers than the size has, to rehearse."""
    vocab: int = 4096
    seq_length: int = 256
    rows: int = 8
    micro: int = 2
    precision: str = "fp32"
    threads: int = 2
    compile: bool = False
    loss: str = "chunked"
    tp_size: int = 1
    pp_size: int = 1
    recompute: bool = False
    reptile_k: int = 500
    anchor: str = "device"

    def model(self) -> ModelConfig:
        """The shape."""
        given: dict[str, Any] = dict(SIZES[self.size])
        given.setdefault("num_kv_heads", given["num_heads"])
        if self.layers is not None:
            given["num_layers"] = self.layers
        return ModelConfig(**given, vocab_size=self.vocab, seq_length=self.seq_length)

    def run(self, folder: str) -> RunConfig:
        """Our configuration."""
        return RunConfig(
            name="benchmark",
            seed=1,
            precision="bf16" if self.precision == "bf16" else "fp32",
            model=self.model(),
            tokenizer="hf:none",
            parallel=ParallelConfig(
                tp_size=self.tp_size,
                pp_size=self.pp_size,
                activation_checkpointing="full" if self.recompute else "none",
            ),
            kernels=KernelsConfig(
                compile=self.compile, loss="whole" if self.loss == "whole" else "chunked"
            ),
            batch=BatchConfig(global_batch_size=self.rows, micro_batch_size=self.micro),
            optimizer=OptimizerConfig(lr=LR),
            stream=tuple(
                TaskConfig(
                    task=f"task{task}",
                    train=(DatasetConfig(prefix=f"{folder}/task{task}"),),
                    steps=10**6,
                    max_epochs=1e9,
                )
                for task in range(TASKS)
            ),
            reptile=ReptileConfig(
                k=self.reptile_k,
                epsilon=EPSILON,
                anchor="host" if self.anchor == "host" else "device",
            ),
            output_dir=f"{folder}/run",
        )
