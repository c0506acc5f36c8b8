"""One process that trains a Llama and says how long its steps take: ours, or a plain loop.

    python benchmarks/parts/step_programs.py '{"program": "ours", "size": "llama-1m", ...}'

Reads commands from standard input, a line each, and answers each with a line of JSON: `step`,
`profile`, `reptile`, `rest`. So several of them can take turns, and each has a memory of its own.
With RANK and WORLD_SIZE in the environment several processes are one program.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.parts.step_case import LR, TASKS, Case


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], Any]) -> float:
    """Wall time, the GPU's work included."""
    synchronise()
    begin = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - begin


def peak_gib() -> float:
    """Peak memory: of the GPU's tensors, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30


class Ours:
    """The run's own step: loader with replay, engine, Reptile, the line of metrics."""

    def __init__(self, case: Case, folder: str) -> None:
        from megatron_mer.continual.plan import Plan
        from megatron_mer.continual.reptile import Reptile
        from megatron_mer.continual.spec import DatasetSpec, EntrySpec, PlanSpec, ReplaySpec
        from megatron_mer.data.indexed_dataset import IndexedDataset
        from megatron_mer.data.loader import TrainLoader
        from megatron_mer.engine.distributed import start_distributed
        from megatron_mer.engine.training_engine import TrainingEngine
        from megatron_mer.launch.environment import rank_environment
        from megatron_mer.parallel import Layout
        from megatron_mer.training.outputs import RunDirectory
        from megatron_mer.training.sources import SourceLosses

        config = case.run(folder)
        environment = rank_environment(os.environ)
        environment.export(os.environ)
        start_distributed()
        layout = Layout.of(config.parallel, environment.world_size)
        self.engine = TrainingEngine(config, layout, environment.rank)
        assert config.reptile is not None
        self.reptile = Reptile(config.reptile, self.engine.masters)
        names = [f"task{task}" for task in range(TASKS)]
        tokens = max(4 * case.rows * (case.seq_length + 1), 100_000)
        for task, name in enumerate(names):
            _write(Path(folder) / name, task, tokens, case)
        datasets = {name: IndexedDataset(f"{folder}/{name}") for name in names}
        samples = (tokens - 1) // case.seq_length
        entries = tuple(
            EntrySpec(name, (DatasetSpec(name, samples),), steps=10**5, max_epochs=1e9)
            for name in names
        )
        self.plan = Plan(
            PlanSpec(1, case.rows, case.seq_length, ReplaySpec(Decimal("0.25")), entries)
        )
        self.batch = 10**5  # the second task: there is something to replay
        self.loader = TrainLoader(
            plan=self.plan,
            datasets=datasets,
            seq_length=case.seq_length,
            vocab_size=case.vocab,
            dp_rank=self.engine.coordinate.data,
            dp_size=layout.dp_size,
            micro_batch_size=case.micro,
            first_batch=self.batch,
            keep_rows=True,
        )
        self.sources = SourceLosses(self.plan)
        self.outputs = RunDirectory(config.output_dir)
        Path(config.output_dir).mkdir(exist_ok=True)

    def step(self) -> float:
        """One batch, and what the loop does after it."""
        data = next(self.loader)
        outcome = self.engine.train_step(data if self.engine.reads_data else None, LR)
        self.reptile.after_update()
        self.log(data.rows, outcome)
        return outcome.loss

    def log(self, rows: Any, outcome: Any) -> None:
        """The line of metrics."""
        self.outputs.append_metrics(
            {
                "loss": outcome.loss,
                "grad_norm": outcome.grad_norm,
                "kinds": self.sources.by_kind(rows, outcome.rows),
                "loss_by_task": self.sources.by_task(rows, outcome.rows),
            }
        )

    def rest(self, repetitions: int = 50) -> dict[str, float]:
        """Seconds a batch of what is no arithmetic: planning and reading it, and its metrics."""
        reads, logs = [], []
        data = next(self.loader)
        outcome = self.engine.train_step(data, LR)
        for number in range(repetitions):
            batch = self.batch + 1000 + number
            reads.append(seconds_of(lambda: self.loader.read(batch)))  # noqa: B023
            logs.append(seconds_of(lambda: self.log(data.rows, outcome)))
        return {"read": float(np.median(reads)), "log": float(np.median(logs))}

    def reptile_update(self, repetitions: int = 7) -> dict[str, float]:
        """Seconds of an update beside a copy of the bytes that it touches, and of publishing."""
        reptile, masters = self.reptile, self.engine.masters
        weights = sum(anchor.numel() for anchor in reptile.anchor)
        # Masters and anchor are read and written in fp32, the last delta in bf16.
        touched = weights * (4 + 4 + 2)
        source = torch.ones(touched, dtype=torch.uint8, device=reptile.anchor[0].device)
        target = torch.zeros_like(source)
        found: dict[str, list[float]] = {"update": [], "copy": [], "publish": []}
        for _ in range(repetitions + 1):
            found["copy"].append(seconds_of(lambda: target.copy_(source)))
            found["publish"].append(seconds_of(masters.publish))
            reptile.updates_since = reptile.config.k - 1
            found["update"].append(seconds_of(reptile.after_update))
        return {name: float(np.median(times[1:])) for name, times in found.items()}

    def profile(self, steps: int = 3) -> dict[str, float]:
        """Milliseconds a step of each part, from torch.profiler; waiting counts."""
        from torch.profiler import ProfilerActivity, profile, record_function

        _mark(self.engine, record_function)
        own = {"data": self.loader.__next__, "reptile": self.reptile.after_update}
        self.step()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(steps):
                with record_function("part: step"):
                    with record_function("part: data"):
                        data = own["data"]()
                    outcome = self.engine.train_step(data if self.engine.reads_data else None, LR)
                    with record_function("part: reptile"):
                        own["reptile"]()
                    with record_function("part: metrics"):
                        self.log(data.rows, outcome)
        found: dict[str, float] = {}
        for event in profiler.key_averages():
            if event.key.startswith("part: "):
                found[event.key[6:]] = event.cpu_time_total / steps / 1e3
            elif event.key.startswith("c10d::"):
                what = "communication (in the parts above)"
                found[what] = found.get(what, 0.0) + event.cpu_time_total / steps / 1e3
        return found


