"""A run that changes its mind: what it must accept, and that its rows are those of its plan."""

import json
import shutil

import pytest

from megatron_mer.continual.plan import Plan
from megatron_mer.data.indexed_dataset import IndexedDataset

pytestmark = pytest.mark.dist

SEQ_LENGTH = 32
FLAGS = ("--accept", "mix,replay", "--accept=batch-size")


def changed(corpus):
    """Smaller batches, more replay, and German among the French from batch 10 on."""

    def change(config):
        config["batch"]["global_batch_size"] = 4
        config["replay"] = {"alpha": 0.5, "policy": "equal"}
        french = config["stream"][1]
        french["train"] = [
            {"prefix": str(corpus / "fr"), "weight": 3, "max_epochs": 2},
            {"prefix": str(corpus / "de"), "weight": 1},
        ]

    return change


def recorded(folder, batch):
    """All rows of a batch in order: tokens and whether they were replayed."""
    parts = sorted(folder.glob(f"batch_{batch}_data_*_pipe_0_model_0"))
    rows = [row for part in parts for row in json.loads(part.read_text())]
    return [(row[: SEQ_LENGTH + 1], row[SEQ_LENGTH + 1]) for row in rows]


def planned(plan, corpus, batch):
    """The same from the plan and the datasets, without the loader."""
    rows = plan.rows(batch)
    places = zip(rows.dataset.tolist(), rows.sample.tolist(), rows.kind.tolist(), strict=True)
    return [
        (
            IndexedDataset(corpus / plan.datasets[dataset])
            .tokens(sample * SEQ_LENGTH, (sample + 1) * SEQ_LENGTH + 1)
            .tolist(),
            bool(kind),
        )
        for dataset, sample, kind in places
    ]


