"""Options that must change nothing, to the bit; and a gradient that must change nothing."""

import math

import pytest

pytestmark = pytest.mark.dist


def curve(lines):
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_epsilon_one_is_reptile_off(tiny, precision):
    options = (f"--precision={precision}", "--parallel.pp_size=2")
    tiny.train(tiny.write("off", lambda c: c.pop("reptile")), *options, world_size=2)
    tiny.train(tiny.write("on"), "--reptile.epsilon=1.0", *options, world_size=2)
    assert curve(tiny.lines("on")) == curve(tiny.lines("off"))
    assert sum("reptile_delta_norm" in line for line in tiny.lines("on")) == 5
    tiny.train(tiny.write("half"), *options, world_size=2)
    differs = [
        a != b for a, b in zip(curve(tiny.lines("half")), curve(tiny.lines("off")), strict=True)
    ]
    # The update after step 4 moves the weights that step 5 computes with: its loss shows it.
    assert differs.index(True) == 4


def test_alpha_zero_is_replay_off(tiny):
    tiny.train(tiny.write("off", lambda c: c.pop("replay")))
    tiny.train(tiny.write("zero", lambda c: c["replay"].update(alpha=0)))
    assert curve(tiny.lines("zero")) == curve(tiny.lines("off"))
    assert all(line["replay_rows"] == 0 for line in tiny.lines("zero"))
    tiny.train(tiny.write("some"))
    replayed = [line["replay_rows"] for line in tiny.lines("some")]
    # 0.3 x 8 rows a batch; the first task has nothing to replay yet.
    assert replayed[:7] == [0] * 7
    assert [sum(replayed[7 : 8 + t]) for t in range(7)] == [24 * (t + 1) // 10 for t in range(7)]
    assert all(
        (line["loss_replay"] is None) == (line["replay_rows"] == 0) for line in tiny.lines("some")
    )


@pytest.mark.parametrize(
    ("ranks", "rank", "options"),
    [
        pytest.param(4, 2, ("--precision=bf16", "--parallel.pp_size=2"), marks=pytest.mark.slow),
        (2, 1, ("--precision=fp32", "--parallel.tp_size=2")),
    ],
    ids=["bf16_pp2_dp2", "fp32_tp2"],
)
def test_non_finite_gradient_spends_the_batch_and_moves_nothing(tiny, ranks, rank, options):
    config = tiny.write("run")
    poison = {"batch": 8, "rank": rank}
    tiny.train(config, *options, world_size=ranks, poison=poison)
    lines = tiny.lines("run")
    assert [line["batch"] for line in lines] == list(range(20))
    assert [line["step"] for line in lines] == [*range(1, 9), None, *range(9, 20)]
    assert lines[8]["grad_norm"] is None
    assert math.isfinite(lines[8]["loss"])
    reptile = [line["step"] for line in lines if "reptile_delta_norm" in line]
    assert reptile == [4, 8, 12, 16], "k counts applied updates"
    rates = [line["lr"] for line in lines]
    assert rates[8] == rates[9], "the schedule counts applied updates"
    ledger = (tiny.folder / "run" / "ledger.json").read_text()
    assert '"skipped": 6' in ledger.replace("\n", " "), "8 rows less 2 replayed ones were skipped"
    # What an unpoisoned run does before the poisoned batch is the same.
    tiny.train(tiny.write("clean"), *options, world_size=ranks)
    assert curve(lines)[:8] == curve(tiny.lines("clean"))[:8]
    # The batch is spent, not repeated: killed after it and resumed, the lines are the same again.
    again = tiny.write("again")
    tiny.train(again, *options, world_size=ranks, poison=poison, kill_after=11, expect_failure=True)
    tiny.train(again, *options, world_size=ranks)
    assert curve(tiny.lines("again")) == curve(lines)