def _mark(engine: Any, record_function: Any) -> None:
    """Name what DeepSpeed's schedule does, and the loss inside of the forward pass."""
    pipeline = engine._engine
    named = {
        "LoadMicroBatch": "data to the device",
        "ForwardPass": "forward",
        "BackwardPass": "backward",
        "ReduceTiedGrads": "reduce gradients",
        "ReduceGrads": "reduce gradients",
        "OptimizerStep": "optimizer",
    }

    def marked(method: Any, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            with record_function(f"part: {name}"):
                return method(*arguments, **options)

        return call

    pipeline._INSTRUCTION_MAP = {
        instruction: marked(method, named.get(instruction.__name__, "pipeline messages"))
        for instruction, method in pipeline._INSTRUCTION_MAP.items()
    }
    loss = pipeline.module.loss_fn
    pipeline.module.loss_fn = marked(
        loss, "of forward: loss (with the head's gradients if chunked)"
    )


def _write(prefix: Path, seed: int, tokens: int, case: Case) -> None:
    from megatron_mer.data.indexed_writer import IndexedDatasetWriter

    if prefix.with_suffix(".idx").exists():  # another rank wrote it
        return
    dtype = np.uint16 if case.vocab <= 65_536 else np.int32
    draw = np.random.default_rng(seed).integers(0, case.vocab, tokens)
    writer = IndexedDatasetWriter(prefix, dtype)
    writer.add_document(draw.astype(dtype))
    writer.finalize()


class Plain:
    """A loop as one writes it: transformers' Llama, AdamW, micro batches, a clipped norm."""

    def __init__(self, case: Case) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        model, self.case = case.model(), case
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config = LlamaConfig(
            vocab_size=case.vocab,
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads,
            num_key_value_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            max_position_embeddings=case.seq_length,
            tie_word_embeddings=model.tie_embeddings,
            rms_norm_eps=model.norm_eps,
            use_cache=False,
            attn_implementation="sdpa",
        )
        torch.manual_seed(1)
        self.model = LlamaForCausalLM(config).to(self.device).train()
        if case.recompute:
            self.model.gradient_checkpointing_enable()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        self.forward = torch.compile(self.model) if case.program == "compiled" else self.model
        draw = np.random.default_rng(0).integers(0, case.vocab, (case.rows, case.seq_length + 1))
        self.ids = torch.from_numpy(draw)

    def step(self) -> float:
        """One batch."""
        case, total = self.case, torch.zeros((), device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        for start in range(0, case.rows, case.micro):
            ids = self.ids[start : start + case.micro].to(self.device, non_blocking=True)
            total += self._micro_batch(ids[:, :-1], ids[:, 1:].contiguous())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return float(total)

    def _micro_batch(self, inputs: Tensor, targets: Tensor) -> Tensor:
        bf16 = self.case.precision == "bf16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
            logits = self.forward(input_ids=inputs).logits
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten()
        ) * (self.case.micro / self.case.rows)
        loss.backward()
        return loss.detach()


def serve(case: Case, folder: str) -> None:
    """Answer commands until there are none."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print
    torch.set_num_threads(case.threads)
    program: Any = Ours(case, folder) if case.program == "ours" else Plain(case)
    parameters = _parameters(program)
    answers.write(json.dumps({"ready": True, "parameters": parameters}) + "\n")
    for line in sys.stdin:
        answers.write(json.dumps(_answer(program, line.strip())) + "\n")


def _parameters(program: Any) -> int:
    if isinstance(program, Ours):
        return sum(parameter.numel() for parameter in program.engine._names)
    return sum(parameter.numel() for parameter in program.model.parameters())


def _answer(program: Any, command: str) -> dict[str, Any]:
    if command == "step":
        losses: list[float] = []
        begin = time.process_time()
        seconds = seconds_of(lambda: losses.append(program.step()))
        used = time.process_time() - begin
        return {"seconds": seconds, "cpu": used, "loss": losses[0], "peak_gib": peak_gib()}
    work = {"profile": "profile", "reptile": "reptile_update", "rest": "rest"}[command]
    result: dict[str, Any] = getattr(program, work)()
    return result


def main() -> None:
    """Read the case and serve."""
    case = Case(**json.loads(sys.argv[1]))
    if "WORLD_SIZE" in os.environ:
        case = replace(case, threads=max(1, case.threads // int(os.environ["WORLD_SIZE"])))
    with tempfile.TemporaryDirectory() as folder:
        serve(case, folder)


if __name__ == "__main__":
    main()
