#!/usr/bin/env python3
"""Convert checkpoints.

    python tools/convert_checkpoint.py from-hf models/base --output runs/base
    python tools/convert_checkpoint.py to-hf runs/mine@300 --output models/mine --weights anchor
    python tools/convert_checkpoint.py reshard runs/mine DEST --tp-size 4 --ranks 64

from-hf: a Hugging Face folder of a Llama becomes weights to start from (checkpoint.init_from:
runs/base@0), at any layout, with a vocabulary that --tokenizer may extend. A run that needs no new
vocabulary can also start from the folder as it is (model.from_hf).
to-hf: a checkpoint becomes such a folder, with its tokenizer. Both read one tensor at a time, and
then compare the logits with those of transformers, which loads its whole model (--no-check).
reshard: rewrite one checkpoint for another layout, in one process with little memory. A run loads
any checkpoint at any layout as it is; a resharded one spares many ranks the reading across files.

Nothing is read but safetensors. The source stays as it is. See docs/huggingface.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_mer.checkpoint import damaged
from megatron_mer.checkpoint.find import find_latest
from megatron_mer.checkpoint.huggingface import (
    KEPT,
    KINDS,
    TORCH_NAMES,
    Exported,
    HuggingFaceFolder,
    HuggingFaceReader,
    LogitsCheck,
    TokenizerFiles,
    compare_logits,
    have_transformers,
    import_weights,
    keep_files,
    kept_tokenizer,
)
from megatron_mer.checkpoint.layout import LATEST, step_name
from megatron_mer.checkpoint.reshard import reshard
from megatron_mer.command import run_tool
from megatron_mer.config import load_config
from megatron_mer.data.tokenizers import load_tokenizer
from megatron_mer.engine.tensor_plan import cut_dim, num_slices
from megatron_mer.errors import CheckpointError, ConfigError, MegatronMerError, Problem
from megatron_mer.log import setup_logging
from megatron_mer.training.from_hf import foreign_model, imported_state, rows_for, tokenizer_of

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    own = commands.add_parser("reshard", help="another layout", allow_abbrev=False)
    own.set_defaults(work=convert)
    add = own.add_argument
    add("source", metavar="SOURCE", type=Path, help="a checkpoint, or a run: its newest one")
    add("dest", metavar="DEST", type=Path, help="folder that gets step_NUMBER and latest")
    add("--tp-size", type=int, required=True, metavar="T", help="tensor-parallel ranks")
    add("--ranks", type=int, metavar="N", help="all ranks, a multiple of T (default: T)")
    _from_hf_arguments(commands.add_parser("from-hf", help="from Hugging Face", allow_abbrev=False))
    _to_hf_arguments(commands.add_parser("to-hf", help="to Hugging Face", allow_abbrev=False))
    return parser.parse_args(arguments)


def _from_hf_arguments(own: argparse.ArgumentParser) -> None:
    own.set_defaults(work=from_hf)
    add = own.add_argument
    add("source", metavar="PATH", type=Path, help="folder with config.json and *.safetensors")
    add("--output", required=True, metavar="DIR", type=Path, help="gets checkpoints/step_000000000")
    text = "KIND:PATH, a tokenizer that extends the folder's; default: the folder's own"
    add("--tokenizer", metavar="SPEC", help=text)
    add("--no-check", action="store_true", help="leave out the comparison with transformers")


def _to_hf_arguments(own: argparse.ArgumentParser) -> None:
    own.set_defaults(work=to_hf)
    add = own.add_argument
    add("source", metavar="RUN[@STEP]", help="a run, its newest checkpoint or the one of a step")
    add("--output", required=True, metavar="DIR", type=Path, help="the folder, which is not there")
    add("--weights", choices=list(KINDS), default="fast", help="default fast")
    text = "default: that of the folder that the run began with, else the run's precision"
    add("--dtype", choices=list(TORCH_NAMES), help=text)
    add("--shard-size", type=_bytes, default="5G", metavar="N", help="bytes a file; default 5G")
    add("--tokenizer", metavar="SPEC", help="KIND:PATH; default: the run's")
    add("--no-check", action="store_true", help="leave out the comparison with transformers")


def _bytes(text: str) -> int:
    match = re.fullmatch(r"([1-9][0-9]*)([KMG]?)B?", text.upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"given {text}; allowed: bytes, as 500M or 5G")
    return int(match[1]) * _UNITS[match[2]]


def find_source(path: Path) -> Path:
    """The checkpoint that is meant.

    Raises:
        ConfigError: there is none.
        CheckpointError: a run has some, but none is whole.
    """
    if path.name.startswith("step_") and path.is_dir():
        return path
    inside = path / "checkpoints"
    info = find_latest(inside if inside.is_dir() else path)
    if info is None:
        why = "holds no checkpoint" if path.exists() else "does not exist"
        allowed = "the output_dir of a run, its folder checkpoints, or a step_NUMBER in there"
        raise ConfigError([Problem("SOURCE", f"given {path}, which {why}", allowed)])
    return info.path


def _find_step(text: str) -> Path:
    """The checkpoint of RUN or RUN@STEP.

    Raises:
        ConfigError, CheckpointError: as `find_source`; or there is no such step.
    """
    place, at, step = text.rpartition("@")
    if not at or not step.isdecimal() or Path(text).is_dir():
        return find_source(Path(text))
    path = Path(place) / "checkpoints" / step_name(int(step))
    if not path.is_dir():
        there = ", ".join(sorted(one.name for one in path.parent.glob("step_*")))
        raise ConfigError([Problem("RUN@STEP", f"given {text}: no {path.name}", there or place)])
    return path


def convert(options: argparse.Namespace) -> None:
    """Do what the command line says of another layout."""
    source = find_source(options.source)
    ranks = options.tp_size if options.ranks is None else options.ranks
    final = reshard(source, options.dest, options.tp_size, ranks, cut_dim, num_slices, show)
    print(f"{final}: tp_size {options.tp_size}, {ranks} ranks, from {source}")


def from_hf(options: argparse.Namespace) -> None:
    """Make a folder of Hugging Face weights to start from."""
    _require_transformers(options.no_check)
    if options.output.resolve() == options.source.resolve():
        given = f"given {options.output}, the folder itself, which stays as it is"
        raise ConfigError([Problem("--output", given, "another folder")])
    folder = HuggingFaceFolder(options.source)
    folder.check()
    tokenizer = tokenizer_of(options.tokenizer, folder.path)
    vocabulary = rows_for(folder, tokenizer, options.tokenizer)
    reader = HuggingFaceReader(folder, vocabulary)
    reader.check_tied()
    model = foreign_model(folder, vocabulary.rows)
    state = imported_state(model, tokenizer.fingerprint, folder.path.absolute())
    final = import_weights(reader, options.output / "checkpoints", state)
    own = TokenizerFiles.inside(folder.path)
    files = TokenizerFiles.of(options.tokenizer) if options.tokenizer else own
    keep_files(folder, options.output / KEPT, files)
    new = f", {len(vocabulary.sources)} of them new" if vocabulary.sources else ""
    print(f"{final}: {vocabulary.rows} rows of the vocabulary{new}, from {folder.path}")
    if not options.no_check:
        whole = Exported.of(final, "fast", "fp32")
        rows = min(vocabulary.known, folder.rows)
        with _removed_if_wrong(final, final.with_name(LATEST), options.output / KEPT):
            _require(compare_logits(model, whole.read, folder.path, rows))
    print(f"start from it with checkpoint.init_from: {options.output}@0, this tokenizer and this")
    print("model, with a seq_length of yours:")
    print(f"tokenizer: {options.tokenizer or f'{tokenizer.kind}:{tokenizer.path}'}")
    print("model: " + json.dumps({**folder.keys, "vocab_size": vocabulary.rows}))


def to_hf(options: argparse.Namespace) -> None:
    """Make a folder of Hugging Face of a checkpoint."""
    _require_transformers(options.no_check)
    if options.output.exists():
        raise ConfigError([Problem("--output", f"given {options.output}, which is there already")])
    source = _find_step(options.source)
    if problem := damaged(source):
        raise CheckpointError(f"the checkpoint is not whole: {problem}")
    exported = Exported.of(source, options.weights, options.dtype)
    if options.tokenizer:
        _check_tokenizer(options.tokenizer, exported)
    files, eod_id = _run_tokenizer(source, options.tokenizer)
    try:
        exported.write(options.output, files, eod_id, options.shard_size)
    except OSError as error:
        text = f"{options.output} was not written ({error}); check the space and the rights there"
        raise CheckpointError(text) from error
    print(f"{options.output}: {options.weights} weights of {source}, {exported.dtype}")
    if files is None:
        print("no tokenizer is included: that of the run was not found; name it with --tokenizer")
    if not options.no_check:
        rows = int(exported.model.vocab_size or 0)
        with _removed_if_wrong(options.output):
            _require(compare_logits(exported.model, exported.read, options.output, rows))


def _run_tokenizer(source: Path, spec: str | None) -> tuple[TokenizerFiles | None, int | None]:
    """The files of the tokenizer of a checkpoint's run, and the id that ends its texts."""
    if spec is None and (kept := kept_tokenizer(source)) is not None:
        return kept, None
    try:
        spec = spec or load_config(source.parent.parent / "config.yaml").tokenizer
        return TokenizerFiles.of(spec), load_tokenizer(spec).eod_id
    except MegatronMerError:
        if spec is None or not (source.parent.parent / "config.yaml").exists():
            return None, None
        raise


