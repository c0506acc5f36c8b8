"""Continue a Hugging Face Llama on two new languages, with replay of a stand-in and without.

    python examples/continue_llama/start.py [--fresh]

Four steps: the quick start's corpora, with one half of the English text as "the old corpus" and the
other as what stands in for it; a small Llama that is trained on the old half and exported as a
Hugging Face folder; that folder continued on French and German, once with replay and once without;
and a table of what each has learned and forgotten. Started again it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path("examples/continue_llama")
TARGET = Path("build/continue_llama")
RUNS = Path("runs/continue_llama")
FOLDER = RUNS / "base/hf/step_000000300_en"
TOKENIZER = Path("build/quickstart/tokenizer.model")
ENGLISH = Path("build/quickstart/corpus/en/train-00000.jsonl.gz")
HALVES = ("old", "stand_in")


class StageError(Exception):
    """A program failed; it has said why."""


def split(fresh: bool) -> None:
    """Write every other document of the English corpus into each half, and tokenize both."""
    (ROOT / TARGET).mkdir(parents=True, exist_ok=True)
    with gzip.open(ROOT / ENGLISH) as file:
        lines = file.readlines()
    for place, half in enumerate(HALVES):
        prefix = TARGET / half
        if (ROOT / f"{prefix}.json").exists() and not fresh:
            continue
        (ROOT / f"{prefix}.jsonl").write_bytes(b"".join(lines[place::2]))
        call("tools/preprocess_data.py", "--input", f"{prefix}.jsonl", "--output-prefix", prefix,
             "--tokenizer", f"sentencepiece:{TOKENIZER}", "--overwrite")  # fmt: skip


def train(config: str, fresh: bool, *options: str) -> None:
    """Train in one process, from the newest checkpoint if there is one."""
    call("pretrain_llama_mer.py", "--config", HERE / config, *options, *["--fresh"] * fresh)


def call(program: str, *arguments: str | Path) -> None:
    """Run a program of the project and show it.

    Raises:
        StageError: it failed.
    """
    command = [program, *map(str, arguments)]
    print(f"   python {' '.join(command)}", flush=True)
    settings = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    settings |= {} if Path("/dev/nvidia0").exists() else {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env={**settings, **os.environ}, check=False
    )
    if done.returncode:
        raise StageError(f"exit code {done.returncode} of: python {' '.join(command)}")


def table() -> Iterable[str]:
    """Held-out loss of each language: of the folder, and of both runs at their end."""
    begun, ends = {}, {}
    for run in ("replay", "plain"):
        lines = (ROOT / RUNS / run / "evaluations.jsonl").read_text().splitlines()
        evaluations = [json.loads(line)["losses"] for line in lines]
        begun, ends[run] = evaluations[0], evaluations[-1]
    yield f"{'nats a token':<14}{'the folder':>12}{'with replay':>13}{'plain':>9}"
    for name, loss in begun.items():
        yield f"{name:<14}{loss:>12.3f}{ends['replay'][name]:>13.3f}{ends['plain'][name]:>9.3f}"
    forgotten = {run: losses["en"] - begun["en"] for run, losses in ends.items()}
    yield (
        f"of English forgotten: {forgotten['replay']:+.3f} with replay, {forgotten['plain']:+.3f} "
        "without"
    )


def main() -> int:
    """Do all of it, and give the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--fresh", action="store_true", help="begin anew: data and training")
    fresh = parser.parse_args().fresh
    try:
        print("== The corpora", flush=True)
        call("examples/quickstart/prepare.py")
        split(fresh)
        print("== Somebody's Llama, in English", flush=True)
        train("base.yaml", fresh)
        print("== It goes on with French and German, with replay", flush=True)
        folder = ("--model.from_hf", str(FOLDER))
        train("continued.yaml", fresh, *folder)
        print("== ... and without", flush=True)
        plain = ("--replay", "null", "--output_dir", str(RUNS / "plain"))
        train("continued.yaml", fresh, *folder, *plain)
    except StageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(table()))
    print(f"pages of both: python tools/report.py {RUNS}/replay {RUNS}/plain")
    print(f"for Hugging Face: {RUNS}/replay/hf")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
