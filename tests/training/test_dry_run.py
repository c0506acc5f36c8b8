"""A dry run: says what a start would do, and does nothing."""

import json
import os
import platform
import subprocess
import sys

import pytest

from megatron_mer.config import load_config
from megatron_mer.continual.plan import Plan
from megatron_mer.continual.stream_report import Spans, batch_rows
from megatron_mer.continual.stream_tables import summary_text
from megatron_mer.continual.text_table import display_width
from megatron_mer.data.batches import rank_rows
from megatron_mer.optim.schedule import lr_at
from megatron_mer.training import dry_run, main
from megatron_mer.training.dry_run import describe_start
from megatron_mer.training.preflight import prepare
from megatron_mer.training.resume import settings
from megatron_mer.training.run_state import RunState

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "OMPI_COMM_WORLD_RANK")


@pytest.fixture(autouse=True)
def plain_process(monkeypatch):
    """No launcher started this test."""
    environ = {key: value for key, value in os.environ.items() if key not in LAUNCHERS}
    environ |= {"COLUMNS": "100", "SLURM_STEP_ID": "", "SLURM_STEPID": ""}
    monkeypatch.setattr(os, "environ", environ)


@pytest.fixture
def start(capsys):
    """Calls the program with ``--dry-run``; gives exit code, output and complaints."""

    def call(config, *options, dry=("--dry-run",)):
        environ = dict(os.environ)
        code = main.main(["--config", str(config), *dry, *options])
        os.environ.clear()  # the program tells it which rank it is
        os.environ.update(environ)
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def checkpoint(folder, prepared, batches: int, updates: int | None = None) -> None:
    """A checkpoint as a run leaves it after some batches, less the weights."""
    plan = prepared.plan
    state = RunState(batches, batches if updates is None else updates, horizon=plan.total_batches)
    counters = {"updates_since": batches % 4, "updates_done": batches // 4}
    place = folder / "checkpoints" / f"step_{state.updates:09}"
    place.mkdir(parents=True)
    saved = state.to_json(plan.history(), settings(prepared), counters)
    (place / "run_state.json").write_text(json.dumps(saved))
    (place / "manifest.json").write_text(json.dumps({"format": 1, "files": {}}))
    (folder / "checkpoints" / "latest").write_text(place.name + "\n")


@pytest.fixture
def stopped(tiny):
    """The configuration of a run that was stopped after ten batches; its files."""
    config = tiny.write("run")
    checkpoint(tiny.folder / "run", prepare(load_config(config), 1), 10)
    return config


def files(folder) -> dict:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_new_run_is_described_and_nothing_is_made(tiny, start):
    config = tiny.write("run")
    before = files(tiny.folder)
    code, said, complaints = start(config)
    assert (code, complaints) == (0, "")
    assert files(tiny.folder) == before
    prepared = prepare(load_config(config), 1)
    assert summary_text(dry_run.summarise(prepared.plan), 100) in said
    assert f"{tiny.folder / 'run'}: a new run" in said
    for row in batch_rows(Spans(prepared.plan), 0):
        (text, *_) = dry_run.sample_texts(
            prepared.datasets["en"], row["sample"], 32, prepared.tokenizer
        )
        assert text[:20].replace("\n", "\\n") in said
    assert max(map(display_width, said.splitlines())) <= 100


def test_a_dry_run_and_its_refusals_import_no_torch(tiny, project_root):
    # A mistake in the configuration is told by another test; here it ends a real start early.
    for options, code in ((["--dry-run"], 0), (["--dry-run", "--fresh"], 0), (["--ranks=2"], 2)):
        check = (
            "import sys; from megatron_mer.training.main import main\n"
            f"code = main(['--config', {str(tiny.write('run'))!r}, *{options!r}])\n"
            "print(code, [name for name in ('torch', 'deepspeed') if name in sys.modules])"
        )
        done = subprocess.run(
            [sys.executable, "-c", check],
            cwd=project_root,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.splitlines()[-1] == f"{code} []"


# Layout and learning rate -----------------------------------------------------------------------


@pytest.mark.parametrize(("tp_size", "pp_size", "ranks"), [(2, 2, 8), (1, 4, 4), (2, 1, 2)])
def test_the_layout_is_the_one_that_ranks_get(tiny, tp_size, pp_size, ranks):
    from megatron_mer.parallel import Layout

    config = load_config(
        tiny.write("run"),
        [f"--parallel.tp_size={tp_size}", f"--parallel.pp_size={pp_size}"],
    )
    prepared = prepare(config, ranks)
    said = list(describe_start(prepared, ranks, False, (), 100))
    lines = next(text for text in said if text.startswith(f"{ranks} ranks: ")).splitlines()
    # 8 micro batches: four stages wait for 3 of 11 slots.
    assert any("waits for 27% of a step" in text for text in said) == (pp_size == 4)
    layout = Layout.of(config.parallel, ranks)
    shown = {}
    for line in lines[-ranks // tp_size :]:
        numbers = [int(word) for word in line.split() if word.isdecimal()]
        first, end = (numbers.pop(0), numbers.pop(0)) if tp_size > 1 else (numbers[0], numbers[0])
        numbers = numbers if tp_size > 1 else numbers[1:]
        stage, stages, first_row, last_row = numbers
        assert stages == pp_size
        for rank in range(first, end + 1):
            shown[rank] = (stage, range(first_row, last_row + 1))
    assert shown == {
        rank: (
            layout.coordinate(rank).pipe,
            rank_rows(8, layout.coordinate(rank).data, layout.dp_size, 1),
        )
        for rank in range(ranks)
    }


def test_without_a_number_of_ranks_it_takes_the_fewest_and_says_so(tiny, start):
    config = tiny.write("run")
    few = "(the fewest that this layout runs on; --ranks N shows others)"
    code, said, _ = start(config, "--parallel.pp_size=2", "--parallel.tp_size=2")
    assert code == 0
    assert f"4 ranks {few}: tp_size 2" in said.replace("\n", " ")
    code, said, _ = start(config, "--ranks", "1")
    assert code == 0
    assert "1 rank: tp_size 1 x pp_size 1 x dp_size 1" in said
    assert few not in said.replace("\n", " ")
    again = [f"--stream.{index}.max_epochs=1e3" for index in range(3)]
    code, said, _ = start(config, "--ranks=400", "--batch.global_batch_size=400", *again)
    assert code == 0
    assert "… 384 more ranks in the same order" in said
    assert "… 384 more rows" in said


def test_under_a_launcher_rank_0_alone_speaks(tiny, start, monkeypatch):
    config = tiny.write("run")
    for rank in range(2):
        world = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_SIZE": 2}
        world |= {"MASTER_ADDR": "localhost", "MASTER_PORT": 29500}
        os.environ.update({key: str(value) for key, value in world.items()})
        code, said, complaints = start(config)
        assert (code, complaints) == (0, "")
        assert ("2 ranks: tp_size 1" in said) == (rank == 0)
        assert bool(said) == (rank == 0)
    os.environ.update(RANK="0", LOCAL_RANK="0")
    code, _, complaints = start(config, "--ranks=4")
    assert code == 2
    assert "--ranks: given 4, but the launcher started 2" in complaints


def test_learning_rates_are_those_of_the_schedule(tiny, start):
    config = tiny.write("run")
    loaded = load_config(config)
    _, said, _ = start(config)
    wanted = {
        "the first batch to train": 0,
        "the warm-up is over": 3,
        "task fr begins": 7,
        "task de begins": 14,
        "the last batch": 19,
    }
    for what, batch in wanted.items():
        rate = lr_at(loaded.schedule, loaded.optimizer.lr, 20, batch)
        (line,) = (line for line in said.splitlines() if line.startswith(what))
        assert line.split()[-2:] == [str(batch), f"{rate:.4g}"]


def test_learning_rates_of_a_resumed_run_count_updates(tiny, start):
    config = tiny.write("run")
    prepared = prepare(load_config(config), 1)
    for batch in (4, 5):
        prepared.plan.mark_skipped(batch)
    checkpoint(tiny.folder / "run", prepared, 10, updates=8)
    _, said, _ = start(config)
    assert "task fr begins" not in said
    loaded = prepared.config
    for what, batch, step in (("the first batch to train", 10, 8), ("task de begins", 14, 12)):
        (line,) = (line for line in said.splitlines() if line.startswith(what))
        rate = lr_at(loaded.schedule, loaded.optimizer.lr, 20, step)
        assert line.split()[-2:] == [str(batch), f"{rate:.4g}"]


# The output directory ---------------------------------------------------------------------------


def test_a_stopped_run_would_resume_with_its_next_batch(tiny, stopped, start):
    before = files(tiny.folder)
    code, said, _ = start(stopped, "--optimizer.lr=2e-3", "--evaluate.max_batches=1")
    assert code == 0
    said = " ".join(said.split())
    assert "evaluate.max_batches changed: held-out losses from here on are of other" in said
    assert "it would resume after batch 10 from " in said
    assert "optimizer.lr was 0.001, is 0.002 from here on" in said
    assert "Batch 10, the first to train" in said
    assert files(tiny.folder) == before


def test_differences_are_refused_and_what_accepts_them_is_told(tiny, stopped, start):
    options = ["--replay.alpha=0.5", "--batch.global_batch_size=4"]
    code, said, complaints = start(stopped, *options)
    assert code == 2
    assert "it would resume after batch 10" in said
    assert "but not with this configuration" in " ".join(said.split())
    assert "the first to train" not in said
    for kind in ("replay", "batch-size"):
        assert f"--accept {kind}" in complaints
    code, said, complaints = start(stopped, *options, "--accept=replay")
    assert code == 2
    assert "--accept batch-size" in complaints
    assert "alpha" not in complaints
    code, said, _ = start(stopped, *options, "--accept", "replay, batch-size")
    assert code == 0
    config = load_config(stopped, options)
    history = prepare(load_config(stopped), 1).plan.history()
    plan = Plan.continued(history, prepare(config, 1).plan.spec, 10)
    assert summary_text(dry_run.summarise(plan), 100) in said
    assert said.count("accepted, from batch 10: ") == 2
    rows = [line.split() for line in said.partition("Batch 10,")[2].splitlines()]
    assert [row[1:3] for row in rows if row[:1] == ["10"]] == [[str(at), "0"] for at in range(4)]
    code, _, complaints = start(stopped, "--seed=8", "--accept=stream,replay,mix,length")
    assert code == 2
    assert "seed was 7, is 8" in complaints


def test_a_run_that_is_done_has_nothing_to_train(tiny, start):
    config = tiny.write("run")
    checkpoint(tiny.folder / "run", prepare(load_config(config), 1), 20)
    code, said, _ = start(config)
    assert code == 0
    assert "the run is done" in said
    assert "the first to train" not in said
    assert "learning rate" not in said


def test_fresh_sets_an_earlier_run_aside_but_nothing_else(tiny, stopped, start):
    run = tiny.folder / "run"
    code, _, complaints = start(stopped, "--fresh")
    assert code == 2
    assert "holds files but no run" in complaints
    (run / "status.json").write_text('{"status": "stopped"}')
    code, said, _ = start(stopped, "--fresh")
    assert code == 0
    assert "the earlier one would be renamed to run.before_TIME" in " ".join(said.split())
    assert "Batch 0, the first to train" in said


def test_a_run_that_is_alive_is_told(tiny, start):
    config = tiny.write("run")
    run = tiny.folder / "run"
    run.mkdir()
    status = {"status": "running", "host": platform.node(), "pid": os.getpid()}
    (run / "status.json").write_text(json.dumps(status))
    alive = f"alive there (host {platform.node()}, process {os.getpid()})"
    code, said, _ = start(config)
    assert code == 0
    assert alive in " ".join(said.split())
    assert "a run without a checkpoint, which begins at batch 0" in " ".join(said.split())
    (run / "status.json").write_text(json.dumps({**status, "pid": 2**30}))
    assert "alive there" not in start(config)[1]


def test_a_place_that_cannot_be_written_is_refused(tiny, start):
    (tiny.folder / "file").write_text("")
    code, said, complaints = start(
        tiny.write("file/run"[:4] + "x"), f"--output_dir={tiny.folder}/file/run"
    )
    assert code == 2
    assert f"{tiny.folder / 'file'} is no directory that can be written" in complaints
    assert said == ""


def test_what_a_start_refuses_a_dry_run_refuses(tiny, start):
    config = tiny.write("run")
    code, said, complaints = start(config, "--stream.0.steps=100000", "--ranks=8")
    assert (code, said) == (2, "")
    assert "dataset 'en' would have given 800000 samples" in complaints
    code, _, complaints = start(config, "--ranks=3")
    assert code == 2
    assert "8 rows do not divide into micro_batch_size 1 x dp_size 3" in complaints
    (tiny.folder / "run" / "checkpoints" / "step_000000005").mkdir(parents=True)
    code, _, complaints = start(config)
    assert code == 1
    assert "no checkpoint in" in complaints


# Options ----------------------------------------------------------------------------------------

REFUSED = {
    "unknown kind": (
        ["--accept=mix,all"],
        "--accept: given 'all'; allowed: batch-size, replay, mix, length, stream",
    ),
    "empty kind": (["--accept="], "--accept: given ''"),
    "fresh": (["--accept=mix", "--fresh"], "--accept: given with --fresh"),
    "ranks of a start": (["--ranks=2"], "--ranks: given without --dry-run"),
    "no ranks": (["--ranks=0", "--dry-run"], "--ranks: given 0; allowed: at least 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_are_refused(tiny, start, case):
    options, words = REFUSED[case]
    code, _, complaints = start(tiny.write("run"), *options, dry=())
    assert code == 2
    assert words in complaints
    assert not (tiny.folder / "run").exists()


def test_kinds_may_be_given_together_or_apart(tiny):
    own, rest = main.parse_arguments(
        ["--config=x", "--accept", "mix,length", "--seed=3", "--accept=replay"]
    )
    assert main._accepted(own) == {"mix", "length", "replay"}
    assert rest == ["--seed=3"]
