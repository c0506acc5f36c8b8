"""Tokens a second, memory, largest micro batch and MFU on one GPU, beside a compiled plain loop.

    python benchmarks/gpu.py [--sizes 99m 560m 1.1b 3.9b] [--minutes 10] [--record]

Each size at 2,048 tokens a row with Llama 3's vocabulary of 128,256, in bf16: our step, with
loader, replay (alpha 0.25), Reptile (an update every five steps), metrics, compiled blocks and the
chunked loss, and a loop over `transformers.LlamaForCausalLM`, compiled, bf16 autocast over fp32
weights with torch's fused AdamW. The micro batch is the largest power of two that
`tools/plan_memory.py` gives room for, halved while the GPU's memory does not suffice; eight micro
batches make a step. One program at a time, each in a process of its own. What does not begin within
the minutes given is not measured.

MFU = tokens/s * (6 N_matmul + 6 L H Dh S) / peak: the output head counts, the embedding and what is
computed again do not, attention counts causally (docs/metrics.md). The peak is that of the GPU's
name, 989.4 TFLOP/s in bf16 for an H200 or H100.

Without a GPU `--toy` rehearses it with the smallest model on the CPU: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.parts.measure import Machine, Sample, headline, markdown, number
from benchmarks.parts.record import output_folder, record_section, write_json
from benchmarks.parts.step_case import Case
from benchmarks.parts.step_workers import Turns, WorkerFailed, take_turns
from megatron_mer.analysis.memory.plan import plan_memory
from megatron_mer.model import Dimensions, flops_per_token, peak_tflops
from megatron_mer.parallel import Layout

SIZES = ("99m", "560m", "1.1b", "3.9b")
FLOORS = {"560m": 0.40, "1.1b": 0.45, "3.9b": 0.50}
"""MFU, at least."""
WANTED = 1.1
"""Our tokens/s by the plain loop's, at least."""
ACCUMULATED = 8
"""Micro batches of a step."""
LARGEST = 32
"""Rows of a micro batch, at most."""
ROOM = 0.9
"""Share of the GPU that the plan may fill: the rest is CUDA's and the allocator's."""
HEAD = ["size", "program", "micro batch", "tokens/s", "MFU", "peak GiB", "by the plain loop"]


@dataclass(frozen=True)
class Found:
    """One program's figures."""

    case: Case
    turns: Turns

    @property
    def rate(self) -> Sample:
        """Tokens a second."""
        return self.turns.sample("it").rate(self.case.rows * self.case.seq_length)


def base_case(size: str, toy: bool) -> Case:
    """Our step at a size."""
    if toy:
        return Case(program="ours", layers=1, vocab=256, seq_length=32, reptile_k=2)
    return Case(
        program="ours",
        size=f"llama-{size}",
        vocab=128_256,
        seq_length=2048,
        precision="bf16",
        compile=True,
        reptile_k=5,
        threads=torch.get_num_threads(),
    )


def planned(case: Case, room: float) -> Case:
    """The case with the largest micro batch that the plan of memory gives room for."""
    for recompute in (False, True):
        micro = LARGEST
        while micro >= 1:
            tried = replace(case, micro=micro, rows=ACCUMULATED * micro, recompute=recompute)
            plan = plan_memory(tried.run("none"), Layout(tp_size=1, pp_size=1, dp_size=1), "cuda")
            if plan[0].peak <= ROOM * room:
                return tried
            micro //= 2
    return replace(case, micro=1, rows=ACCUMULATED, recompute=True)