def test_changes_are_refused_accepted_and_kept_over_kills_and_layouts(tiny, corpus, tmp_path):
    for name in ("run", "other"):
        tiny.train(tiny.write(name), kill_after=10, expect_failure=True)
        tiny.write(name, changed(corpus))
    config = tiny.folder / "run.yaml"
    printed = tiny.train(config, "--accept=mix", expect_failure=True, output=True)
    for line in (
        "from batch 10: global_batch_size was 8, is 4; accept it with --accept batch-size",
        "from batch 10: replay.alpha was 0.3, is 0.5, replay.policy was uniform, is equal",
        "accept it with --accept replay (another alpha or policy of replay",
    ):
        assert line in printed
    assert "dataset 'de' was not there" not in printed  # That one was accepted.
    assert len(tiny.lines("run")) == 11

    folder = tmp_path / "record"
    folder.mkdir()
    tiny.train(config, *FLAGS, kill_after=12, expect_failure=True)
    # No checkpoint has the change yet.
    printed = tiny.train(config, expect_failure=True, output=True)
    assert "from batch 10: stream.1 (task 'fr'): dataset 'de' was not there" in printed
    tiny.train(config, *FLAGS, kill_after=16, expect_failure=True, record=str(folder))
    tiny.train(config, record=str(folder))
    assert [line["step"] for line in tiny.lines("run")] == list(range(1, 21))
    assert tiny.lines("run")[-1]["consumed_samples"] == 10 * 8 + 10 * 4
    log = (tiny.folder / "run" / "train.log").read_text()
    assert "accepted, from batch 10: global_batch_size was 8, is 4" in log

    plan = Plan.from_history(json.loads((tiny.folder / "run" / "plan.json").read_text()))
    assert [segment.first_batch for segment in plan.segments] == [0, 10]
    for batch in range(10, 20):
        assert recorded(folder, batch) == planned(plan, corpus, batch)
    ledger = json.loads((tiny.folder / "run" / "ledger.json").read_text())
    assert ledger == plan.ledger(20)
    assert sum(one["fresh"] for one in ledger["datasets"].values()) == plan.fresh_rows_before(20)

    # Never killed again and on two ranks: the same rows.
    others = tmp_path / "others"
    others.mkdir()
    other = tiny.folder / "other.yaml"
    tiny.train(other, *FLAGS, world_size=2, record=str(others))
    for batch in range(10, 20):
        assert recorded(others, batch) == recorded(folder, batch)
    for one, two in zip(tiny.lines("run"), tiny.lines("other"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)


def test_killed_after_a_change_resumes_to_the_bit(tiny, corpus):
    for name in ("alone", "killed"):
        tiny.train(tiny.write(name), kill_after=10, expect_failure=True)
        tiny.write(name, changed(corpus))
    tiny.train(tiny.folder / "alone.yaml", *FLAGS)
    killed = tiny.folder / "killed.yaml"
    tiny.train(killed, *FLAGS, kill_after=11, expect_failure=True)
    tiny.train(killed, *FLAGS, kill_after=15, expect_failure=True)
    tiny.train(killed)
    assert tiny.results("killed") == tiny.results("alone")
    for file in ("plan.json", "ledger.json"):
        paths = [tiny.folder / name / file for name in ("killed", "alone")]
        assert paths[0].read_text() == paths[1].read_text()


def test_data_that_left_the_mix_is_still_replayed_and_missed_where_it_is_gone(tiny, corpus):
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(f"{corpus / 'de'}{suffix}", tiny.folder / f"extra{suffix}")

    def two(config):
        config["stream"][0]["train"] = [
            {"prefix": str(corpus / "en")},
            {"prefix": str(tiny.folder / "extra")},
        ]
        config["replay"]["include_current_task"] = True

    def one(config):
        two(config)
        del config["stream"][0]["train"][1]

    config = tiny.write("run", two)
    tiny.train(config, "--checkpoint.every_steps=3", kill_after=3, expect_failure=True)
    tiny.write("run", one)
    (tiny.folder / "extra.bin").rename(tiny.folder / "hidden")
    printed = tiny.train(config, "--accept=mix", expect_failure=True, output=True)
    assert "dataset 'extra', trained on and now in the replay pool, left the config" in printed
    assert "extra.bin" in printed
    (tiny.folder / "hidden").rename(tiny.folder / "extra.bin")
    tiny.train(config, "--accept=mix")
    extra = json.loads((tiny.folder / "run" / "ledger.json").read_text())["datasets"]["extra"]
    assert extra["fresh"] > 0
    assert extra["replayed"] > 0
    # The next start knows where it lies as well.
    more = {"task": "more", "train": [{"prefix": str(corpus / "fr")}], "steps": 2, "max_epochs": 4}

    def longer(config):
        one(config)
        config["stream"].append(more)

    tiny.write("run", longer)
    tiny.train(config, "--schedule.total_steps=20")
    assert len(tiny.lines("run")) == 22


def test_the_same_data_under_another_name_is_refused(tiny, corpus):
    tiny.train(tiny.write("run"), kill_after=10, expect_failure=True)

    def renamed(config):
        config["stream"][2]["train"] = [{"prefix": str(corpus / "en"), "name": "english"}]

    config = tiny.write("run", renamed)
    printed = tiny.train(config, "--accept=mix", expect_failure=True, output=True)
    assert (
        "dataset 'english' holds the data that the run knows as 'en': under two names its"
        in printed
    )
    assert "write `name: en` beside its prefix" in printed


def test_a_longer_stream_takes_a_second_schedule(tiny):
    tiny.train(tiny.write("run"))
    config = tiny.write("run", lambda config: config["stream"][2].update(steps=10))
    printed = tiny.train(config, expect_failure=True, output=True)
    assert "from batch 20: stream.2 (task 'de'): its length was 6 steps, is 10 steps" in printed
    assert "the rate would go from 0.0001 to 0.0001782 at step 20" in printed
    then = "--schedule.then=[{kind: cosine, steps: 4, lr: 5.0e-4, warmup_steps: 2, min_lr: 0.0}]"
    tiny.train(config, "--accept=length", "--schedule.total_steps=20", then)
    rates = [line["lr"] for line in tiny.lines("run")]
    assert len(rates) == 24
    assert rates[20:] == pytest.approx([3e-4, 5e-4, 5e-4, 2.5e-4])
