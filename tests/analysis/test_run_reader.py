import json
from pathlib import Path

import pytest

from megatron_mer.analysis.run_reader import RunRecord, read_run
from megatron_mer.errors import DataError

CONFIG = """
name: 日本語
stream:
- {task: base, trained_before: true, train: [{prefix: a}]}
- {task: no, train: [{prefix: b}], valid: b_valid, steps: 2}
- {task: fr, train: [{prefix: c}], valid: {fr_web: c, fr_law: d}, steps: 3}
"""


def lines(*content: object) -> str:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in content)


def metric(batch: int, task: str = "no", **more: object) -> dict[str, object]:
    return {"step": batch + 1, "batch": batch, "task": task, "loss": 5.0 - batch, **more}


def evaluation(batches: int, moment: str, task: str | None, **losses: object) -> dict[str, object]:
    entry = {"no": 0, "fr": 1}.get(task or "")
    return {
        "step": batches, "batches": batches, "moment": moment, "entry": entry, "task": task,
        "losses": losses,
    }  # fmt: skip


METRICS = [*(metric(at) for at in range(2)), *(metric(at, "fr") for at in range(2, 5))]
EVALUATIONS = [
    evaluation(0, "start", None, no=8.0, fr_web=9.0),
    evaluation(2, "entry_end", "no", no=5.0, fr_web=7.0),
    evaluation(5, "entry_end", "fr", no=6.0, fr_web=4.0),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run that is done."""
    root = tmp_path / "العربية"
    root.mkdir()
    (root / "config.yaml").write_text(CONFIG, encoding="utf-8")
    (root / "metrics.jsonl").write_text(lines(*METRICS))
    (root / "evaluations.jsonl").write_text(lines(*EVALUATIONS))
    (root / "status.json").write_text(json.dumps({"status": "done", "step": 5}))
    (root / "plan.json").write_text(
        json.dumps([{"first_batch": 0, "batches": [2, 9]}, {"first_batch": 3, "batches": [0, 2]}])
    )
    matrix = {"rows": [{}, {}, {}]}
    (root / "summary.json").write_text(json.dumps({"name": "x", "steps": 5, "matrix": matrix}))
    return root


def said(run: RunRecord) -> str:
    return "\n".join(run.notes)


def test_a_run_that_is_done_needs_no_note(folder: Path):
    run = read_run(folder)
    assert run.notes == ()
    assert run.finished
    assert (run.name, run.step, run.planned_batches) == ("x", 5, 5)
    assert list(run.metrics) == METRICS
    assert list(run.evaluations) == EVALUATIONS
    assert run.boundaries == [(2, "no"), (5, "fr")]
    assert run.set_tasks == {"no": "no", "fr_web": "fr"}
    assert run.trained_before == ["base"]


def test_sets_and_their_tasks_are_the_configurations_before_the_first_evaluation(folder: Path):
    (folder / "evaluations.jsonl").unlink()
    assert read_run(folder).set_tasks == {"no": "no", "fr_web": "fr", "fr_law": "fr"}


def test_a_run_that_goes_on(folder: Path):
    (folder / "summary.json").unlink()
    (folder / "status.json").write_text(json.dumps({"status": "running", "step": 2}))
    (folder / "metrics.jsonl").write_text(lines(*METRICS[:3]))
    (folder / "evaluations.jsonl").write_text(lines(*EVALUATIONS[:2]))
    run = read_run(folder)
    assert run.name == "日本語"
    assert not run.finished
    assert "still running, or killed: step 3 of 5; the matrix holds the 1 entry" in run.notes[0]
    assert "computed from evaluations.jsonl" in run.notes[1]
    assert run.boundaries == [(2, "no"), (3, "fr")]


def test_a_run_that_went_on_after_its_end(folder: Path):
    (folder / "status.json").write_text(json.dumps({"status": "running", "step": 5}))
    (folder / "metrics.jsonl").write_text(lines(*METRICS, metric(5, "fr")))
    run = read_run(folder)
    assert not run.finished
    assert "earlier end" in said(run)


def test_a_summary_with_fewer_entries_than_ended_is_of_earlier(folder: Path):
    (folder / "summary.json").write_text(json.dumps({"matrix": {"rows": [{}, {}]}, "steps": 5}))
    assert not read_run(folder).finished


def test_a_run_that_was_stopped_says_why(folder: Path):
    status = {"status": "stopped", "step": 2, "reason": "forgetting at step 2"}
    (folder / "status.json").write_text(json.dumps(status))
    assert "stopped: step 5 of 5" in said(read_run(folder))
    assert "forgetting at step 2" in said(read_run(folder))


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluations.jsonl"])
def test_a_torn_last_line(folder: Path, name: str):
    path = folder / name
    path.write_bytes(path.read_bytes()[:-20])
    run = read_run(folder)
    assert f"{name}: the last line is torn" in said(run)
    assert (len(run.metrics), len(run.evaluations)) in [(4, 3), (5, 2)]


def test_every_cut_of_the_files_is_read(folder: Path):
    for name in ("metrics.jsonl", "evaluations.jsonl", "summary.json", "config.yaml", "plan.json"):
        whole = (folder / name).read_bytes()
        for end in range(0, len(whole), 7):
            (folder / name).write_bytes(whole[:end])
            read_run(folder)
        (folder / name).write_bytes(whole)
    assert read_run(folder).notes == ()


def test_lines_that_come_again_count_once_and_the_last_one_counts(folder: Path):
    again = {**METRICS[1], "loss": 1.5}
    (folder / "metrics.jsonl").write_text(lines(*METRICS, again))
    (folder / "evaluations.jsonl").write_text(lines(*EVALUATIONS, EVALUATIONS[0]))
    run = read_run(folder)
    assert [line["batch"] for line in run.metrics] == [0, 1, 2, 3, 4]
    assert run.metrics[1]["loss"] == 1.5
    assert list(run.evaluations) == EVALUATIONS
    assert "metrics.jsonl: 1 line of a batch that comes again" in said(run)


def test_values_that_are_no_numbers_become_none(folder: Path):
    text = '{"step": null, "batch": 5, "task": 7, "loss": NaN, "lr": "x", "mfu": 1e999}\n'
    huge = '{"step": 6, "batch": 6, "task": "fr", "loss": 1' + 400 * "0" + "}\n"
    wrong = '[1]\n"text"\n{"batch": "x"}\n{no json}\n'
    (folder / "metrics.jsonl").write_text(lines(*METRICS) + text + wrong + huge)
    nothing = evaluation(6, "interval", "fr", no=None, fr_web=float("nan"))
    (folder / "evaluations.jsonl").write_text(lines(*EVALUATIONS, nothing, {"step": 9}))
    run = read_run(folder)
    empty = {"step": None, "batch": 5, "task": None, "loss": None, "lr": None, "mfu": None}
    assert run.metrics[5] == empty
    assert run.metrics[6]["loss"] is None
    assert "metrics.jsonl: 4 lines that could not be read left out" in said(run)
    assert run.evaluations[3]["losses"] == {"no": None, "fr_web": None}
    assert "evaluations.jsonl: 1 line that could not" in said(run)


def test_lines_cut_off_by_a_resume_are_named(folder: Path):
    (folder / "metrics.lost.jsonl").write_text(lines(METRICS[0]))
    assert "metrics.lost.jsonl: the run was resumed" in said(read_run(folder))


@pytest.mark.parametrize("content", ["", "[1, 2]", '{"a": ', "\x00", '"text"', "nan"])
def test_a_file_that_holds_something_else(folder: Path, content: str):
    names = ("status.json", "summary.json", "ledger.json", "environment.json", "plan.json")
    for name in (*names, "config.yaml"):
        (folder / name).write_text(content)
    run = read_run(folder)
    assert (run.status, run.summary, run.ledger, run.environment) == ({}, {}, {}, {})
    assert not run.finished
    assert all(name in said(run) for name in names[:4])
    assert run.boundaries == [(2, "no"), (5, "fr")]


def test_bytes_that_are_no_text(folder: Path):
    for path in folder.iterdir():
        path.write_bytes(b"\xff\xfe{}\n" + path.read_bytes())
    run = read_run(folder)
    assert len(run.metrics) == 5
    assert "summary.json is no JSON" in said(run)


def test_a_directory_that_only_began(tmp_path: Path):
    (tmp_path / "status.json").write_text(json.dumps({"status": "running", "step": 0}))
    run = read_run(tmp_path)
    assert (run.name, run.step, run.metrics, run.boundaries) == (tmp_path.name, 0, (), [])
    assert "no entry has ended" in said(run)


def test_what_is_no_run_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"missing: is no directory; allowed: the directory"):
        read_run(tmp_path / "missing")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"has none of status\.json"):
        read_run(tmp_path)
    with pytest.raises(DataError, match=r"notes\.txt: is no directory"):
        read_run(tmp_path / "notes.txt")
