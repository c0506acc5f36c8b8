"""tools/inspect_stream.py on the tiny corpus: what it prints against the plan and the tokens."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megatron_mer.config import load_config, to_yaml
from megatron_mer.continual.stream_report import Spans, batch_rows, ledger_report, summarise
from megatron_mer.continual.text_table import display_width
from megatron_mer.data.indexed_dataset import IndexedDataset
from megatron_mer.data.tokenizers import load_tokenizer
from megatron_mer.training.preflight import prepare

TOOL = Path(__file__).parents[2] / "tools" / "inspect_stream.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("inspect_stream_tool", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tool, capsys):
    """Runs the tool; gives what it printed, or with ``code`` what it complained about."""

    def call(*arguments, code: int = 0) -> str:
        assert tool.main([str(argument) for argument in arguments]) == code
        said = capsys.readouterr()
        assert (said.err != "") == (code != 0)
        return said.err if code else said.out

    return call


def json_lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def metrics(plan, batches: range, skipped=()) -> str:
    lines = [
        {"step": None if batch in skipped else batch + 1, "batch": batch, "step_seconds": 0.5}
        for batch in batches
    ]
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.fixture
def started(tiny):
    """A run's directory as it stands after ten batches, and its plan."""
    config = tiny.write("run")
    plan = prepare(load_config(config), 1).plan
    folder = tiny.folder / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(load_config(config)))
    (folder / "plan.json").write_text(json.dumps(plan.history()))
    (folder / "metrics.jsonl").write_text(metrics(plan, range(10)))
    return folder, plan


# Steps ------------------------------------------------------------------------------------------


def test_steps_are_the_rows_of_the_plan(run, tiny):
    config = tiny.write("run")
    plan = prepare(load_config(config), 1).plan
    rows = json_lines(run("--config", config, "--steps", "6:9", "--json"))
    assert rows == [row for batch in range(6, 9) for row in batch_rows(Spans(plan), batch)]
    assert {row["kind"] for row in rows} == {"fresh", "replay"}
    lines = run("--config", config, "--steps", "6:9", "--width", 80).splitlines()
    assert lines[0].split() == ["batch", "place", "kind", "task", "dataset", "sample", "epoch"]
    for line, row in zip(lines[2:], rows, strict=True):
        assert line.split() == [
            f"{value:,}" if isinstance(value, int) else value
            for value in (
                row[key] for key in ("batch", "place", "kind", "task", "dataset", "sample", "epoch")
            )
        ]


def test_overrides_change_the_plan_as_they_do_for_training(run, tiny):
    config = tiny.write("run")
    rows = json_lines(run("--config", config, "--replay", "null", "--steps", "19", "--json"))
    assert {row["kind"] for row in rows} == {"fresh"}


def test_texts_are_the_samples_tokens_decoded(run, tiny, corpus):
    config = tiny.write("run")
    rows = json_lines(run("--config", config, "--steps", "8:12", "--json", "--text"))
    tokenizer = load_tokenizer(f"sentencepiece:{corpus / 'tok.model'}")
    ends = 0
    for row in rows:
        tokens = IndexedDataset(corpus / row["dataset"]).tokens(
            32 * row["sample"], 32 * row["sample"] + 33
        )
        ends += int((tokens == tokenizer.eod_id).sum())
        parts, part = [], []
        for token in tokens.tolist():
            if token == tokenizer.eod_id:
                parts.append(tokenizer.decode(part))
                part = []
            else:
                part.append(token)
        assert row["text"] == [*parts, tokenizer.decode(part)]
    assert ends > 0, "no document ends in these samples: the test has nothing to show"
    for width in (60, 150):
        lines = run("--config", config, "--steps", "8:12", "--text", "--width", width).splitlines()
        assert max(map(display_width, lines)) <= width
        # Below its row, or beside it.
        assert len(lines) == 2 + (2 if width == 60 else 1) * len(rows)
        assert rows[0]["text"][0][:15].replace("\n", "\\n") in lines[3 if width == 60 else 2]
        assert "¶" in "".join(lines)


