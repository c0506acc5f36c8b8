"""A killed run goes on as if nothing had happened."""

import random

import pytest

pytestmark = pytest.mark.dist

CASES = {
    "bf16_pp2_dp2": (4, ("--precision=bf16", "--parallel.pp_size=2")),
    "fp32_pp2_dp2": (4, ("--precision=fp32", "--parallel.pp_size=2")),
    "bf16_tp2": (2, ("--precision=bf16", "--parallel.tp_size=2")),
    "fp32_tp2": (2, ("--precision=fp32", "--parallel.tp_size=2")),
}
LONG = {"bf16_tp2", "bf16_pp2_dp2", "fp32_tp2"}


@pytest.mark.parametrize(
    "case", [pytest.param(n, marks=pytest.mark.slow if n in LONG else ()) for n in CASES]
)
def test_killed_in_mid_interval_and_task_resumes_to_the_bit(tiny, case):
    ranks, options = CASES[case]
    tiny.train(tiny.write("alone"), *options, world_size=ranks)
    config = tiny.write("killed")
    # The checkpoint at step 10 lies inside a Reptile interval (k 4) and a task (7 + 7 + 6); the
    # lines of two further steps are written, lost, and written again.
    codes = tiny.train(config, *options, world_size=ranks, kill_after=11, expect_failure=True)
    assert set(codes) == {-9}
    assert len(tiny.lines("killed")) == 12
    tiny.train(config, *options, world_size=ranks)
    assert [line["step"] for line in tiny.lines("killed")] == list(range(1, 21))
    assert tiny.results("killed") == tiny.results("alone")
    lost = tiny.lines("killed", "metrics.lost.jsonl")
    assert [line["step"] for line in lost] == [11, 12]
    evaluations = tiny.results("killed", "evaluations.jsonl")
    assert evaluations == tiny.results("alone", "evaluations.jsonl")
    assert [line["step"] for line in evaluations] == [0, 7, 14, 20]


@pytest.mark.slow
def test_recomputing_activations_changes_no_bit(tiny):
    options = ("--precision=bf16", "--parallel.pp_size=2")
    tiny.train(tiny.write("kept"), *options, world_size=2)
    again = (*options, "--parallel.activation_checkpointing=full")
    said = tiny.train(tiny.write("recomputed"), *again, world_size=2, count_blocks=True)
    plain = tiny.train(tiny.write("counted"), *options, world_size=2, count_blocks=True)
    # A training step runs each block a second time, an evaluation does not: 20 steps of 8 micro
    # batches, 4 blocks in all.
    assert sum(said) - sum(plain) == 20 * 8 * 4
    assert tiny.results("recomputed") == tiny.results("kept")


@pytest.mark.slow
def test_killed_before_the_first_checkpoint_begins_again(tiny):
    tiny.train(tiny.write("alone"))
    config = tiny.write("killed")
    assert tiny.train(config, kill_after=2, expect_failure=True) == [-9]
    tiny.train(config)
    assert tiny.results("killed") == tiny.results("alone")
    assert tiny.results("killed", "evaluations.jsonl") == tiny.results("alone", "evaluations.jsonl")


def test_a_flipped_bit_in_the_newest_checkpoint_falls_back_to_the_one_before(tiny):
    tiny.train(tiny.write("alone"), world_size=2)
    config = tiny.write("killed")
    tiny.train(config, world_size=2, kill_after=11, expect_failure=True)
    # Rank 1 alone reads this file. The flip is of an fp32 number's low bits: nothing else would
    # ever notice it.
    path = tiny.folder / "killed/checkpoints/step_000000010/rank_00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)
    tiny.train(config, world_size=2)
    assert tiny.results("killed") == tiny.results("alone")
    log = (tiny.folder / "killed/train.log").read_text()
    assert log.count("not a whole checkpoint, resuming from step_000000007: ") == 1
    assert f"{path}: expected SHA-256 " in log
    assert "resuming after batch 7 (step 7)" in log


def test_checkpoints_at_the_ends_of_tasks_stay(tiny):
    options = (
        "--checkpoint.every_steps=2",
        "--checkpoint.keep_last=1",
        "--checkpoint.keep_every=8",
    )
    tiny.train(tiny.write("run"), *options)
    found = sorted(path.name for path in (tiny.folder / "run/checkpoints").glob("step_*"))
    assert found == [f"step_{step:09d}" for step in (7, 8, 14, 16, 20)]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES)
def test_killed_again_and_again_resumes_to_the_bit(tiny, case):
    ranks, options = CASES[case]
    options = (*options, "--checkpoint.every_steps=2", "--reptile.momentum=0.5")
    tiny.train(tiny.write("alone"), *options, world_size=ranks)
    config = tiny.write("killed")
    # Each kill comes at least two steps after the last one, so that the run gets on.
    moments = sorted(random.Random(case).sample(range(2, 20, 2), 6))
    for moment in moments:
        codes = tiny.train(
            config, *options, world_size=ranks, kill_after=moment, expect_failure=True
        )
        assert set(codes) == {-9}
    tiny.train(config, *options, world_size=ranks)
    assert tiny.results("killed") == tiny.results("alone")
    assert tiny.results("killed", "evaluations.jsonl") == tiny.results("alone", "evaluations.jsonl")
