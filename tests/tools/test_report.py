"""tools/report.py: each figure is the file's, and a torn run gives a page all the same."""

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_mer.analysis.report.page import render
from tests.made_run import made_run

TOOL = Path(__file__).parents[2] / "tools" / "report.py"
NASTY = "<script>alert(1)</script>&\"'"
# The files of a run that the report reads.
FILES = (
    "config.yaml", "metrics.jsonl", "evaluations.jsonl", "status.json", "plan.json",
    "ledger.json", "environment.json", "summary.json",
)  # fmt: skip


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report_tool", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Page(HTMLParser):
    """The figures of a page, its words and whatever could fetch or run something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.figures: list[tuple[str, Any, str]] = []
        self.active: list[str] = []
        self.words: list[str] = []
        self._open: tuple[str, Any] | None = None
        self._style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {key: value or "" for key, value in attributes}
        self._style = tag == "style"
        if "data-key" in found:
            self._open = found["data-key"], json.loads(found["data-value"])
        if tag in ("script", "link", "iframe", "object", "embed", "img", "base", "form"):
            self.active.append(tag)
        for key, value in found.items():
            address = key in ("href", "xlink:href", "src", "srcset", "action", "data")
            if key.startswith("on") or (address and not value.startswith("#")):
                self.active.append(f"{tag} {key}={value}")
            if key != "aria-label" and re.search(r"url\(\s*['\"]?(?!#)", value):
                self.active.append(f"{tag} {key}={value}")

    def handle_data(self, data: str) -> None:
        if self._style and re.search(r"@import|url\(\s*['\"]?(?!#)", data):
            self.active.append(data)
        if self._open:
            self.figures.append((*self._open, data))
            self._open = None
        self.words.append(data)


def page_of(tool: ModuleType, *runs: Path) -> tuple[Page, dict[str, Any]]:
    report, charts = tool.build([str(run) for run in runs])
    return Page(render(report, charts)), report


def at(content: Any, pointer: str) -> Any:
    """What a JSON pointer (RFC 6901) leads to; None where there is nothing."""
    for key in pointer.split("/")[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        try:
            content = content[int(key)] if isinstance(content, list) else content[key]
        except (KeyError, IndexError):
            return None
    return content


def numbers(content: Any, pointer: str = "") -> Iterator[str]:
    """The pointers of all numbers."""
    if isinstance(content, dict):
        for key, one in content.items():
            yield from numbers(one, f"{pointer}/{key}")
    elif isinstance(content, list):
        for place, one in enumerate(content):
            yield from numbers(one, f"{pointer}/{place}")
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield pointer


def shown_number(text: str) -> tuple[float, float]:
    """The number that a reader reads, and half a unit of its last digit."""
    if ":" in text:
        clock, _, unit = text.lstrip("+").partition(" ")
        parts = [int(part) for part in clock.split(":")]
        assert len(parts) == {"min": 2, "h": 3}[unit], text
        return float(sum(part * 60**at for at, part in enumerate(reversed(parts)))), 0.5
    scales = {"%": 0.01, " ms": 0.001, " s": 1.0}
    scale = next((one for end, one in scales.items() if text.endswith(end)), 1.0)
    digits = text.rstrip("% ms").replace(",", "").replace("\u2212", "-")
    after = len(digits.partition(".")[2])
    return scale * float(digits), scale * 0.5 * 10.0**-after


def check_figures(page: Page, report: dict[str, Any]) -> None:
    """Each figure is the report's value, and what is printed is that value rounded."""
    assert page.figures
    for pointer, value, shown in page.figures:
        assert value == at(report, pointer), pointer
        if value is None:
            assert shown == "\u2013", pointer
        else:
            read, half = shown_number(shown)
            assert abs(read - value) <= half * (1 + 1e-6), (pointer, shown)


def check_summary(page: Page, root: Path, place: int = 0) -> None:
    """All measures of summary.json stand on the page, and nothing else under their names."""
    summary = json.loads((root / "summary.json").read_text(encoding="utf-8"))
    start = f"/runs/{place}/summary"
    shown = {key.removeprefix(start): value for key, value, _ in page.figures
             if key.startswith(start)}  # fmt: skip
    for pointer, value in shown.items():
        assert value == at(summary, pointer), pointer
    expected = {key: summary[key] for key in summary
                if key not in ("batches", "replay_share", "anchor")}  # fmt: skip
    expected["matrix"] = {"losses": summary["matrix"]["losses"]}
    if "anchor" in summary:
        anchor = {**summary["anchor"], "matrix": {"losses": summary["anchor"]["matrix"]["losses"]}}
        expected["anchor"] = anchor
    missing = set(numbers(expected)) - set(shown)
    assert not missing


def test_every_figure_is_the_summarys(tool: ModuleType, tmp_path: Path):
    root = made_run(tmp_path / "run", ((8.0, 8.5), (5.0, 7.0), (5.5, None)))
    page, report = page_of(tool, root)
    check_figures(page, report)
    check_summary(page, root)
    shown = {key: text for key, _, text in page.figures}
    assert shown["/runs/0/summary/forgetting/sets/en"] == "+0.500"
    assert shown["/runs/0/summary/matrix/losses/2/1"] == "\u2013"
    assert shown["/runs/0/summary/wall_seconds"] == "1:02:05 h"
    ledger = json.loads((root / "ledger.json").read_text())
    for pointer, value, _ in page.figures:
        if pointer.startswith("/runs/0/ledger"):
            assert value == at(ledger, pointer.removeprefix("/runs/0/ledger"))