def test_ranks_get_their_rows(run, tiny):
    config = tiny.write("run")
    rows = json_lines(run("--config", config, "--steps", "3", "--json", "--dp-size", 4))
    assert [row["dp_rank"] for row in rows] == [0, 0, 1, 1, 2, 2, 3, 3]
    said = run("--config", config, "--steps", "3", "--dp-size", 3, code=2)
    assert "8 rows cannot be cut into 3 ranks" in said
    assert "--dp-size" in run("--config", config, "--steps", "3", "--dp-size", 0, code=2)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("3:5", range(3, 5)),
        ("7", range(7, 8)),
        ("18:", range(18, 20)),
        (":2", range(2)),
        (":", range(20)),
        ("1,0:1,1", range(10, 11)),
    ],
)
def test_batches_are_chosen_like_this(tool, text, wanted):
    assert tool.chosen_batches(text, 20) == wanted


@pytest.mark.parametrize("text", ["20", "5:5", "6:5", "0:21", "-1", "a:b", "", "1:2:3"])
def test_batches_that_are_not_there_are_named(tool, text):
    with pytest.raises(tool.ConfigError, match="batches 0 to 19; allowed: A:B with 0 <= A < B"):
        tool.chosen_batches(text, 20)


# Summary ----------------------------------------------------------------------------------------


def test_summary_in_json_is_the_plan_s(run, tiny):
    config = tiny.write("run")
    plan = prepare(load_config(config), 1).plan
    assert json.loads(run("--config", config, "--summary", "--json")) == summarise(plan)
    text = run("--config", config, "--summary", "--width", 80)
    assert text.splitlines()[0] == "20 batches: 160 rows of 32 tokens, 5,120 tokens in all"
    assert "during" in text


def test_data_that_do_not_last_end_with_code_2_after_the_table(tool, tiny, capsys):
    def change(config):
        config["stream"][1].update(steps=1000)

    assert tool.main(["--config", str(tiny.write("run", change)), "--summary"]) == 2
    said = capsys.readouterr()
    assert "too few" in said.out
    assert "Here at most steps: " in said.out
    assert said.err.startswith("error: stream.1.train.0: by the end of task 'fr' dataset 'fr'")


def test_only_the_training_data_are_opened(run, tiny):
    def change(config):
        config["tokenizer"] = "sentencepiece:nowhere.model"
        config["stream"][0]["valid"] = "nowhere/valid"

    run("--config", tiny.write("run", change), "--summary")
    change = lambda c: [c["stream"][i]["train"][0].update(prefix=f"no/{i}") for i in (0, 2)]  # noqa: E731
    said = run("--config", tiny.write("run", change), "--summary", code=2)
    assert "no/0.bin" in said
    assert "no/2.bin" in said


# A run ------------------------------------------------------------------------------------------


def test_ledger_of_a_running_run_needs_nothing_but_its_directory(run, started, monkeypatch):
    folder, plan = started
    (folder / "config.yaml").unlink()
    monkeypatch.chdir("/")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "batch": 10, "step_seco')  # being written
    report = json.loads(run("--ledger", folder, "--json"))
    assert report == ledger_report(plan, 10)
    assert report == json.loads(run("--run", folder, "--ledger", "--json"))
    assert run("--ledger", folder).startswith("10 of 20 batches done\n")
    (folder / "metrics.jsonl").unlink()
    assert run("--ledger", folder).startswith("0 of 20 batches done\n")


def test_batches_skipped_since_the_last_checkpoint_count(run, started):
    folder, plan = started
    plan.mark_skipped(2)
    (folder / "plan.json").write_text(json.dumps(plan.history()))
    (folder / "metrics.jsonl").write_text(metrics(plan, range(10), skipped=(2, 5, 6)))
    report = json.loads(run("--ledger", folder, "--json"))
    assert report["skipped_batches"] == 3
    plan.mark_skipped(5)
    plan.mark_skipped(6)
    assert report == ledger_report(plan, 10)
    rows = json_lines(run("--run", folder, "--steps", "7:", "--json"))
    assert rows == [row for batch in range(7, 20) for row in batch_rows(Spans(plan), batch)]