def _check_tokenizer(spec: str, exported: Exported) -> None:
    """A tokenizer that the user names is the run's, or its ids have rows at least.

    Raises:
        ConfigError: some have none.
    """
    tokenizer, rows = load_tokenizer(spec), int(exported.model.vocab_size or 0)
    if tokenizer.vocab_size > rows:
        given = f"given {spec}, with {tokenizer.vocab_size} ids; the model has {rows} rows"
        raise ConfigError([Problem("--tokenizer", given, "the tokenizer that the run was given")])
    if tokenizer.fingerprint != exported.info.run_state["settings"]["tokenizer"]:
        text = "warning: %s is not the file that the run was given; are its ids the same?"
        print(text % spec, file=sys.stderr)


@contextlib.contextmanager
def _removed_if_wrong(*written: Path) -> Iterator[None]:
    """What does not prove right must not be taken for a model."""
    try:
        yield
    except Exception:
        for path in written:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        print(f"{written[0]} is removed again", file=sys.stderr)
        raise


def _require(check: LogitsCheck) -> None:
    print(check)
    check.require()


def _require_transformers(no_check: bool) -> None:
    if not no_check and not have_transformers():
        given = "the package transformers is not installed, so that logits cannot be compared"
        remedy = "pip install transformers, or --no-check to convert without the comparison"
        raise ConfigError([Problem("transformers", given, remedy=remedy)])


def show(rank: int, ranks: int) -> None:
    """Say how far it is, where somebody watches."""
    if sys.stderr.isatty():
        end = "\n" if rank + 1 == ranks else ""
        print(f"\rwriting rank {rank + 1} of {ranks}", end=end, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    options = parse_arguments(arguments)
    setup_logging(0)
    return run_tool(lambda: options.work(options))


if __name__ == "__main__":
    sys.exit(main())
