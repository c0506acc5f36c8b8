"""The self test says that a resume is exact where it is, and where it is not the first difference.

Every start is the real program, and every kill a real one.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_mer.checkpoint.find import manifest_checksum
from megatron_mer.config import load_config
from megatron_mer.training.check_resume.check import SelfTest, check_resume
from megatron_mer.training.check_resume.verdict import Runs, judge

ROOT = Path(__file__).resolve().parents[2]
SHORT = ("--steps", "3", "--more", "3")

pytestmark = pytest.mark.dist


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def command(config, *arguments):
    tool = ROOT / "tools/check_resume.py"
    return [sys.executable, str(tool), "--config", str(config), *map(str, arguments)]


def check(config, *arguments):
    """Run the program; its exit code, what it printed and its errors."""
    done = subprocess.run(
        command(config, *arguments), capture_output=True, text=True, timeout=240, check=False
    )
    return done.returncode, done.stdout, done.stderr


def work_folders(tiny):
    return sorted(tiny.folder.glob("*.check_resume_*"))


def processes_of(folder):
    """Processes, zombies aside, with this folder on their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:
            continue
        if str(folder).encode() in line and b"check_resume.rank" in line:
            found.append(line)
    return found


@pytest.mark.slow
def test_one_rank_in_bf16_is_identical_and_leaves_nothing_behind(tiny):
    config = tiny.write("run")
    output = tiny.folder / "run"
    (output / "checkpoints/step_000000003").mkdir(parents=True)
    (output / "status.json").write_text('{"status": "done"}')
    before = snapshot(output)
    code, said, errors = check(config, *SHORT, "--precision", "bf16", "--checkpoint.keep_last=5")
    assert (code, errors) == (0, "")
    assert "stream.0.steps 7 -> stream.0.steps 1 (task en)" in said
    assert "checkpoint.keep_last 5 -> 1" in said
    last = said.splitlines()[-1]
    assert last.startswith("identical to the bit: 48 rows of batches, ")
    assert ", 6 gradient norms, " in last
    for kind in ("master", "exp_avg", "exp_avg_sq", "anchor", "last_delta"):
        assert f"38 {kind}" in last
    assert snapshot(output) == before
    assert sorted(path.name for path in tiny.folder.iterdir()) == ["run", "run.yaml"]


@pytest.fixture
def kept(tiny):
    """Two ranks with momentum: the folder that a test with --keep left, and what it said."""
    config = tiny.write("run")
    code, said, errors = check(config, *SHORT, "--ranks=2", "--keep", "--reptile.momentum=0.5")
    assert (code, errors) == (0, "")
    (work,) = work_folders(tiny)
    return work, said


def runs(work):
    return Runs(
        whole=work / "uninterrupted",
        killed=work / "interrupted",
        whole_records=work / "ranks/uninterrupted",
        killed_records=work / "ranks/interrupted",
        resumed_records=work / "ranks/resumed",
        loaded=work / "loaded/step_000000003",
        first_batch=3,
    )


def replace_line(path, key, value, change):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    (line,) = (line for line in lines if line[key] == value)
    change(line)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def set_number(checkpoint, rank, key, at, value):
    """Put another number into a checkpoint that stays whole by its checksums; the old number."""
    tensors = checkpoint / f"rank_{rank:05d}.safetensors"
    numbers = load_file(tensors)
    old = numbers[key][at].item()
    numbers[key][at] = value
    save_file(numbers, tensors)
    index = tensors.with_suffix(".json")
    for path, listed in ((tensors, index), (index, checkpoint / "manifest.json")):
        content = path.read_bytes()
        checksum = hashlib.sha256(content).hexdigest()
        for place in (listed, checkpoint / "manifest.json"):
            place.write_text(put_checksum(place, path.name, len(content), checksum))
    return old


def put_checksum(path, name, size, checksum):
    content = json.loads(path.read_text())
    facts = content["files"][name] if "files" in content else content["tensors"]
    facts.update(bytes=size, sha256=checksum)
    if "files" in content:
        content["sha256"] = manifest_checksum(content)
    return json.dumps(content)


