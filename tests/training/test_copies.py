"""A run whose checkpoints are copied to a second place, and the way back from there."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_mer.checkpoint import Copier, damaged, open_place
from megatron_mer.checkpoint.layout import step_directories
from megatron_mer.config import load_config
from megatron_mer.config.checks import check_run
from megatron_mer.errors import CheckpointError, ConfigError
from megatron_mer.training import bring_back as way_back
from megatron_mer.training import copies
from megatron_mer.training.copies import copier, describe_copies, refuse_fresh
from megatron_mer.training.copy_target import copy_target_problems
from megatron_mer.training.outputs import RunDirectory
from megatron_mer.training.preflight import prepare
from tests.checkpoint.saved import save


def short(config):
    """Nine steps of two tasks, checkpoints at 3, 5, 6 and 9."""
    config["stream"] = [{**config["stream"][0], "steps": 5}, {**config["stream"][1], "steps": 4}]
    config["checkpoint"]["every_steps"] = 3


def with_copies(place):
    def change(config):
        short(config)
        config["checkpoint"]["copy_to"] = str(place)
        config["name"] = "run"

    return change


@pytest.mark.dist
def test_copies_change_no_bit_and_a_run_goes_on_from_them_alone(tiny):
    tiny.train(tiny.write("alone", short), world_size=2)
    place = tiny.folder / "place"
    config = tiny.write("run", with_copies(place))
    codes = tiny.train(config, world_size=2, kill_after=7, expect_failure=True)
    assert set(codes) == {-9}
    here = tiny.folder / "run"
    copies = step_directories(place)
    assert [path.name for path in copies] == ["step_000000006", "step_000000005"]
    assert [damaged(path) for path in copies] == [None, None]
    assert tiny.results("run") == tiny.results("alone")[:8]
    # All is lost but the copies, of which the newest has a flipped bit of an fp32 number. Other
    # ranks than wrote it read it.
    shutil.rmtree(here)
    torn = place / "step_000000006/rank_00001.safetensors"
    content = bytearray(torn.read_bytes())
    content[-4] ^= 1
    torn.write_bytes(content)
    tiny.train(config, world_size=2)
    assert tiny.results("run") == tiny.results("alone")
    assert tiny.results("run", "evaluations.jsonl") == tiny.results("alone", "evaluations.jsonl")
    log = (here / "train.log").read_text()
    assert "not a whole copy, step_000000006 is not brought back" in log
    assert f"step_000000005 was brought back from {place}" in log
    assert "resuming after batch 5 (step 5)" in log
    # A start of a run that is done copies what is missing.
    shutil.rmtree(place / "step_000000009")
    tiny.train(config)
    names = [path.name for path in step_directories(here / "checkpoints")]
    assert [path.name for path in step_directories(place)] == names
    assert [damaged(path) for path in step_directories(place)] == [None] * len(names)
    assert (place / "latest").read_text() == "step_000000009\n"
    # A run that is done and lost its directory is described again too.
    described = {name: (here / name).read_text() for name in ("config.yaml", "plan.json")}
    shutil.rmtree(here)
    tiny.train(config)
    assert {name: (here / name).read_text() for name in described} == described
    assert {"environment.json", "summary.json"} <= {path.name for path in here.iterdir()}
    assert tiny.results("run") == tiny.results("alone")


@pytest.fixture
def two(tiny):
    """Configuration, directory and place of a run with checkpoints 7 and 10, copied."""
    place = tiny.folder / "place"
    config = load_config(tiny.write("run", with_copies(place)))
    outputs = RunDirectory(config.output_dir)
    outputs.make()
    for step in (7, 10):
        save(outputs.checkpoints, step)
    copy(config, outputs)
    return config, outputs, open_place(str(place))


def copy(config, outputs):
    copies = copier(config, outputs)
    assert isinstance(copies, Copier)
    copies.start()
    copies.finish(20.0)
    assert copies.missing() == []


def looked(config, outputs):
    """What rank 0 finds to bring back."""
    return way_back._to_bring_back(prepare(config, 1), outputs, (), {})


def test_nothing_is_brought_back_to_a_run_that_has_it(two):
    config, outputs, _ = two
    assert looked(config, outputs) is None
    assert "newest copy" in str(describe_copies(config, outputs))


def test_a_copy_that_the_configuration_may_not_continue_is_refused_before_it_is_fetched(
    two, monkeypatch
):
    config, outputs, place = two
    shutil.rmtree(outputs.root)
    outputs.make()
    assert "step_000000010 would first be brought back" in str(describe_copies(config, outputs))
    owner = place.owner()
    refusal = ConfigError("model.num_layers: given 8, was 4")
    monkeypatch.setattr(way_back, "resumed", lambda *_: (_ for _ in ()).throw(refusal))
    with pytest.raises(ConfigError, match=r"checkpoint\.copy_to: .* may not continue"):
        looked(config, outputs)
    assert place.owner() == owner
    assert not outputs.has_checkpoint()


def test_a_lost_run_takes_its_place_over(two, monkeypatch):
    config, outputs, place = two
    shutil.rmtree(outputs.root)
    outputs.make()
    monkeypatch.setattr(way_back, "resumed", lambda *_: None)
    found = looked(config, outputs)
    assert found is not None
    assert found[0] == "step_000000010"
    owner = place.owner()
    assert owner is not None
    assert owner["id"] == (outputs.root / "run_id").read_text().strip()


def test_the_copies_of_another_run_are_refused(two, tiny):
    _, outputs, place = two
    other = load_config(tiny.write("other", with_copies(place.url)))
    there = RunDirectory(other.output_dir)
    there.make()
    # The first lives.
    with pytest.raises(ConfigError, match=r"copies of another run, run \(output_dir .*/run\)"):
        looked(other, there)
    assert "a start would be refused" in str(describe_copies(other, there))
    # It is gone, but has another name.
    shutil.rmtree(outputs.root)
    named = load_config(tiny.folder / "other.yaml", ["--name=other"])
    with pytest.raises(ConfigError, match="copies of another run"):
        looked(named, there)
    # It has the name, but checkpoints of its own.
    save(there.checkpoints, 3)
    with pytest.raises(ConfigError, match="copies of another run"):
        looked(other, there)


def test_checkpoints_without_an_owner_are_refused(tiny):
    save(tiny.folder / "place", 5)
    config = load_config(tiny.write("run", with_copies(tiny.folder / "place")))
    outputs = RunDirectory(config.output_dir)
    outputs.make()
    with pytest.raises(ConfigError, match="step_000000005, which no run has copied there"):
        looked(config, outputs)


def test_a_fresh_run_removes_no_copies(two):
    config, _, place = two
    with pytest.raises(ConfigError, match=r"checkpoint\.copy_to: given .* step_000000010"):
        refuse_fresh(config)
    for name in place.steps():
        place._remove(name)
    refuse_fresh(config)


def test_a_place_that_does_not_answer(two, monkeypatch):
    config, outputs, _ = two
    said = []
    monkeypatch.setattr(copies.logger, "warning", lambda text, *given: said.append(text % given))

    def away(*_):
        raise ConnectionError("no route")

    monkeypatch.setattr(way_back, "look", away)
    assert looked(config, outputs) is None
    assert any("cannot be looked at (ConnectionError: no route)" in line for line in said)
    # A run that has lost its checkpoints must not begin anew over its copies.
    outputs.write_status("running", 10)
    shutil.rmtree(outputs.checkpoints)
    with pytest.raises(CheckpointError, match=r"has lost its checkpoints, and .*place"):
        looked(config, outputs)


def test_the_place_is_checked_before_training(tiny, tmp_path: Path):
    (tmp_path / "file").write_text("")
    wrong = {
        "nowhere://bucket/run": "unknown protocol; allowed: a directory, or a URL",
        f"{tmp_path}/file/below": "no directory that can be written",
    }
    for place, text in wrong.items():
        config = load_config(tiny.write("run", with_copies(place)))
        with pytest.raises(ConfigError, match=r"checkpoint\.copy_to: given ") as error:
            prepare(config, 1)
        assert text in str(error.value)
    assert list(copy_target_problems(f"file://{tmp_path}/new/below")) == []
    assert list(copy_target_problems("memory://run")) == []


def test_a_protocol_whose_package_is_missing_says_what_to_install(monkeypatch):
    import fsspec

    def missing(protocol):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    (problem,) = copy_target_problems("s3://bucket/run")
    assert f"pip install s3fs=={fsspec.__version__}" in str(problem)
    (problem,) = copy_target_problems("abfs://bucket/run")
    assert str(problem).endswith("pip install adlfs")


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("OUT", "lies in output_dir"),
        ("OUT/checkpoints", "lies in output_dir"),
        ("file://OUT/checkpoints/there", "lies in output_dir"),
        ("s3://", "such as s3://bucket/run"),
        ("simplecache::s3://bucket/run", "such as s3://bucket/run"),
        ("ftp://me:secret@host/run", "a password"),
    ],
)
def test_places_that_cannot_be(tiny, place, text):
    out = str(tiny.folder / "run")
    with pytest.raises(ConfigError) as error:
        load_config(tiny.write("run", with_copies(place.replace("OUT", out))))
    (problem,) = error.value.problems
    assert problem.path == "checkpoint.copy_to"
    assert text in str(problem)
    assert "secret" not in str(problem)


def test_places_that_can_be(tiny):
    for place in ("s3://bucket/run", "s3://key@bucket/run", str(tiny.folder / "run_copies")):
        assert check_run(load_config(tiny.write("run", with_copies(place)))) == []


def test_a_dry_run_tells_of_the_copies(two):
    from megatron_mer.training.dry_run import _copies

    config, outputs, place = two
    assert _copies(config, outputs) == f"the newest copy in {place.url} is step_000000010"
    assert json.loads((outputs.root / "../place/run.json").read_text())["name"] == "run"
