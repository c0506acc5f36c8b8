"""A training step beside a plain transformers loop; what layouts, Reptile and the rest add to it.

    python benchmarks/train_step.py [--only step layouts profile reptile rest bf16] [--record]

step: our step, with loader, replay, Reptile and metrics, in fp32 in one process on all cores, and
the same compiled, beside a plain loop over `transformers.LlamaForCausalLM` with torch's fused
AdamW, eager and compiled. Same model, batch, micro batches and threads; programs take turns, and
each has a process of its own, so that its peak memory is its own.
layouts: two processes (pp 2, tp 2, dp 2) beside one with as many threads in all, and how much a
pipeline of two stages loses to few micro batches, beside (p - 1) / (m + p - 1).
profile: where the time goes, from torch.profiler.
reptile: an update beside a copy of the bytes that it touches and the optimizer's own publishing.
rest: what planning, reading and metrics take of the quick start's step.
bf16: one figure that says whether this processor computes in bf16 at all.

On two cores about 25 minutes: step 15, of which compiling is 3, layouts 5, the others 5 together.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.parts.measure import Machine, Sample, headline, interleaved, markdown, number, timed
from benchmarks.parts.record import output_folder, record_section, write_json
from benchmarks.parts.step_case import Case
from benchmarks.parts.step_workers import Turns, ask_once, take_turns
from megatron_mer.parallel import pipeline_bubble

QUICK_START = Case(program="ours")
M99 = Case(program="ours", size="llama-99m", vocab=32_000, seq_length=512, rows=2, micro=1)
TOY = Case(program="ours", layers=2, vocab=256, seq_length=32, rows=4, micro=1)
WANTED = 1.2
"""Our speed by that of the better plain loop, at least."""
MOST_REPTILE = 1.5
"""A Reptile update by a copy of its bytes and the optimizer's publishing, at most."""
MOST_REST = 0.01
"""Planning, reading and metrics by the quick start's step, at most."""

Parts = dict[str, Any]


