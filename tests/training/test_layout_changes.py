"""A checkpoint of any layout goes on at any other, with moments, anchor, velocity and replay."""

import shutil

import pytest

pytestmark = pytest.mark.dist

LAYOUTS = {
    "one": (1,),
    "tp2": (2, "--parallel.tp_size=2"),
    "pp2": (2, "--parallel.pp_size=2"),
    "dp4_micro2": (4, "--batch.micro_batch_size=2"),
    "tp2_pp2_dp2": (8, "--parallel.tp_size=2", "--parallel.pp_size=2"),
}
KEYS = ("loss", "loss_fresh", "loss_replay", "grad_norm")
STEPS = slice(10, 14)  # the first four after the checkpoint


def pairs():
    for saved in LAYOUTS:
        for loaded in LAYOUTS:
            if saved != loaded:
                shown = {(saved, loaded)} & {("one", "tp2_pp2_dp2")}
                yield pytest.param(saved, loaded, marks=() if shown else pytest.mark.slow)


@pytest.mark.parametrize(
    "extra",
    [("--reptile.momentum=0.5",), pytest.param((), marks=pytest.mark.slow)],
    ids=["momentum", "cosine"],
)
@pytest.mark.parametrize(("saved", "loaded"), list(pairs()))
def test_a_checkpoint_goes_on_at_another_layout(tiny, saved, loaded, extra):
    def change(config):
        config["precision"] = "fp32"
        config["optimizer"]["lr"] = 1e-3

    ranks, *options = LAYOUTS[saved]
    config = tiny.write("run", change)
    tiny.train(config, *options, *extra, world_size=ranks, kill_after=11, expect_failure=True)
    shutil.copytree(tiny.folder / "run", tiny.folder / "other")
    tiny.train(config, *options, *extra, world_size=ranks)
    ranks, *options = LAYOUTS[loaded]
    tiny.train(tiny.write("other", change), *options, *extra, world_size=ranks)
    mine, reference = tiny.lines("other")[STEPS], tiny.lines("run")[STEPS]
    assert [line["step"] for line in mine] == [11, 12, 13, 14]
    for key in KEYS:
        worst = max(abs(a[key] - b[key]) for a, b in zip(mine, reference, strict=True))
        assert worst <= 1e-6, f"{key} is {worst} off"
    for key in ("task", "replay_rows", "consumed_samples", "consumed_fresh_samples"):
        assert [line[key] for line in mine] == [line[key] for line in reference]
    moved, wanted = mine[1], reference[1]  # Reptile's update at step 12, from the loaded anchor
    assert moved["reptile_delta_norm"] == pytest.approx(wanted["reptile_delta_norm"], rel=1e-5)
    assert moved["reptile_delta_cosine"] == pytest.approx(wanted["reptile_delta_cosine"], rel=1e-4)
    if "tp2" in saved or "tp2" in loaded:
        log = (tiny.folder / "other" / "train.log").read_text()
        same = ("tp2" in saved) == ("tp2" in loaded)
        assert ("parallel.tp_size was" in log) != same
