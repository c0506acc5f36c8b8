"""From text to tokens: tools/preprocess_data.py beside the tokenizer libraries it uses.

    python benchmarks/preprocess.py --html DIR [DIR ...] [--clock cpu] [--repetitions 3] [--record]

Two corpora as JSON lines: the quick start's five, repeated to 200 MB, and text that does not
repeat, out of the HTML files below DIR (such as the Debian package debian-handbook, unpacked).
On a machine that others use, `--clock cpu` counts processor seconds instead: those of start-up in
full, those of the work divided by the cores, as if all were kept equally busy.
"Raw" is the library alone, in a process of its own that has loaded it, text in memory or, for
gigatoken, the file itself; on all cores. Ours is the whole program, with and without the time that
it takes for a single short document. Memory is the sum over all its processes, looked at ten times
a second.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.parts.measure import ROOT, Machine, Row, Sample, headline, interleaved, table
from benchmarks.parts.record import output_folder, record_section, write_json

REPEATED_BYTES, LEAST_UNIQUE_BYTES = 200_000_000, 40_000_000
SLOW_BYTES = 6_000_000
"""Text on which the libraries are measured that take ten times as long as gigatoken."""
VOCAB_SIZE = 32_000
PEAK_MB, START_SECONDS = 600, 1.0
PEER_MBS = 16.0
"""Megatron-LM's preprocess_data_fast on repeated text, end to end, measured apart."""
CORES = len(os.sched_getaffinity(0))

RAW = """
import json, sys, time
kind, model, path, threads = sys.argv[1:5]
sys.path.insert(0, {root!r})
texts = []
if kind != "gigatoken":
    texts = [json.loads(line)["text"] for line in open(path, "rb")]
    from megatron_mer.data.tokenizers import load_tokenizer
    tokenizer = load_tokenizer(model)
    tokenizer.encode_batch(texts[:2], int(threads))
    own = tokenizer._model
    if kind == "hf":
        work = lambda: own.encode_batch_fast(texts, add_special_tokens=False)
    elif kind == "tiktoken":
        work = lambda: own.encode_ordinary_batch(texts, num_threads=int(threads))
    else:
        data = [text.encode() for text in texts]
        work = lambda: own.Encode(data, num_threads=int(threads), return_type="numpy")
else:
    import gigatoken, awkward
    tokenizer = gigatoken.Tokenizer(model)
    work = lambda: tokenizer.encode_files(gigatoken.JsonlFileSource([path]))
start = time.perf_counter(), time.process_time()
work()
print(time.perf_counter() - start[0], time.process_time() - start[1])
"""


class _Paragraphs(HTMLParser):
    """Collects what a page says."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attributes: object) -> None:
        self._hidden += tag in ("script", "style")
        if tag in ("p", "h1", "h2", "h3", "li", "pre", "div"):
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)


def pages(folders: Sequence[str]) -> Iterator[str]:
    """Yield the text of HTML files."""
    for folder in folders:
        for path in sorted(filter(Path.is_file, Path(folder).rglob("*.html"))):
            page = _Paragraphs()
            page.feed(path.read_text(encoding="utf-8", errors="replace"))
            lines = (line.strip() for line in "".join(page.parts).split("\n"))
            yield "\n".join(line for line in lines if line)


def small_corpora() -> list[str]:
    """The quick start's texts."""
    folder = ROOT / "examples" / "quickstart" / "data"
    return [
        json.loads(line)["text"]
        for path in sorted(folder.glob("*.jsonl.gz"))
        for line in gzip.open(path)
    ]


def write_corpus(path: Path, texts: Sequence[str], least: int) -> int:
    """Write JSON lines, again and again until there are enough; return their bytes."""
    size = 0
    with open(path, "wb") as file:
        while size < least:
            for text in texts:
                size += file.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
    return size