class Benchmark:
    """The parts, with what they found.

    Args:
        repetitions: steps that count, of each program.
        toy: rehearse with the smallest model, to see that all of it runs.
        sizes: of the parts that measure several.
        compiled: also measure compiled programs.
        log: file for what the programs print.
    """

    def __init__(
        self, repetitions: int, toy: bool, sizes: list[str], compiled: bool, log: Path
    ) -> None:
        self.repetitions = repetitions
        self.compiled = compiled
        self.log = log
        self.quick = replace(TOY if toy else QUICK_START, threads=torch.get_num_threads())
        large = replace(M99, threads=torch.get_num_threads())
        known = {"quick": ("quick start", self.quick), "99m": ("99M, 32k vocabulary", large)}
        self._sizes = [known["quick"]] if toy else [known[size] for size in sizes]
        self.found: dict[str, Any] = {}

    def step(self) -> Iterator[str]:
        """Ours beside the plain loops."""
        for name, case in self._sizes:
            repetitions = self.repetitions if case == self.quick else max(3, self.repetitions // 4)
            turns = take_turns(self._programs(case), repetitions, self.log)
            self.found[f"step: {name}"] = turns
            peers = [peer for peer in ("eager", "compiled") if peer in turns.seconds]
            better = min(peers, key=lambda peer: turns.sample(peer).median)
            yield _title(name, case)
            yield _step_table(turns, case, better)
            best = max(
                (turns.ratio(own, better).median, own) for own in turns.seconds if own not in peers
            )
            yield (
                f"{best[1]}: {number(best[0])} times the better plain loop ({better}) / at least "
                f"{WANTED}{'' if best[0] >= WANTED else ' **missed**'}"
            )

    def _programs(self, case: Case) -> dict[str, tuple[Case, int]]:
        programs = {
            "ours": case,
            "ours, whole logits": replace(case, loss="whole"),
            "eager": replace(case, program="eager"),
        }
        if self.compiled:
            programs["ours, compiled"] = replace(case, compile=True)
            programs["compiled"] = replace(case, program="compiled")
        return {name: (one, 1) for name, one in programs.items()}

    def layouts(self) -> Iterator[str]:
        """Two processes beside one, and the pipeline's bubble."""
        case = self.quick
        programs = {
            "one process": (case, 1),
            "pp 2": (replace(case, pp_size=2), 2),
            "tp 2": (replace(case, tp_size=2), 2),
            "dp 2": (case, 2),
        }
        turns = take_turns(programs, self.repetitions, self.log)
        self.found["layouts"] = turns
        yield "Two processes beside one, as many threads in all:\n"
        yield _layout_table(turns, case)
        yield "\nPipeline of two stages: time lost to the bubble, measured and by the formula:\n"
        yield self._bubble(case)

    def _bubble(self, case: Case) -> str:
        """A row's time with m micro batches, beside that with the most of them."""
        counts = (2, 4, 8, 32)
        cases = {
            str(m): (replace(case, pp_size=2, rows=m * case.micro, threads=2), 2) for m in counts
        }
        turns = take_turns(cases, self.repetitions, self.log)
        self.found["bubble"] = turns
        row = {m: turns.sample(str(m)).median / m for m in counts}
        # The most micro batches have a bubble too, and all have the optimizer's part beside it.
        most = row[counts[-1]] * (1 - pipeline_bubble(2, counts[-1]))
        lines = [
            [str(m), f"{1 - most / row[m]:.0%}", f"{pipeline_bubble(2, m):.0%}"] for m in counts
        ]
        return markdown(["micro batches", "measured, with the update", "formula"], lines)

    def profile(self) -> Iterator[str]:
        """Where the time goes."""
        for name, case in self._sizes:
            [parts] = ask_once(case, 1, "profile", self.log)
            self.found[f"profile: {name}"] = parts
            whole = parts["step"]
            lines = [
                [what, f"{spent:.1f}", f"{spent / whole:.1%}"]
                for what, spent in sorted(parts.items(), key=lambda one: -one[1])
            ]
            yield _title(name, case)
            yield markdown(["part", "ms a step", "share"], lines)

    def reptile(self) -> Iterator[str]:
        """An update beside a copy."""
        lines = []
        for name, case in self._sizes:
            [one] = ask_once(case, 1, "reptile", self.log)
            self.found[f"reptile: {name}"] = one
            least = one["copy"] + one["publish"]
            ratio = one["update"] / least
            verdict = "" if ratio <= MOST_REPTILE else " **missed**"
            times = [f"{one[key] * 1e3:.2f}" for key in ("update", "copy", "publish")]
            lines.append([name, *times, f"{ratio:.2f} / at most {MOST_REPTILE}{verdict}"])
        head = ["model", "update, ms", "copy of its bytes, ms", "publishing, ms", "ratio / limit"]
        yield markdown(head, lines)

    def rest(self) -> Iterator[str]:
        """What is no arithmetic."""
        turns = take_turns({"ours": (self.quick, 1)}, self.repetitions, self.log)
        [one] = ask_once(self.quick, 1, "rest", self.log)
        step = turns.sample("ours").median
        self.found["rest"] = {**one, "step": step}
        share = (one["read"] + one["log"]) / step
        verdict = "" if share <= MOST_REST else " **missed**"
        yield (
            f"planning and reading a batch {one['read'] * 1e6:.0f} us (in a thread of its own), "
            f"its metrics {one['log'] * 1e6:.0f} us, of a step of {step * 1e3:.1f} ms: "
            f"{share:.2%} / at most {MOST_REST:.0%}{verdict}"
        )

    def bf16(self) -> Iterator[str]:
        """A matrix product in bf16 beside fp32."""
        size = 512
        works: dict[str, Callable[[int], float]] = {}
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            left, right = (torch.randn(size, size).to(dtype) for _ in range(2))
            works[name] = lambda _, a=left, b=right: timed(lambda: a @ b)  # type: ignore[misc]
        found = interleaved(works, 5)
        self.found["bf16"] = found
        slower = found["bf16"].median / found["fp32"].median
        yield (
            f"a product of two matrices of {size} x {size}: bf16 takes {slower:.1f} times as long "
            f"as fp32 here ({torch.backends.cpu.get_cpu_capability()})."
        )
        if slower > 2:
            yield "This processor emulates bf16, so that no step in bf16 is measured on it."


def _title(name: str, case: Case) -> str:
    return (
        f"\n{name}: {case.rows} rows of {case.seq_length} tokens in micro batches of {case.micro}, "
        f"vocabulary {case.vocab:,}, {case.precision}, {case.threads} threads\n"
    )


def _step_table(turns: Turns, case: Case, better: str) -> str:
    tokens = case.rows * case.seq_length
    lines = [
        [
            name,
            str(turns.sample(name).rate(tokens)),
            str(turns.ratio(name, better)),
            str(Sample(tuple(turns.cpu[name])).scaled(1e3)),
            number(turns.peak_gib[name]),
            number(turns.first[name]),
        ]
        for name in turns.seconds
    ]
    head = ["program", "tokens/s", f"by {better}, turn by turn"]
    head += ["processor time, ms a step", "peak GiB", "first step, s"]
    return markdown(head, lines)


def _layout_table(turns: Turns, case: Case) -> str:
    tokens = case.rows * case.seq_length
    lines = [
        [
            name,
            str(turns.sample(name).rate(tokens)),
            str(turns.ratio(name, "one process")),
            number(turns.peak_gib[name]),
        ]
        for name in turns.seconds
    ]
    return markdown(["layout", "tokens/s", "by one process", "peak GiB, all ranks"], lines)


SIZES = ("quick", "99m")
PARTS = ("step", "layouts", "profile", "reptile", "rest", "bf16")


def main() -> int:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES, help="default: both")
    parser.add_argument("--repetitions", type=int, default=20, help="steps of each; default 20")
    parser.add_argument("--no-compile", action="store_true", help="leave compiled programs out")
    parser.add_argument("--toy", action="store_true", help="rehearse with the smallest model")
    parser.add_argument("--record", action="store_true", help="write benchmarks/RESULTS.md")
    options = parser.parse_args()
    command = " ".join(["python", "benchmarks/train_step.py", *sys.argv[1:]])
    machine = Machine(command)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "programs.log"
        bench = Benchmark(
            options.repetitions, options.toy, options.sizes, not options.no_compile, log
        )
        texts = []
        for part in options.only:
            texts.append(f"\n### {part}\n")
            print(texts[-1], flush=True)
            for text in getattr(bench, part)():
                texts.append(text)
                print(text, flush=True)
    found = machine.found()
    print(f"\n{headline(found)}")
    write_json(output_folder(options.record) / "train_step.json", found, parts=bench.found)
    if options.record:
        record_section("train_step", "\n".join([headline(found), *texts]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
