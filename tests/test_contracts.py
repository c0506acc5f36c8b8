"""What holds for the project as a whole: imports, sizes, shipped examples, documented commands."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
CODE_FOLDERS = ("benchmarks", "megatron_mer", "tools", "data_preprocessing", "examples", "tests")
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60

# What prepares data or checks a configuration starts in a moment, without torch.
LIGHT_MODULES = (
    "megatron_mer",
    "megatron_mer.analysis.memory.advice",
    "megatron_mer.config",
    "megatron_mer.continual.stream",
    "megatron_mer.data.corpus.job",
    "megatron_mer.data.indexed_dataset",
    "megatron_mer.data.loader",
    "megatron_mer.data.sidecar",
    "megatron_mer.data.tokenizers",
    "megatron_mer.launch.environment",
    "megatron_mer.launch.requeue",
)
LIGHT_PROGRAMS = (
    "data_preprocessing/prepare_corpus.py",
    "examples/quickstart/prepare.py",
    "tools/inspect_dataset.py",
    "tools/inspect_stream.py",
    "tools/merge_datasets.py",
    "tools/plan_memory.py",
    "tools/plot_schedule.py",
    "tools/preprocess_data.py",
    "tools/report.py",
    "tools/requeue.py",
    "tools/submit_slurm.py",
    "tools/train_tokenizer.py",
    "tools/watch.py",
)
HEAVY = ("torch", "deepspeed", "transformers")

PROGRAM = re.compile(r"(?:^|/|\s)python3? ((?:tools|data_preprocessing|examples)/\S+\.py)(.*)")
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "examples/**/*.md", "docs/**/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"
)
EXAMPLES = sorted(ROOT.glob("examples/**/*.yaml"))


def python_files() -> list[Path]:
    files = [path for folder in CODE_FOLDERS for path in (ROOT / folder).rglob("*.py")]
    return sorted([*files, *ROOT.glob("*.py")])


def commands(document: Path) -> list[str]:
    """The lines of the document's fenced code blocks and its `inline code`, comments cut off."""
    text = document.read_text(encoding="utf-8")
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    joined = "\n".join(blocks).replace("\\\n", " ")
    lines = [*joined.splitlines(), *re.findall(r"`([^`\n]+)`", prose)]
    return [line.split(" #")[0].strip() for line in lines]


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_imports_keep_their_direction() -> None:
    # In a process of its own: import-linter sets up logging, and would switch our loggers off.
    linted = run_python(
        "-c",
        "import sys; from importlinter.cli import lint_imports; "
        "sys.exit(lint_imports(config_filename='pyproject.toml', no_cache=True, no_logo=True))",
    )
    assert linted.returncode == 0, linted.stdout + linted.stderr


@pytest.mark.parametrize(
    "statement",
    [
        *(f"import {name}" for name in LIGHT_MODULES),
        *(f"import runpy; runpy.run_path({name!r}, run_name='light')" for name in LIGHT_PROGRAMS),
    ],
)
def test_data_side_imports_no_torch(statement: str) -> None:
    check = f"import sys; print([name for name in {HEAVY!r} if name in sys.modules])"
    result = run_python("-c", f"{statement}\n{check}")
    assert result.stdout.splitlines()[-1:] == ["[]"], result.stdout + result.stderr


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_example_loads(path: Path) -> None:
    from megatron_mer.config import load_config

    config = load_config(path, [])
    assert config.stream, "a run without a task"
    assert config.model.hidden_size


def test_quickstart_reads_what_prepare_writes() -> None:
    from megatron_mer.config import load_config

    result = run_python(
        "-c",
        "import sys; sys.path.insert(0, 'examples/quickstart')\n"
        "import prepare\n"
        "print(*(path for stage in prepare.build_stages() for path in stage.outputs), sep='\\n')",
    )
    written = set(result.stdout.split())
    config = load_config(ROOT / "examples/quickstart/run.yaml", [])
    prefixes = [data.prefix for task in config.stream for data in task.train]
    prefixes += [task.valid for task in config.stream if isinstance(task.valid, str)]
    read = {f"{prefix}.{end}" for prefix in prefixes for end in ("bin", "idx")}
    assert len(read) == 20
    assert read | {config.tokenizer.removeprefix("sentencepiece:")} <= written, result.stderr


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documented_make_targets_exist(document: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    named = {
        word
        for line in commands(document)
        if line.startswith("make ")
        for word in shlex.split(line)[1:]
        if re.fullmatch("[a-z][a-z-]*", word)
    }
    assert named <= targets


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documented_programs_exist_and_know_their_options(document: Path) -> None:
    wrong = []
    for line in commands(document):
        if match := PROGRAM.search(line):
            wrong += unknown_options(match[1], match[2])
        for config in re.findall(r"--config (examples/\S+\.yaml)", line):
            wrong += [] if (ROOT / config).is_file() else [f"{config} does not exist"]
    assert wrong == []


@cache
def help_of(program: str, *command: str) -> str:
    return run_python(program, *command, "--help").stdout


def unknown_options(program: str, arguments: str) -> list[str]:
    """Each option among the arguments that the program's own help does not name."""
    if not (ROOT / program).is_file():
        return [f"{program} does not exist"]
    words = shlex.split(arguments)
    # The help of a program with commands names theirs only behind the command.
    commands = [words[:1]] if words and re.fullmatch(r"[a-z-]*[a-z]", words[0]) else []
    helps = [help_of(program, *command) for command in ([], *commands)]
    known = set(re.findall(r"--[a-z][a-z-]*", "".join(helps)))
    given = {word.split("=")[0] for word in words if word.startswith("--")}
    return [f"{program} has no {option}" for option in sorted(given - known)]


def test_there_are_documents_and_examples_to_check() -> None:
    assert ROOT / "CONTRIBUTING.md" in DOCUMENTS
    assert ROOT / "examples/quickstart/run.yaml" in EXAMPLES


def test_files_and_functions_stay_short() -> None:
    long = []
    for path in python_files():
        source = path.read_text(encoding="utf-8")
        name = path.relative_to(ROOT)
        if (lines := source.count("\n")) > MAX_FILE_LINES:
            long.append(f"{name}: {lines} lines (at most {MAX_FILE_LINES})")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    long.append(f"{name}:{node.lineno} {node.name}: {length} lines")
    assert long == []


@pytest.mark.parametrize("python_version", ["3.10", "3.11", "3.14"])
def test_requirements_pin_each_package_once(python_version: str) -> None:
    pins = pinned_versions(python_version)
    project = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^dependencies = \[\n(.*?)^\]", project, flags=re.DOTALL | re.MULTILINE)
    assert listed
    for line in listed[1].splitlines():
        needed = Requirement(line.strip(' ",'))
        assert needed.specifier.contains(pins[needed.name.lower()]), str(needed)


def pinned_versions(python_version: str) -> dict[str, str]:
    """Package -> version for a Python, from all files of requirements/."""
    pins: dict[str, str] = {}
    for path in sorted((ROOT / "requirements").glob("*.txt")):
        lines = path.read_text().splitlines()
        for pin in (Requirement(line) for line in lines if line and line[0] not in "#-"):
            if pin.marker and not pin.marker.evaluate({"python_version": python_version}):
                continue
            assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), f"{path.name}: {pin} is not exact"
            assert pin.name.lower() not in pins, f"{path.name}: {pin} is pinned elsewhere too"
            pins[pin.name.lower()] = str(pin.specifier)[2:]
    return pins