def test_two_ranks_are_identical_and_any_difference_has_its_place(kept):
    work, said = kept
    assert "2/3 5 steps, a checkpoint at step 3, kill -9; 2 ranks" in said
    assert re.search(r"\d+ velocity", said)
    lost = (work / "interrupted/metrics.lost.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lost] == [4, 5]
    assert judge(runs(work), None).agrees

    checkpoint = work / "interrupted/checkpoints/step_000000006"
    key, index = "exp_avg/layers.3.mlp.up_proj.weight", checkpoint / "rank_00001.json"
    (entry,) = (one for one in json.loads(index.read_text())["fragments"]
                if (one["kind"], one["name"]) == tuple(key.split("/")))  # fmt: skip
    old = set_number(checkpoint, 1, key, 5, 0.25)
    verdict = judge(runs(work), None)
    row, column = divmod(entry["start"] + 5, entry["global_shape"][1])
    place = f"parameter layers.3.mlp.up_proj.weight (exp_avg), element [{row}, {column}]"
    assert verdict.lines[0] == f"DIFFERENT, first at {place}: {old} against 0.25"
    assert not verdict.agrees

    metrics = work / "interrupted/metrics.jsonl"
    norm = json.loads(metrics.read_text().splitlines()[4])["grad_norm"]
    replace_line(metrics, "step", 5, lambda line: line.update(grad_norm=1.5))
    first, *more = judge(runs(work), None).lines
    assert first == f"DIFFERENT, first at step 5, grad_norm: {norm} against 1.5"
    assert "differ in all: 1 gradient norms" in more[0]
    assert place in more[1]

    records = work / "ranks/resumed/rank_00001.jsonl"
    replace_line(records, "batch", 3, lambda line: line["rows"][2].__setitem__(2, 77))
    first = judge(runs(work), None).lines[0]
    assert re.search(r"first at batch 3, row 6: \w+ sample \d+ of \w+ .* against .* 77 of", first)

    # As if ranks that share a row had read other tokens.
    replace_line(records, "batch", 3, lambda line: line.update(first=0))
    first = judge(runs(work), None).lines[0]
    assert "first at batch 3, row 0: " in first
    assert "on rank_00000; " in first

    replace_line(
        work / "interrupted/metrics.lost.jsonl", "step", 4, lambda line: line.update(loss=9.0)
    )
    first, *more = judge(runs(work), None).lines
    assert first.startswith("DIFFERENT, first at step 4, loss: ")
    assert "before the kill" in more[-1]


@pytest.mark.slow
def test_another_layout_is_near_enough(tiny):
    config = tiny.write("run")
    code, said, errors = check(config, *SHORT, "--change-layout", "tp_size=2,ranks=2")
    assert (code, errors) == (0, "")
    assert "3/3 resume, 3 steps more; 2 ranks" in said
    first = next(line for line in said.splitlines() if line.startswith("agrees at the other "))
    assert re.search(r"identical to the bit \d+ fragments of weights \(.*\) as loaded, 24", first)
    assert "; within 1e-06 (" in first
    assert "gradient norms within 0.0001), relative: " in first
    worst = float(re.search(r"^  losses: (\S+), (step|eval)", said, re.MULTILINE)[1])
    assert 0 < worst < 1e-6
    assert re.search(r"^  exp_avg_sq: \S+, parameter \S+ \(exp_avg_sq\), element \[", said, re.M)
    assert work_folders(tiny) == []


@pytest.mark.parametrize(
    ("layout", "found"),
    [
        # The update at step 4 takes the moment up, and Reptile's delta has the update.
        pytest.param("", "step 4, reptile_delta_cosine: ", marks=pytest.mark.slow),
        # Too little for a loss to be 1e-6 off; what was loaded is compared to the bit.
        ("pp_size=2,ranks=2", "the state as loaded, parameter layers.2.input_norm.weight "
         "(exp_avg_sq), element [3]: "),
    ],
)  # fmt: skip
def test_one_number_that_changed_before_the_resume_is_found(tiny, layout, found):
    said, old = [], []

    def meanwhile(run):
        checkpoint = run / "checkpoints/step_000000003"
        old.append(set_number(checkpoint, 0, "exp_avg_sq/layers.2.input_norm.weight", 3, 0.5**40))

    test = SelfTest(
        config=load_config(tiny.write("run")), steps=3, more=3, layout=layout, timeout=120
    )
    verdict = check_resume(test, said.append, meanwhile)
    assert not verdict.agrees
    assert verdict.lines[0].startswith(f"DIFFERENT, first at {found}")
    if layout:
        assert verdict.lines[0].endswith(f": {old[0]} against {0.5**40}")
        assert verdict.lines[1].startswith("  differ in all: 1 of ")
    (work,) = work_folders(tiny)
    assert f"kept: {work} " in said[-1]
    assert judge(runs(work), 1e-6 if layout else None).lines == verdict.lines


@pytest.mark.slow
def test_data_that_changed_before_the_resume_are_found(tiny, corpus):
    for path in corpus.iterdir():
        shutil.copy(path, tiny.folder / path.name)
    here = str(tiny.folder)

    def change(config):
        for entry in config["stream"]:
            entry["train"] = [{"prefix": f"{here}/{entry['task']}"}]

    def meanwhile(run):
        path = tiny.folder / "fr.bin"
        path.write_bytes(bytes(reversed(path.read_bytes()[:64])) + path.read_bytes()[64:])
        swapped = path.read_bytes()
        path.write_bytes(swapped[2:] + swapped[:2])  # Every token in another place.

    test = SelfTest(config=load_config(tiny.write("run", change)), steps=3, more=3, timeout=120)
    verdict = check_resume(test, lambda line: None, meanwhile)
    (work,) = work_folders(tiny)
    lines = (work / "ranks/uninterrupted/rank_00000.jsonl").read_text().splitlines()
    rows = json.loads(lines[3])["rows"]
    row, (kind, _, sample, digest) = next(
        (place, row) for place, row in enumerate(rows) if row[1] == "fr"
    )
    text = f"{kind} sample {sample} of fr (content "
    place = f"DIFFERENT, first at batch 3, row {row}: {text}{digest}) against {text}"
    assert verdict.lines[0].startswith(place)


def test_a_difference_is_exit_code_1(tiny):
    program = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import check_resume as tool;"
        "from megatron_mer.training.check_resume import check;"
        "from megatron_mer.training.check_resume.verdict import Verdict;"
        "check.check_resume = lambda *test: Verdict(False, ['DIFFERENT, first at step 5']);"
        "sys.exit(tool.main())"
    )
    _, tool, *arguments = command(tiny.write("run"))
    done = subprocess.run(
        [sys.executable, "-c", program, str(Path(tool).parent), *arguments],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "DIFFERENT, first at step 5\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--change-layout", "tp=2"), "--change-layout: given 'tp=2'; allowed: KEY=NUMBER"),
        (("--change-layout", "tp_size=0"), "--change-layout: given 'tp_size=0'"),
        (("--change-layout", "ranks=2,ranks=4"), "each key once"),
        (("--change-layout", "pp_size=1"), "which is the layout that there is"),
        (("--change-layout", "tp_size=2"), "parallel: tp_size 2 x pp_size 1 = 2 ranks a replica"),
        (("--change-layout", "tp_size=3,ranks=3"), "model.num_heads: 4 does not divide"),
        (("--ranks", "0"), "--ranks: given 0; allowed: at least 1"),
        (("--tolerance", "0", "--timeout", "-1"), "--tolerance: given 0; allowed: above 0"),
        (("--ranks", "3"), "batch.global_batch_size: 8 rows do not divide"),
        (("--steps", "20"), "the stream has 20 steps"),
        (("--stream.1.train.0.prefix", "nowhere"), "stream.1.train.0.prefix: "),
        (("--work-dir", "INSIDE"), "which lies in the run's output_dir"),
    ],
)
def test_what_cannot_be_tested_is_a_clear_error(tiny, arguments, said):
    config = tiny.write("run")
    inside = tiny.folder / "run"
    arguments = [str(inside / "x") if word == "INSIDE" else word for word in arguments]
    code, printed, errors = check(config, *arguments)
    assert code == 2
    assert said in errors
    assert printed == ""
    assert "Traceback" not in errors
    assert sorted(path.name for path in tiny.folder.iterdir()) == ["run.yaml"]


