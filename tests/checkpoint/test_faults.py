"""What else may lie where checkpoints are wanted: torn, flipped, foreign, in the way."""

import json
import logging
import os
import random
import shutil
from pathlib import Path

import pytest

from megatron_mer.checkpoint import CheckpointReader, candidates, damaged, find_latest, first_whole
from megatron_mer.checkpoint.find import broken, manifest_checksum
from megatron_mer.errors import CheckpointError
from tests.checkpoint.saved import fragment, names, save, stored_value

FILES = ["rank_00000.safetensors", "rank_00000.json", "run_state.json", "manifest.json"]


@pytest.fixture
def two(tmp_path: Path) -> Path:
    save(tmp_path, 10)
    save(tmp_path, 20)
    return tmp_path


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """The warnings so far."""
    monkeypatch.setattr(logging.getLogger("megatron_mer"), "propagate", True)
    return lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def content(path: Path) -> dict[str, bytes]:
    return {str(one.relative_to(path)): one.read_bytes() for one in path.rglob("*")
            if one.is_file()}  # fmt: skip


def chosen(root: Path) -> Path | None:
    """What a start goes on from, every byte read."""
    return first_whole(candidates(root), damaged)


@pytest.mark.parametrize("file", FILES)
def test_torn_anywhere(two: Path, file: str):
    whole, older = content(two / "step_000000020"), content(two / "step_000000010")
    path = two / "step_000000020" / file
    size = len(whole[file])
    for length in (0, 1, 8, size // 3, size - 1):
        path.write_bytes(whole[file][:length])
        assert broken(path.parent) is not None, length
        assert stored_value(two) == 10
    path.write_bytes(whole[file])
    assert chosen(two) == path.parent
    assert content(two / "step_000000010") == older


def test_any_flipped_bit_of_a_manifest_is_found(two: Path):
    """But one that changes no value, as in white space or in the checksum's own name."""
    path = two / "step_000000020/manifest.json"
    good = path.read_bytes()
    values = json.loads(good)
    draw, harmless, refused = random.Random(1), 0, 0
    for at in range(len(good)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << draw.randrange(8)]) + good[at + 1 :])
        try:
            problem = damaged(path.parent)
        except CheckpointError as error:  # A version that never was.
            refused += 1
            problem = str(error)
        if problem is None:
            left = json.loads(path.read_bytes())
            assert {key: left.get(key) for key in values if key != "sha256"} == {
                key: value for key, value in values.items() if key != "sha256"
            }
            harmless += 1
        else:
            assert str(path.parent) in problem
            if "has checkpoint format" not in problem:
                assert chosen(two) == two / "step_000000010"
    assert harmless < 20
    assert refused <= 1


def test_a_manifest_of_before_needs_no_checksum_of_its_own(two: Path):
    path = two / "step_000000020/manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest.pop("sha256") == manifest_checksum(manifest)
    path.write_text(json.dumps(manifest))
    assert chosen(two) == path.parent
    path.write_text(json.dumps({**manifest, "permanent": True, "sha256": "0" * 64}))
    problem = broken(path.parent)
    assert problem is not None
    assert problem.startswith(f"{path}: expected SHA-256 {'0' * 64} of its values, found ")


def test_a_checkpoint_under_another_step_is_none(two: Path):
    shutil.copytree(two / "step_000000010", two / "step_000000030")
    (two / "latest").unlink()
    assert "expected step 30 by its name, found 10" in str(broken(two / "step_000000030"))
    assert stored_value(two) == 20


LATEST = {
    "empty": "",
    "garbage": "\0\xff\x07" * 50,
    "many digits": "step_" + "9" * 6000,
    "a path": "../other/step_000000099",
    "an absolute path": "/{other}/step_000000099",
    "no step": "stfp_000000020",
    "unfinished": "step_000000020.tmp",
}


@pytest.mark.parametrize("text", LATEST.values(), ids=LATEST)
def test_a_latest_that_names_no_step_here(two: Path, said, tmp_path_factory, text: str):
    other = two.parent / "other" if ".." in text else tmp_path_factory.mktemp("other")
    save(other, 99)  # Whole, but of another run.
    (two / "latest").write_text(text.replace("/{other}", str(other)), encoding="latin-1")
    assert stored_value(two) == 20
    assert chosen(two) == two / "step_000000020"
    (first, _) = said()
    assert first.startswith(f"{two / 'latest'}: expected step_NUMBER, found ")
    assert first.endswith("; the newest whole checkpoint is taken")
    for path in two.glob("step_*"):
        shutil.rmtree(path)
    with pytest.raises(CheckpointError, match=r"expected step_NUMBER, found .* begin anew"):
        find_latest(two)
    shutil.rmtree(other)


def test_a_latest_that_is_a_directory(two: Path, said):
    (two / "latest").unlink()
    (two / "latest").mkdir()
    assert stored_value(two) == 20
    assert "latest cannot be read (Is a directory)" in said()[0]
    before = content(two)
    with pytest.raises(CheckpointError, match="Is a directory"):
        save(two, 30)
    assert before.items() <= content(two).items()
    assert stored_value(two) == 30  # It has its name, and every byte.


