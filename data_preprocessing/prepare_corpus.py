r"""Prepare one corpus of a task stream: normalise, drop duplicates, split, shuffle, shard.

Example:
    python data_preprocessing/prepare_corpus.py --input raw/fr-*.jsonl.gz --output corpus/fr \
        --valid-share 0.05

writes corpus/fr/train-00000.jsonl.gz, ..., corpus/fr/valid-00000.jsonl.gz, ... and counts.json.
A document's side depends on its text alone: adding data never moves one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

# A machine that only prepares corpora needs no installed package, no compiler and no torch.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_preprocessing.corpus import SIDES, Settings, prepare_corpus
from data_preprocessing.normalise import UNICODE_FORMS, Normaliser
from megatron_mer.errors import MegatronMerError


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = Settings()
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="JSON lines, plain, gzip or Zstandard",
    )
    add("--output", required=True, metavar="DIRECTORY", help="directory to make")
    add("--text-key", default=defaults.text_key, metavar="KEY", help="default: text")
    add(
        "--valid-share",
        type=float,
        default=defaults.valid_share,
        metavar="SHARE",
        help="share of the documents to hold out, chosen by their hash (default: 0.05)",
    )
    add("--seed", type=int, default=defaults.seed, help="of the order (default: 1)")
    add(
        "--shard-bytes",
        type=int,
        default=defaults.shard_bytes,
        metavar="N",
        help="bytes of text in a shard (default: 256 MiB)",
    )
    add(
        "--unicode-form",
        choices=UNICODE_FORMS,
        default="NFC",
        help="Unicode normalisation (default: NFC)",
    )
    for name, what in (
        ("line-endings", "write every kind of line ending as a newline"),
        ("control-characters", "remove control characters except tab and newline"),
    ):
        flag = argparse.BooleanOptionalAction
        add(f"--{name}", action=flag, default=True, help=f"{what} (default: yes)")
    add("--overwrite", action="store_true", help="replace a corpus made by this program")
    return parser.parse_args(arguments)


def summary(counts: dict[str, Any]) -> str:
    """Return what was read and written, a line each."""
    lines = [
        f"read {counts['documents_read']:,} documents; left out {counts['empty']:,} empty ones and "
        f"{counts['duplicates']:,} duplicates"
    ]
    for name in SIDES:
        side = counts[name]
        lines.append(
            f"{name}: {side['documents']:,} documents, {side['text_bytes']:,} bytes of text, "
            f"{len(side['shards'])} shard(s)"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the program and return its exit code."""
    options = parse_arguments(arguments)
    settings = Settings(
        text_key=options.text_key,
        normaliser=Normaliser(
            options.line_endings, options.control_characters, options.unicode_form
        ),
        valid_share=options.valid_share,
        seed=options.seed,
        shard_bytes=options.shard_bytes,
    )
    try:
        counts = prepare_corpus(options.input, options.output, settings, options.overwrite)
    except MegatronMerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(summary(counts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