@dataclass
class Tool:
    """Runs of the program, and the memory that they took."""

    folder: Path
    clock: str
    """wall or cpu."""
    peaks: dict[str, float] = field(default_factory=dict)

    def seconds(self, path: Path, tokenizer: str, engine: str = "auto") -> float:
        """Tokenize a file."""
        program = str(ROOT / "tools" / "preprocess_data.py")
        command = [sys.executable, program, "--input", str(path), "--overwrite"]
        command += ["--output-prefix", str(self.folder / "out"), "--tokenizer", tokenizer]
        command += ["--engine", engine]
        start, before = time.perf_counter(), os.times()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        watch = threading.Thread(target=self._watch, args=(process, f"{path.name} {engine}"))
        watch.start()
        _, error = process.communicate()
        seconds, now = time.perf_counter() - start, os.times()
        watch.join()
        if process.returncode:
            raise SystemExit(error.decode())
        if self.clock == "cpu":
            return now[2] + now[3] - before[2] - before[3]
        return seconds

    def warm(self, found: Sample, start: float) -> Sample:
        """Seconds without start-up, from all seconds."""
        share = CORES if self.clock == "cpu" else 1
        return Sample(tuple((seconds - start) / share for seconds in found.values))

    def raw(self, kind: str, model: str, path: Path) -> float:
        """Seconds of a library alone."""
        threads = str(CORES)
        settings = {"RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"}
        command = [sys.executable, "-c", RAW.format(root=str(ROOT)), kind, model, str(path)]
        done = subprocess.run(
            [*command, threads],
            env={**os.environ, **settings},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        wall, processor = map(float, done.stdout.split())
        return processor / CORES if self.clock == "cpu" else wall

    def _watch(self, process: subprocess.Popen[bytes], name: str) -> None:
        while process.poll() is None:
            total = sum(_resident(number) for number in _family(process.pid)) / 1e6
            self.peaks[name] = max(self.peaks.get(name, 0.0), total)
            time.sleep(0.1)


def _family(parent: int) -> list[int]:
    try:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    except OSError:
        return [parent]
    return [parent, *(number for child in children for number in _family(int(child)))]


def _resident(process: int) -> int:
    """Memory that a process takes; pages that several share count in parts."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def train(folder: Path, corpus: Path, model_type: str, end: str) -> Path:
    """Train a tokenizer on the small corpora."""
    output = folder / f"{model_type}.{end}"
    program = str(ROOT / "tools" / "train_tokenizer.py")
    command = [sys.executable, program, "--input", str(corpus), "--output", str(output)]
    command += ["--vocab-size", str(VOCAB_SIZE), "--model-type", model_type]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return output


def fast_rows(tool: Tool, corpora: dict[str, Path], model: Path, count: int) -> list[Row]:
    """The fast path, on text that repeats and text that does not."""
    tiny = tool.folder / "tiny.jsonl"
    write_corpus(tiny, ["one short document"], 1)
    name, works = f"hf:{model}", {}
    for corpus, path in corpora.items():
        works[f"raw {corpus}"] = lambda _, path=path: tool.raw("gigatoken", str(model), path)
        works[f"ours {corpus}"] = lambda _, path=path: tool.seconds(path, name)
    works["start"] = lambda _: tool.seconds(tiny, name)
    found = interleaved(works, count)
    start = found["start"]
    rows = [Row("start-up: one short document, byte-level BPE", "s", start, START_SECONDS)]
    for corpus, path in corpora.items():
        size = path.stat().st_size / 1e6
        ours, alone = found[f"ours {corpus}"], found[f"raw {corpus}"].rate(size)
        warm, half = tool.warm(ours, start.median), alone.median / 2
        whole = Sample(tuple(seconds + start.median for seconds in warm.values))
        limits = 3 * PEER_MBS if corpus == "repeated" else None
        rows += [
            Row(f"{corpus}: raw gigatoken from JSON lines", "MB/s", alone),
            Row(f"{corpus}: ours, end to end", "MB/s", whole.rate(size), limits, True),
            Row(f"{corpus}: ours, without start-up", "MB/s", warm.rate(size), half, True),
        ]
        peak = Sample((tool.peaks[f"{path.name} auto"],))
        rows.append(Row(f"{corpus}: ours, peak memory of all processes", "MB", peak, PEAK_MB))
    return rows


def library_rows(tool: Tool, path: Path, models: dict[str, str], count: int) -> list[Row]:
    """The libraries with all cores, on text that does not repeat."""
    works, size = {}, path.stat().st_size / 1e6
    tiny = tool.folder / "tiny.jsonl"
    for kind, name in models.items():
        alone = name.split(":")[0]
        works[f"raw {kind}"] = lambda _, name=name, alone=alone: tool.raw(alone, name, path)
        works[f"ours {kind}"] = lambda _, name=name: tool.seconds(path, name, "library")
        works[f"start {kind}"] = lambda _, name=name: tool.seconds(tiny, name, "library")
    found = interleaved(works, count)
    rows = []
    for kind in models:
        alone, start = found[f"raw {kind}"].rate(size), found[f"start {kind}"].median
        ours = tool.warm(found[f"ours {kind}"], start).rate(size)
        limit, note = 0.9 * alone.median, f"start-up {start:.2f} s"
        rows += [
            Row(f"{kind}: the library alone, text in memory", "MB/s", alone),
            Row(f"{kind}: ours, without start-up", "MB/s", ours, limit, True, note=note),
        ]
    peak = Sample((tool.peaks[f"{path.name} library"],))
    return [*rows, Row("the libraries: ours, peak memory", "MB", peak, PEAK_MB)]


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--html", nargs="+", required=True, metavar="DIR", help="text, not repeated"
    )
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--repetitions", type=int, default=3, metavar="N")
    parser.add_argument("--workdir", metavar="DIR", help="for about 1 GB of files")
    parser.add_argument("--record", action="store_true", help="into data/ and RESULTS.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.workdir) as name:
        folder = Path(name)
        corpora = {"repeated": folder / "repeated.jsonl", "unique": folder / "unique.jsonl"}
        texts = small_corpora()
        write_corpus(folder / "small.jsonl", texts, 1)
        write_corpus(corpora["repeated"], texts, REPEATED_BYTES)
        unique = list(pages(options.html))
        size = write_corpus(corpora["unique"], unique, 1)
        if size < LEAST_UNIQUE_BYTES:
            print(f"only {size:,} bytes of text below --html; wanted {LEAST_UNIQUE_BYTES:,}")
        write_corpus(folder / "part.jsonl", unique[:: max(1, size // SLOW_BYTES)], 1)
        models = {
            "byte-level BPE": f"hf:{train(folder, folder / 'small.jsonl', 'byte-bpe', 'json')}",
            "unigram": f"sentencepiece:{train(folder, folder / 'small.jsonl', 'unigram', 'model')}",
        }
        machine = Machine("python benchmarks/preprocess.py")
        tool = Tool(folder, options.clock)
        model = Path(models["byte-level BPE"].removeprefix("hf:"))
        rows = fast_rows(tool, corpora, model, options.repetitions)
        rows += library_rows(tool, folder / "part.jsonl", models, options.repetitions)
        found = machine.found()
    missed = sum(row.held is False for row in rows)
    limits = sum(row.held is not None for row in rows)
    sizes = f"{size / 1e6:.0f} MB of text that does not repeat"
    clock = "processor seconds" if options.clock == "cpu" else "wall clock"
    head = f"{headline(found)}; {sizes}; {clock}"
    text = f"{head}\n\n{table(rows)}\n\n{missed} of {limits} limits missed."
    print(text)
    write_json(output_folder(options.record) / "preprocess.json", found, rows=rows)
    if options.record:
        record_section("preprocess", text)


if __name__ == "__main__":
    main()