def test_a_real_runs_page(tool: ModuleType, tiny):
    tiny.train(tiny.write("run"))
    root = tiny.folder / "run"
    page, report = page_of(tool, root)
    assert report["runs"][0]["notes"] == []
    assert report["runs"][0]["measured"] == "summary.json"
    check_figures(page, report)
    check_summary(page, root)
    keys = {key for key, _, _ in page.figures}
    assert "/runs/0/summary/anchor/retained/mean" in keys
    assert "/runs/0/summary/bits_per_byte/retained/mean" in keys
    assert "/runs/0/use/tokens_per_second/median" in keys

    # Before the last entry ended there is no summary: the page computes what it would have said.
    (root / "summary.json").unlink()
    whole = (root / "evaluations.jsonl").read_text().splitlines(keepends=True)
    (root / "evaluations.jsonl").write_text("".join(whole[:-1]) + whole[-1][:40])
    page, report = page_of(tool, root)
    check_figures(page, report)
    assert report["runs"][0]["measured"] == "evaluations.jsonl"
    rows = [json.loads(line)["losses"] for line in whole]
    shown = {key: value for key, value, _ in page.figures}
    assert shown["/runs/0/summary/retained/sets/en"] == rows[2]["en"]
    assert shown["/runs/0/summary/learned/sets/en"] == rows[1]["en"]


def test_the_page_fetches_and_runs_nothing_whatever_the_names(tool: ModuleType, tmp_path: Path):
    roots = []
    for place, name in enumerate((NASTY, "العربية 日本語")):
        config = {"seed": place, "note": NASTY}
        roots.append(made_run(tmp_path / str(place), tasks=(NASTY, "日本語"), name=name,
                              config=config))  # fmt: skip
    for runs in (roots[:1], roots):
        page, report = page_of(tool, *runs)
        check_figures(page, report)
        assert page.active == []
        assert NASTY in "".join(page.words)


def test_several_runs_beside_each_other(tool: ModuleType, tmp_path: Path):
    roots = [
        made_run(tmp_path / "a", ((8.0, 8.5), (5.0, 7.0), (5.5, 4.0)), name="a"),
        made_run(tmp_path / "b", ((8.0, 8.5), (5.0, 7.0), (6.0, 4.0)), name="b",
                 config={"seed": 2}),
    ]  # fmt: skip
    page, report = page_of(tool, *roots)
    check_figures(page, report)
    for place, root in enumerate(roots):
        check_summary(page, root, place)
    shown = {key: text for key, _, text in page.figures}
    assert shown["/comparison/measures/forgetting/differences/1"] == "+0.500"
    # Forgetting 0.5 and 1.0: mean 0.75, s = 0.353553, t(1) = 12.7062, / sqrt(2).
    assert shown["/comparison/groups/0/measures/forgetting/mean"] == "+0.750"
    assert shown["/comparison/groups/0/measures/forgetting/half_width"] == "3.177"


def test_the_tool_writes_page_json_and_pictures(tmp_path: Path):
    root = made_run(tmp_path / "run")
    done = run_tool(root)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert Path(done.stdout.strip()) == root / "report" / "index.html"
    report = json.loads((root / "report" / "report.json").read_text())
    check_figures(Page((root / "report" / "index.html").read_text(encoding="utf-8")), report)
    pictures = {path.name: path.read_bytes()[:8] for path in (root / "report").glob("*.png")}
    assert {"losses.png", "matrix.png", "kept.png"} <= set(pictures)
    assert set(pictures.values()) == {b"\x89PNG\r\n\x1a\n"}
    assert not list((root / "report").glob(".*"))


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "torn", "binary", "other"])
def test_a_torn_file_gives_a_page_with_a_note(
    tool: ModuleType, tmp_path: Path, file: str, damage: str
):
    root = made_run(tmp_path / "run")
    path = root / file
    whole = path.read_bytes()
    path.unlink()
    if damage != "missing":
        content = {"empty": b"", "torn": whole[: len(whole) // 2], "binary": b"\xff\x00\x80" * 50}
        path.write_bytes(content.get(damage, b"[1, null]\n"))
    page, report = page_of(tool, root)
    check_figures(page, report)
    notes = report["runs"][0]["notes"]
    quiet = file in ("plan.json", "ledger.json", "environment.json") or (
        # Half of a configuration is well formed.
        (file, damage) == ("config.yaml", "torn")
    )
    assert notes or quiet
    assert all(note in "".join(page.words) for note in notes)


def test_what_is_no_run_is_said(tmp_path: Path):
    for path in (tmp_path / "missing", tmp_path):
        done = run_tool(path)
        assert done.returncode == 2, done.stderr
        assert str(path) in done.stderr
        assert "Traceback" not in done.stderr
    root = made_run(tmp_path / "run")
    done = run_tool(root, "--out", str(root / "config.yaml"))
    assert done.returncode == 2
    assert "--out" in done.stderr


def run_tool(*arguments: Path | str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)
