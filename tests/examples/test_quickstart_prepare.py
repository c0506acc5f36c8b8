"""The quick start's stages: run once, again only when something they depend on changed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

PROGRAM = """\
import pathlib, sys
source, target = map(pathlib.Path, sys.argv[1:])
text = source.read_text()
print("copying", text)
if text != "silent":
    target.write_text(text)
sys.exit(text == "bad")
"""


@pytest.fixture
def prepare(project_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program as a module, whose project is a folder of the test's own."""
    path = project_root / "examples/quickstart/prepare.py"
    spec = importlib.util.spec_from_file_location("quickstart_prepare", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look there
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/copy.py").write_text(PROGRAM)
    (tmp_path / "source").write_text("one")
    return module


def make_stage(prepare: ModuleType) -> object:
    source, target = Path("source"), Path("target")
    command = ("tools/copy.py", "source", "target")
    return prepare.Stage("copy", command, (source,), (target,))


def test_a_stage_runs_once(prepare: ModuleType) -> None:
    stage = make_stage(prepare)
    assert prepare.run_stage(stage, fresh=False)
    assert not prepare.run_stage(stage, fresh=False)
    assert prepare.run_stage(stage, fresh=True)


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("source", "two"),
        ("tools/copy.py", PROGRAM + "# new"),
        ("build/quickstart/logs/copy.json", "{"),
    ],
)
def test_a_change_runs_it_again(
    prepare: ModuleType, tmp_path: Path, path: str, content: str
) -> None:
    stage = make_stage(prepare)
    prepare.run_stage(stage, fresh=False)
    (tmp_path / path).write_text(content)
    assert prepare.run_stage(stage, fresh=False)
    assert (tmp_path / "target").read_text() == (tmp_path / "source").read_text()


def test_a_lost_output_runs_it_again(prepare: ModuleType, tmp_path: Path) -> None:
    stage = make_stage(prepare)
    prepare.run_stage(stage, fresh=False)
    (tmp_path / "target").unlink()
    assert prepare.run_stage(stage, fresh=False)


@pytest.mark.parametrize(
    ("text", "reason"), [("bad", "exit code 1"), ("silent", "wrote no target")]
)
def test_a_failure_shows_what_was_printed_and_is_tried_again(
    prepare: ModuleType, tmp_path: Path, text: str, reason: str
) -> None:
    (tmp_path / "source").write_text(text)
    stage = make_stage(prepare)
    for _ in range(2):
        with pytest.raises(prepare.StageError, match=f"(?s){reason}.*copying {text}"):
            prepare.run_stage(stage, fresh=False)


def test_a_stage_reads_only_what_an_earlier_one_wrote(prepare: ModuleType) -> None:
    there = {prepare.SOURCE / f"{language}.jsonl.gz" for language in prepare.LANGUAGES}
    for stage in prepare.build_stages():
        assert set(stage.inputs) <= there
        there |= set(stage.outputs)
