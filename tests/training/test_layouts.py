"""Every layout trains the same model: losses, gradient norms and batches equal one process's."""

import json

import pytest

pytestmark = pytest.mark.dist

LAYOUTS = {
    "tp2": (2, "--parallel.tp_size=2"),
    "pp2": (2, "--parallel.pp_size=2"),
    "dp2": (2,),
    "tp2_pp2_dp2": (8, "--parallel.tp_size=2", "--parallel.pp_size=2"),
}


def curve(tiny, name, key):
    return [line[key] for line in tiny.lines(name)]


def assert_same_curves(tiny, name, reference, tolerance):
    for key in ("loss", "grad_norm", "loss_fresh"):
        wanted, given = curve(tiny, reference, key), curve(tiny, name, key)
        assert len(wanted) == len(given) == 20
        worst = max(abs(a - b) for a, b in zip(wanted, given, strict=True))
        assert worst <= tolerance, f"{name}: {key} is {worst} off {reference}"


def assert_same_reptile(tiny, name, reference):
    moved, wanted = (
        [line for line in tiny.lines(run) if "reptile_delta_norm" in line]
        for run in (name, reference)
    )
    assert len(moved) == len(wanted) == 5
    for mine, line in zip(moved, wanted, strict=True):
        for key in ("reptile_delta_norm", "reptile_delta_cosine"):
            if line[key] is None:
                assert mine[key] is None
            else:
                assert mine[key] == pytest.approx(line[key], rel=1e-4), (name, key)


@pytest.mark.parametrize(
    "tied", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["tied", "untied"]
)
def test_layouts_train_the_same_model(tiny, tied):
    def change(config):
        config["model"]["tie_embeddings"] = tied

    tiny.train(tiny.write("one", change))
    reptile = [line for line in tiny.lines("one") if "reptile_delta_norm" in line]
    assert [line["step"] for line in reptile] == [4, 8, 12, 16, 20]
    layouts = LAYOUTS if tied else {"tp2_pp2_dp2": LAYOUTS["tp2_pp2_dp2"]}
    for name, (ranks, *options) in layouts.items():
        tiny.train(tiny.write(name, change), *options, world_size=ranks)
        assert_same_curves(tiny, name, "one", 1e-5)
        assert_same_reptile(tiny, name, "one")
        losses = [line["losses"] for line in tiny.lines(name, "evaluations.jsonl")]
        wanted = [line["losses"] for line in tiny.lines("one", "evaluations.jsonl")]
        assert len(losses) == len(wanted) == 4
        for mine, reference in zip(losses, wanted, strict=True):
            assert mine == pytest.approx(reference, abs=1e-5)


@pytest.mark.parametrize(
    "tied", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["tied", "untied"]
)
@pytest.mark.parametrize(
    ("ranks", "kv_heads", "options"),
    [
        pytest.param(4, 2, ("--parallel.tp_size=4",), marks=pytest.mark.slow),
        pytest.param(2, 1, ("--parallel.tp_size=2",), marks=pytest.mark.slow),
        pytest.param(
            8, 2, ("--parallel.tp_size=4", "--parallel.pp_size=2"), marks=pytest.mark.slow
        ),
        (4, 1, ("--parallel.tp_size=2", "--parallel.activation_checkpointing=full")),
    ],
    ids=["tp4", "tp2", "tp4_pp2", "tp2_dp2_ckpt"],
)
def test_repeated_heads_and_a_padded_vocabulary(tiny, ranks, kv_heads, options, tied):
    """Fewer heads of keys and values than ranks, a vocabulary that the ranks do not divide."""

    def change(config):
        config["model"].update(tie_embeddings=tied, num_kv_heads=kv_heads, vocab_size=517)
        config["model"].update(head_dim=12, rope_scaling={"kind": "linear", "factor": 2.0})
        config["reptile"].update(momentum=0.5, nesterov=True)

    tiny.train(tiny.write("one", change))
    tiny.train(tiny.write("many", change), *options, world_size=ranks)
    assert_same_curves(tiny, "many", "one", 1e-5)
    assert_same_reptile(tiny, "many", "one")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, ("--parallel.pp_size=2", "--batch.micro_batch_size=4")),
        (4, ("--parallel.pp_size=4",)),
        (4, ("--parallel.tp_size=2", "--parallel.pp_size=2")),
        (4, ("--parallel.tp_size=2", "--batch.micro_batch_size=2")),
        (4, ("--parallel.pp_size=2", "--parallel.activation_checkpointing=full")),
        (8, ("--parallel.pp_size=2",)),
        (8, ("--parallel.pp_size=4",)),
    ],
    ids=["pp2_mb4", "pp4", "tp2_pp2", "tp2_dp2", "pp2_dp2_ckpt", "pp2_dp4", "pp4_dp2"],
)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_layout_trains_the_same_model(tiny, ranks, options, tied):
    def change(config):
        config["model"]["tie_embeddings"] = tied
        config["reptile"].update(momentum=0.5, nesterov=True)

    tiny.train(tiny.write("one", change))
    tiny.train(tiny.write("many", change), *options, world_size=ranks)
    assert_same_curves(tiny, "many", "one", 1e-5)


def rows_by_batch(folder, dp_size, **coordinate):
    """Each batch's rows in order, as the ranks of one (pipe, model) coordinate received them."""
    batches = {}
    for path in folder.iterdir():
        fields = path.name.split("_")
        at = dict(zip(fields[::2], map(int, fields[1::2]), strict=True))
        if all(at[axis] == place for axis, place in coordinate.items()):
            batches.setdefault(at["batch"], {})[at["data"]] = json.loads(path.read_text())
    return {
        batch: [row for data in range(dp_size) for row in parts[data]]
        for batch, parts in batches.items()
    }


def test_batches_do_not_depend_on_the_layout(tiny, tmp_path):
    runs = {
        "one": (1, 1, "--batch.micro_batch_size=4"),
        "dp2": (2, 2, "--batch.micro_batch_size=2"),
        "tp2_pp2": (4, 1, "--parallel.tp_size=2", "--parallel.pp_size=2"),
    }
    seen = {}
    for name, (ranks, dp_size, *options) in runs.items():
        folder = tmp_path / f"record_{name}"
        folder.mkdir()
        config = tiny.write(name, lambda config: config["model"].update(num_layers=2))
        tiny.train(config, *options, world_size=ranks, record=str(folder))
        places = [(p, m) for p in (0, 1) for m in (0, 1)] if name == "tp2_pp2" else [(0, 0)]
        for pipe, model in places:
            seen[f"{name} {pipe} {model}"] = rows_by_batch(folder, dp_size, pipe=pipe, model=model)
    reference = seen.pop("one 0 0")
    assert sorted(reference) == list(range(20))
    assert all(len(rows) == 8 for rows in reference.values())
    for name, batches in seen.items():
        assert batches == reference, name
