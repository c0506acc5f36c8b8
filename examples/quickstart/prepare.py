"""Make the quick start's data: from five small corpora to a tokenizer and ten tokenized data sets.

    python examples/quickstart/prepare.py [--fresh]

Three kinds of stages, each one command that a user can run on a corpus of their own: split a corpus
by document hash, train one tokenizer on the train parts, tokenize each part. A stage whose command,
program and input are those of last time, and whose output is there, is skipped. Everything lands in
build/quickstart; a stage's output in words is in build/quickstart/logs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path("examples/quickstart/data")
TARGET = Path("build/quickstart")
LANGUAGES = ("en", "fr", "de", "ar", "ja")
PARTS = ("train", "valid")
TOKENIZER = TARGET / "tokenizer.model"
VOCAB_SIZE = 4096
VALID_SHARE = 0.05


class StageError(Exception):
    """A stage failed; the message says how, and shows the end of what it printed."""


@dataclass(frozen=True)
class Stage:
    """One command with the files that it reads and writes (paths relative to the project)."""

    name: str
    command: tuple[str, ...]
    inputs: tuple[Path, ...]
    outputs: tuple[Path, ...]


def build_stages() -> list[Stage]:
    """All stages in the order of their running."""
    splits = [_split_stage(language) for language in LANGUAGES]
    parts = [_tokenize_stage(language, part) for language in LANGUAGES for part in PARTS]
    return [*splits, _tokenizer_stage(), *parts]


def fingerprint(stage: Stage) -> str:
    """A digest of all that the stage's output follows from: command, code and input.

    Contents, not times: a fresh clone gives every file a new time.
    """
    folders = (ROOT / stage.command[0]).parent, ROOT / "megatron_mer" / "data"
    code = sorted(path for folder in folders for path in folder.rglob("*.py"))
    digest = hashlib.sha256(json.dumps(stage.command).encode())
    for path in (*code, *(ROOT / path for path in stage.inputs)):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def run_stage(stage: Stage, *, fresh: bool) -> bool:
    """Run the stage unless its output is there and up to date; says whether it ran.

    Raises:
        StageError: The command failed, or did not write what it should.
    """
    stamp = ROOT / TARGET / "logs" / f"{stage.name.replace(' ', '_')}.json"
    log = stamp.with_suffix(".log")
    stamp.parent.mkdir(parents=True, exist_ok=True)
    wanted = {"command": shlex.join(stage.command), "fingerprint": fingerprint(stage)}
    if not fresh and _read_stamp(stamp) == wanted and not _missing(stage.outputs):
        return False
    stamp.unlink(missing_ok=True)  # until this run has succeeded the output counts for nothing
    with log.open("wb") as output:
        command = [sys.executable, *stage.command]
        code = subprocess.call(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    missing = _missing(stage.outputs)
    if code or missing:
        reason = f"exit code {code}" if code else f"it wrote no {', '.join(map(str, missing))}"
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise StageError(
            f"{stage.name} failed ({reason}): python {shlex.join(stage.command)}\n{tail}"
        )
    stamp.write_text(json.dumps(wanted, indent=1) + "\n")
    return True


def prepare(*, fresh: bool = False) -> None:
    """Run all stages with a line for each that had something to do.

    Raises:
        StageError: A stage failed.
    """
    skipped = 0
    stages = build_stages()
    for stage in stages:
        start = time.monotonic()
        if run_stage(stage, fresh=fresh):
            print(f"   {stage.name:<22} {time.monotonic() - start:5.1f} s", flush=True)
        else:
            skipped += 1
    if skipped:
        print(f"   {skipped} of {len(stages)} stages are up to date in {TARGET}", flush=True)


def _split_stage(language: str) -> Stage:
    """Normalise, drop duplicates, split by document hash, shuffle."""
    source = SOURCE / f"{language}.jsonl.gz"
    command = ["data_preprocessing/prepare_corpus.py", "--input", str(source)]
    command += ["--output", str(TARGET / "corpus" / language)]
    command += ["--valid-share", str(VALID_SHARE), "--overwrite"]
    outputs = tuple(_shard(language, part) for part in PARTS)
    return Stage(f"split {language}", tuple(command), (source,), outputs)


def _tokenizer_stage() -> Stage:
    """One vocabulary for all languages, from the train parts only."""
    inputs = tuple(_shard(language, "train") for language in LANGUAGES)
    command = ["tools/train_tokenizer.py", "--input", *map(str, inputs), "--output", str(TOKENIZER)]
    command += ["--vocab-size", str(VOCAB_SIZE), "--overwrite"]
    return Stage("train tokenizer", tuple(command), inputs, (TOKENIZER,))


def _tokenize_stage(language: str, part: str) -> Stage:
    """Megatron's two files and their sidecar for one part of one language."""
    shard, prefix = _shard(language, part), TARGET / f"{language}_{part}"
    command = ["tools/preprocess_data.py", "--input", str(shard), "--output-prefix", str(prefix)]
    command += ["--tokenizer", f"sentencepiece:{TOKENIZER}", "--overwrite"]
    outputs = tuple(prefix.with_suffix(suffix) for suffix in (".bin", ".idx", ".json"))
    return Stage(f"tokenize {language}_{part}", tuple(command), (shard, TOKENIZER), outputs)


def _shard(language: str, part: str) -> Path:
    """The one shard of a part: these corpora are far below a shard's size."""
    return TARGET / "corpus" / language / f"{part}-00000.jsonl.gz"


def _missing(paths: tuple[Path, ...]) -> list[Path]:
    return [path for path in paths if not (ROOT / path).exists()]


def _read_stamp(stamp: Path) -> object:
    """The stamp's content; None if there is none or it was cut short."""
    try:
        return json.loads(stamp.read_text())
    except (OSError, ValueError):
        return None


def main() -> int:
    """Prepare, and give the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--fresh", action="store_true", help="run every stage again")
    try:
        prepare(fresh=parser.parse_args().fresh)
    except StageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
