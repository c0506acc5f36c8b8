"""What may differ at another layout, and by how much."""

import pytest

from megatron_mer.training.check_resume.figures import (
    HELD_OUT,
    LOSSES,
    NORMS,
    REPTILE,
    ROWS,
    Closeness,
    Place,
    exactly,
)


def place(batch, group, name="x"):
    return Place(batch, 1, 0, name, group, f"batch {batch}, {name}")


@pytest.mark.parametrize(
    ("batch", "group", "name", "mine", "other", "allowed"),
    [
        (6, LOSSES, "loss", 2.0, 2.0 + 1e-6, True),
        (6, LOSSES, "loss", 2.0, 2.0 + 3e-6, False),
        (9, LOSSES, "loss", 2.0, 2.0 + 3e-6, False),
        (9, HELD_OUT, "losses.en", 2.0, 2.0 + 3e-6, False),
        (6, NORMS, "grad_norm", 1.0, 1.0 + 3e-6, False),
        (7, NORMS, "grad_norm", 1.0, 1.0 + 3e-6, True),
        (7, NORMS, "grad_norm", 1.0, 1.0 + 3e-4, False),
        (7, REPTILE, "reptile_delta_cosine", 1e-9, -1e-9, True),
        (7, REPTILE, "reptile_delta_norm", 1e-9, 2e-9, False),
        (7, REPTILE, "updates_since_reptile", 1, 2, False),
        (7, LOSSES, "loss", 2.0, None, False),
        (7, ROWS, "", "fresh sample 1 of en", "fresh sample 2 of en", False),
    ],
)
def test_what_is_too_far(batch, group, name, mine, other, allowed):
    at = place(batch, group, name)
    close = Closeness(1e-6, first_batch=6)
    close.compare({at: mine}, {at: other})
    assert [one.place for one in close.beyond] == ([] if allowed else [at.text])
    assert close.worst[group][1].mine == mine


def test_what_one_run_lacks_is_a_difference():
    close = Closeness(1e-2, first_batch=0)
    close.compare({place(0, LOSSES): 1.0}, {})
    assert str(close.beyond[0]) == "batch 0, x: 1.0 against nothing"
    assert [str(one) for one in exactly({}, {place(3, ROWS): "a"})] == [
        "batch 3, x: nothing against a"
    ]


def test_looser_has_a_bound():
    loosened = [Closeness(one, 0).looser for one in (1e-6, 1e-2, 0.5)]
    assert loosened == pytest.approx([1e-4, 0.1, 0.5])
