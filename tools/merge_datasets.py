r"""Merge Megatron datasets: the documents of all inputs, one input after the other, in one dataset.

Examples:
    python tools/merge_datasets.py --input data/fr_0 data/fr_1 --output-prefix data/fr
    python tools/merge_datasets.py --input 'shards/fr_*.idx' --output-prefix data/fr --check full
    python tools/merge_datasets.py --input-list shards.txt --output-prefix data/fr

Datasets of any number and size are merged; the memory needed does not grow with them. Documents
stay as they are: those of several sequences, and empty ones. The inputs need the same tokenizer and
the same end-of-document setting; their sidecars (PREFIX.json) say so, and the merged sidecar lists
all of their sources. Every index is checked before anything is written, and the tokens are compared
with the sidecars' checksums while they are copied. Nothing has its final name before it is whole.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections import Counter
from pathlib import Path

# A machine that only prepares corpora needs no installed package, no compiler and no torch.
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from preprocess_data import Stopped, progress_printer, stop

from megatron_mer.data.dataset_merge import DatasetMerge
from megatron_mer.data.prefixes import expand_prefixes, read_prefix_list
from megatron_mer.data.sidecar import Sidecar
from megatron_mer.errors import MegatronMerError


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        default=[],
        metavar="PREFIX",
        help="paths without .bin and .idx (either suffix may stay), or quoted patterns such as "
        "'shards/fr_*.idx', which are taken in alphabetical order",
    )
    add("--input-list", metavar="FILE", help="text file with one prefix or pattern a line")
    add("--output-prefix", required=True, metavar="PREFIX", help="path without .bin and .idx")
    add(
        "--check",
        choices=("open", "full"),
        default="open",
        help="full: read every input once and check it whole, before anything is written "
        "(default: open: sizes and the ends of the index first, the rest on the way)",
    )
    add(
        "--without-sidecar",
        action="store_true",
        help="accept inputs that have no PREFIX.json, and write none: the merged dataset's "
        "tokenizer and checksums are then unknown",
    )
    add("--overwrite", action="store_true", help="replace an existing dataset")
    options = parser.parse_args(arguments)
    if not options.input and options.input_list is None:
        parser.error("name the datasets to merge: --input PREFIX ... or --input-list FILE")
    return options


def merge(options: argparse.Namespace, found: list[DatasetMerge]) -> str:
    """Merge what the command line names.

    Args:
        options: the command line.
        found: gets the merge as soon as there is one, so that a caller who was interrupted can see
            how far it came.

    Returns:
        What was done, in words.
    """
    named = options.input + (read_prefix_list(options.input_list) if options.input_list else [])
    prefixes = expand_prefixes(named)
    merge = DatasetMerge(
        prefixes, options.output_prefix, options.without_sidecar, options.overwrite
    )
    found.append(merge)
    files = [str(shard.dataset.bin_path) for shard in merge.shards]
    total = sum(shard.bin_size for shard in merge.shards)
    if options.check == "full":
        print(f"checking {len(files)} datasets", file=sys.stderr)
        merge.verify(progress_printer(total))
        end_progress()
    print(f"merging {len(files)} datasets into {options.output_prefix}", file=sys.stderr)
    sidecar = merge.write(progress_printer(total))
    end_progress()
    return summary(merge, sidecar)


def end_progress() -> None:
    """End the line that renews itself."""
    if sys.stderr.isatty():
        print(file=sys.stderr)


def summary(merge: DatasetMerge, sidecar: Sidecar | None) -> str:
    """Return what was written, in words."""
    lines = [
        f"{merge.output}: {merge.documents:,} documents in {merge.header.num_sequences:,} "
        f"sequences, {merge.tokens:,} tokens of {merge.header.dtype.name}, from "
        f"{len(merge.shards)} datasets"
    ]
    if sidecar is None:
        lines.append(
            "no sidecar was written (--without-sidecar): nothing knows the tokenizer and the "
            "checksums of this dataset"
        )
        return "\n".join(lines)
    known = sidecar.provenance
    lines.append(
        f"sidecar: {known.tokenizer} tokenizer {known.fingerprint[:16]}..., "
        f"{len(known.sources)} source files, largest id {sidecar.max_token_id} of "
        f"{known.vocab_size}"
    )
    repeats = Counter((source.sha256, source.file) for source in known.sources)
    lines += [
        f"warning: source file {name} stands in {count} of the datasets, so its documents may be "
        "there more than once"
        for (_, name), count in repeats.items()
        if count > 1
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    options = parse_arguments(arguments)
    # A missing sidecar is an error here, or was allowed.
    logging.getLogger("megatron_mer").setLevel(logging.ERROR)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    found: list[DatasetMerge] = []
    try:
        print(merge(options, found))
    except Stopped as stopped:
        end_progress()
        whole = any(merge.published for merge in found)
        left = "the merged dataset was just complete" if whole else "nothing was left behind"
        print(f"stopped by signal {stopped.number}; {left}", file=sys.stderr)
        return 128 + stopped.number
    except MegatronMerError as error:
        end_progress()
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