def test_ranks_that_take_too_long_say_where_they_are_and_end(tiny):
    code, said, errors = check(tiny.write("run"), "--timeout", "0.5", "--ranks", "2")
    assert code == 1
    assert "ranks 0, 1 still ran after 0.5 s (--timeout); they last said:" in errors
    (work,) = work_folders(tiny)
    assert f"what was written so far is kept in {work}" in said
    assert f"rank 1 ({work}/ranks/uninterrupted/rank_00001.log)" in errors
    assert processes_of(tiny.folder) == []


def test_a_rank_that_fails_is_shown(tiny, monkeypatch):
    # No backend of this name, so that the ranks find out and not the check before them.
    monkeypatch.setenv("DS_ACCELERATOR", "abacus")
    code, _, errors = check(tiny.write("run"))
    assert code == 1
    assert "the training program failed: rank 0 with exit code 1; it last said:" in errors
    assert "abacus" in errors


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_no_rank_outlives_the_program(tiny, how):
    with subprocess.Popen(
        command(tiny.write("run"), "--ranks=2"), stdout=subprocess.PIPE, text=True
    ) as tool:
        while "1/3" not in tool.stdout.readline():
            assert tool.poll() is None
        wait_for(lambda: len(processes_of(tiny.folder)) == 2)
        tool.send_signal(how)
        assert tool.wait(20) == (130 if how == signal.SIGTERM else -signal.SIGKILL)
    wait_for(lambda: not processes_of(tiny.folder))
    assert len(work_folders(tiny)) == (0 if how == signal.SIGTERM else 1)


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def snapshot(folder):
    return [
        (str(path), os.stat(path).st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in [folder, *sorted(folder.rglob("*"))]
    ]