def measure(case: Case, repetitions: int, log: Path) -> Found:
    """Steps of one program, with smaller micro batches while its memory does not suffice.

    Raises:
        WorkerFailed: it failed for another reason, or with a single row too.
    """
    while True:
        try:
            return Found(case, take_turns({"it": (case, 1)}, repetitions, log))
        except WorkerFailed as error:
            if "out of memory" not in str(error).lower() or case.micro == 1:
                raise
            case = replace(case, micro=case.micro // 2, rows=case.rows // 2)


class Benchmark:
    """All sizes, until the time is over.

    Args:
        sizes: which.
        minutes: after so many nothing new is begun.
        repetitions: steps that count.
        toy: rehearse on the CPU.
        log: file for what the programs print.
    """

    def __init__(
        self, sizes: list[str], minutes: float, repetitions: int, toy: bool, log: Path
    ) -> None:
        self.sizes, self.repetitions, self.toy, self.log = sizes, repetitions, toy, log
        self._end = time.monotonic() + 60 * minutes
        self.found: dict[str, dict[str, Turns]] = {}
        self.name = "" if toy else torch.cuda.get_device_name()
        self._peak = peak_tflops(self.name, "bf16")

    def lines(self) -> Iterator[list[str]]:
        """The rows of the table, one size after another."""
        for size in self.sizes:
            case = base_case(size, self.toy)
            if not self.toy:
                case = planned(case, torch.cuda.get_device_properties(0).total_memory)
            plain_case = replace(case, program="eager" if self.toy else "compiled", compile=False)
            plain = self._measure(size, "plain loop", plain_case)
            ours = self._measure(size, "ours", case)
            yield self._line(size, "ours", ours, plain)
            yield self._line(size, "plain loop, compiled", plain, None)
            yield [size, "torchtitan", *[_without_torchtitan()] * (len(HEAD) - 2)]

    def _measure(self, size: str, name: str, case: Case) -> Found | str:
        if time.monotonic() > self._end:
            return "not measured: no time left"
        try:
            found = measure(case, self.repetitions, self.log)
        except WorkerFailed as error:
            return f"not measured: {str(error).strip().splitlines()[-1][:120]}"
        self.found.setdefault(size, {})[name] = found.turns
        return found

    def _line(
        self, size: str, name: str, found: Found | str, other: Found | str | None
    ) -> list[str]:
        if isinstance(found, str):
            return [size, name, found, *[""] * (len(HEAD) - 3)]
        case, rate = found.case, found.rate
        ratio = ""
        if isinstance(other, Found):
            times = rate.median / other.rate.median
            ratio = f"{times:.2f} / at least {WANTED}{'' if times >= WANTED else ' **missed**'}"
        micro = f"{case.micro}{', recomputing' if case.recompute else ''}"
        memory = number(found.turns.peak_gib["it"])
        return [size, name, micro, str(rate), self._mfu(size, case, rate, name), memory, ratio]

    def _mfu(self, size: str, case: Case, rate: Sample, name: str) -> str:
        if self._peak is None:
            return "peak not known"
        flops = flops_per_token(Dimensions.of(case.model()), case.seq_length)
        share = rate.median * flops / (self._peak * 1e12)
        floor = FLOORS.get(size) if name == "ours" else None
        bound = f" / at least {floor:.0%}{'' if share >= floor else ' **missed**'}" if floor else ""
        return f"{share:.1%}{bound}"


def _without_torchtitan() -> str:
    there = importlib.util.find_spec("torchtitan") is not None
    return "not measured: not driven from here yet" if there else "not measured: not installed"


def main() -> int:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="which")
    parser.add_argument("--minutes", type=float, default=9.0, help="time; default 9")
    parser.add_argument("--repetitions", type=int, default=5, help="steps of each; default 5")
    parser.add_argument("--toy", action="store_true", help="rehearse on the CPU")
    parser.add_argument("--record", action="store_true", help="write benchmarks/RESULTS.md")
    options = parser.parse_args()
    if not options.toy and not torch.cuda.is_available():
        print("not measured: there is no NVIDIA GPU here (--toy rehearses on the CPU)")
        return 2
    machine = Machine(" ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "programs.log"
        bench = Benchmark(options.sizes, options.minutes, options.repetitions, options.toy, log)
        lines = []
        for line in bench.lines():
            print(" | ".join(line), flush=True)
            lines.append(line)
    found = machine.found()
    text = f"{bench.name or 'rehearsal on a CPU'}; {headline(found)}\n\n{markdown(HEAD, lines)}"
    print(f"\n{text}")
    write_json(output_folder(options.record) / "gpu.json", found, sizes=bench.found)
    if options.record:
        record_section("gpu", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