def test_steps_and_summary_of_a_run(run, started, corpus):
    folder, plan = started
    rows = json_lines(run("--run", folder, "--steps", "12", "--json", "--text"))
    assert [{k: v for k, v in row.items() if k != "text"} for row in rows] == batch_rows(
        Spans(plan), 12
    )
    assert all(row["text"] for row in rows)
    text = run("--run", folder, "--summary")
    assert "10 batches done; the rest takes about 0 h 0 min 5 s, at 0.5 s a batch" in text
    done = json.loads(run("--run", folder, "--summary", "--json"))["done"]
    assert done == {"batches": 10, "seconds_a_batch": 0.5, "seconds_left": 5.0}


def test_directories_that_are_no_run_are_named(run, started, tmp_path):
    folder, plan = started
    assert "no plan.json" in run("--ledger", tmp_path / "nowhere", code=2)
    (folder / "metrics.jsonl").write_text(metrics(plan, range(25)))
    assert "are not of one run: 25 batches were done" in run("--ledger", folder, code=2)
    (folder / "metrics.jsonl").write_text("no JSON\n")
    assert "metrics.jsonl: a line is no JSON of a step" in run("--ledger", folder, code=2)
    (folder / "plan.json").write_text("[")
    assert "plan.json: cannot be read" in run("--ledger", folder, code=2)
    (folder / "plan.json").write_text("[]")
    assert "cannot be read as a plan" in run("--ledger", folder, code=1)


def test_a_dataset_of_another_tokenizer_is_no_text(run, tiny, corpus):
    sidecar = json.loads((corpus / "en.json").read_text())
    sidecar["tokenizer"]["fingerprint"] = "f" * 64
    for suffix in (".bin", ".idx"):
        (tiny.folder / f"en{suffix}").symlink_to(f"{corpus / 'en'}{suffix}")
    (tiny.folder / "en.json").write_text(json.dumps(sidecar))
    prefix = str(tiny.folder / "en")
    config = tiny.write("run", lambda c: c["stream"][0]["train"][0].update(prefix=prefix))
    run("--config", config, "--steps", "0")
    assert "ffffffffffffffff" in run("--config", config, "--steps", "0", "--text", code=2)


# The program ------------------------------------------------------------------------------------

WRONG = {
    "no view": ["--config", "x.yaml"],
    "two views": ["--config", "x.yaml", "--summary", "--steps", "1"],
    "no source": ["--summary"],
    "two sources": ["--config", "x.yaml", "--run", "y", "--summary"],
    "two runs": ["--run", "x", "--ledger", "y"],
    "ledger of a configuration": ["--config", "x.yaml", "--ledger"],
    "overrides of a run": ["--run", "x", "--summary", "--replay", "null"],
    "text of a summary": ["--run", "x", "--summary", "--text"],
    "no width": ["--run", "x", "--summary", "--width", "0"],
}


@pytest.mark.parametrize("case", WRONG)
def test_options_that_do_not_go_together_end_with_the_usage(tool, capsys, case):
    with pytest.raises(SystemExit) as ended:
        tool.main(WRONG[case])
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_it_starts_without_torch_and_survives_a_reader_that_leaves(tiny):
    def change(config):
        for task in config["stream"]:
            task.update(steps=4000, max_epochs=1e6)

    config = str(tiny.write("run", change))
    check = (
        "import sys, runpy; sys.argv = ['inspect_stream.py', *sys.argv[1:]]\n"
        f"try:\n    runpy.run_path(r'{TOOL}', run_name='__main__')\n"
        "finally:\n    print('torch' in sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", check, "--config", config, "--steps", ":", "--text"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline().split()[0] == "batch"
    process.stdout.close()
    assert process.stderr.read() == "False\n"
    assert process.wait(30) == 0