def test_a_kill_before_latest_is_written_goes_on_from_what_it_names(two: Path):
    (two / "latest").write_text("step_000000010\n")
    assert stored_value(two) == 10
    save(two, 20, 7.0)
    assert stored_value(two) == 7.0
    assert names(two) == ["latest", "step_000000010", "step_000000020"]
    # What `latest` names is torn: the one that is newer, or older, but whole.
    (two / "latest").write_text("step_000000010\n")
    os.truncate(two / "step_000000010/run_state.json", 3)
    assert stored_value(two) == 7.0


@pytest.fixture
def foreign(two: Path) -> dict[str, bytes]:
    """What other programs and people put beside the checkpoints."""
    for name in ("step_000000005", "step_000000099", "step_000000010.old", "step_5", "global_step3",
                 "step_backup.tmp", "step_mine.replaced"):  # fmt: skip
        (two / name).mkdir()
        (two / name / "model.pt").write_bytes(b"weights")
    (two / "step_000000007").write_bytes(b"a file")
    (two / "notes.txt").write_bytes(b"what I tried")
    return {name: one for name, one in content(two).items() if not name.startswith(
        ("latest", "step_000000010/", "step_000000020/"))}  # fmt: skip


def test_nothing_foreign_is_taken_or_removed(two: Path, foreign: dict[str, bytes]):
    assert len(foreign) == 9
    assert stored_value(two) == 20
    for step in (30, 40):
        save(two, step, keep_last=1)
        assert stored_value(two) == step
    assert foreign.items() <= content(two).items()
    assert names(two)[1:] == sorted({"latest", "step_000000040", *(
        name.split("/")[0] for name in foreign)})[1:]  # fmt: skip
    # The newest by number is foreign: a warning, and the whole one.
    (two / "latest").unlink()
    assert stored_value(two) == 40


@pytest.mark.parametrize("step", [5, 7, 99])
def test_what_is_foreign_is_not_written_over(two: Path, foreign: dict[str, bytes], step: int):
    before = content(two)
    with pytest.raises(CheckpointError) as caught:
        save(two, step)
    path = two / f"step_{step:09d}"
    assert f"{path} was not written" in str(caught.value)
    assert f"{path} is there and is no checkpoint; move it to another place" in str(caught.value)
    assert content(two) == before
    path.rename(two / "aside")
    save(two, step)
    assert stored_value(two) == step


def test_only_foreign_ones_is_an_error_and_no_new_beginning(tmp_path: Path):
    (tmp_path / "step_000000100").mkdir()
    (tmp_path / "step_000000100/optim.pt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"step_000000100/manifest\.json: expected a file"):
        chosen(tmp_path)


@pytest.mark.parametrize("text", ['{"format": 2, "files": []}', "[]", "3", '{"format": 2}', "{}"])
def test_a_manifest_of_another_program(two: Path, text: str):
    (two / "step_000000020/manifest.json").write_text(text)
    assert chosen(two) == two / "step_000000010"


def test_a_newer_format_is_left_alone_by_the_next_checkpoints(two: Path, said):
    path = two / "step_000000010/manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    before = content(path.parent)
    for step in (30, 40):
        save(two, step, keep_last=1)
        assert stored_value(two) == step
    assert content(path.parent) == before
    assert "format 99" in said()[0]


def test_files_beside_those_of_a_checkpoint_do_no_harm(two: Path):
    (two / "step_000000020/README").write_text("the good one")
    (two / "step_000000020/more").mkdir()
    assert chosen(two) == two / "step_000000020"
    target = fragment(0.0)
    CheckpointReader(two / "step_000000020").fill(target)
    assert target.tensor[0] == 20


@pytest.mark.parametrize("file", FILES)
def test_a_directory_where_a_file_is_wanted(two: Path, file: str):
    path = two / "step_000000020" / file
    path.unlink()
    path.mkdir()
    assert broken(path.parent) is not None
    assert chosen(two) == two / "step_000000010"


def test_a_file_where_a_directory_is_wanted(two: Path):
    (two / "step_000000030.tmp").write_bytes(b"no directory")
    before = content(two)
    with pytest.raises(CheckpointError, match=r"Not a directory: .*step_000000030\.tmp"):
        save(two, 30)
    assert content(two) == before


def test_a_rank_that_outlives_its_run_cannot_pass_for_one_of_the_next(tmp_path: Path):
    """It writes into the same temporary directory; what it spoils is found, and the older taken."""
    from threading import Event

    from megatron_mer.checkpoint.save import commit, write_manifest, write_rank

    save(tmp_path, 10)
    temporary = tmp_path / "step_000000020.tmp"
    write_rank(temporary, [fragment(20.0)], 0, 1, Event())
    index = (temporary / "rank_00000.json").read_bytes()
    write_rank(temporary, [fragment(3.0)], 0, 1, Event())
    (temporary / "rank_00000.json").write_bytes(index)  # Theirs came last, the numbers did not.
    write_manifest(temporary, 20, 1, b'{"value": 20.0}', permanent=False)
    commit(tmp_path, temporary, tmp_path / "step_000000020")
    assert "expected SHA-256" in str(damaged(tmp_path / "step_000000020"))
    assert chosen(tmp_path) == tmp_path / "step_000000010"
