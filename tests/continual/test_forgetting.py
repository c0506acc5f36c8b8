import json
import math

import pytest

from megatron_mer.continual.forgetting import (
    ForgettingMatrix,
    MatrixRow,
    SetScores,
    bits_per_byte,
    matrix_dict,
    summary_dict,
)


def rows(sets: str, *lines: tuple[str | None, list[float]]) -> list[MatrixRow]:
    """Rows from (task, losses in the order of the sets); entries are numbered as they come."""
    return [
        MatrixRow(at - 1 if task else None, task, dict(zip(sets.split(), losses, strict=True)))
        for at, (task, losses) in enumerate(lines)
    ]


OWN = {"en": "en", "fr": "fr", "de": "de"}
THREE = rows(
    "en fr de",
    (None, [9.0, 9.0, 9.0]),
    ("en", [5.0, 8.0, 8.5]),
    ("fr", [5.5, 4.0, 7.0]),
    ("de", [6.5, 3.5, 3.0]),
)


def test_three_tasks_by_hand():
    scores = ForgettingMatrix(THREE, OWN).scores()
    assert scores == {
        "en": SetScores("en", 6.5, 5.0, 1.5, -1.5, None),
        "fr": SetScores("fr", 3.5, 4.0, -0.5, 0.5, 1.0),
        "de": SetScores("de", 3.0, 3.0, None, 0.0, 2.0),
    }


def test_means_leave_out_the_last_task():
    assert ForgettingMatrix(THREE, OWN).means() == {
        "retained": pytest.approx(13.0 / 3),
        "learned": pytest.approx(4.0),
        "forgetting": pytest.approx((1.5 - 0.5) / 2),
        "backward_transfer": pytest.approx((-1.5 + 0.5) / 2),
        "forward_transfer": pytest.approx(1.5),
    }


def test_the_minimum_is_not_always_at_the_own_end():
    """A later task may help first and harm then: forgetting counts from the best moment."""
    matrix = rows(
        "a b c",
        (None, [1.0, 9, 9]),  # lower than ever after, but before a's training: does not count
        ("a", [5.0, 9, 9]),
        ("b", [4.0, 5, 9]),
        ("c", [4.5, 5, 5]),
    )
    scores = ForgettingMatrix(matrix, {"a": "a", "b": "b", "c": "c"}).scores()["a"]
    assert scores.forgetting == pytest.approx(0.5)
    assert scores.learned == 5.0
    assert scores.backward_transfer == pytest.approx(0.5)


def test_a_task_trained_twice():
    matrix = ForgettingMatrix(
        rows(
            "a b c",
            (None, [9, 9, 9]),
            ("a", [4.0, 8, 9]),
            ("b", [6.0, 4.0, 8]),
            ("a", [4.5, 5.0, 7]),
            ("c", [5.5, 4.2, 3]),
        ),
        {"a": "a", "b": "b", "c": "c"},
    )
    scores = matrix.scores()
    assert scores["a"].learned == 4.5
    assert scores["a"].forgetting == pytest.approx(5.5 - 4.0)
    assert scores["b"].forgetting == pytest.approx(4.2 - 4.0)
    assert [row.label for row in matrix.rows] == ["start", "0 a", "1 b", "2 a", "3 c"]


def test_a_task_trained_twice_and_last_has_a_forgetting_outside_the_mean():
    matrix = ForgettingMatrix(
        rows("a b", (None, [9, 9]), ("a", [4.0, 8]), ("b", [6.0, 5.0]), ("a", [4.5, 5.5])),
        {"a": "a", "b": "b"},
    )
    assert matrix.scores()["a"].forgetting == pytest.approx(0.5)
    assert matrix.means()["forgetting"] == pytest.approx(0.5)  # b alone: 5.5 - 5.0
    assert matrix.means()["backward_transfer"] == pytest.approx(-0.5)


def test_a_task_trained_before_this_run_counts_from_row_0():
    matrix = ForgettingMatrix(
        rows("base fr", (None, [3.0, 8.0]), ("fr", [3.75, 4.0])),
        {"base": "base", "fr": "fr"},
        ["base"],
    )
    base = matrix.scores()["base"]
    assert base == SetScores("base", 3.75, 3.0, 0.75, -0.75, None)
    assert matrix.means()["forgetting"] == pytest.approx(0.75)
    assert matrix.means()["learned"] == pytest.approx(3.5)


def test_a_task_trained_before_and_again():
    matrix = ForgettingMatrix(
        rows("x y", (None, [3.0, 9]), ("x", [3.5, 8]), ("y", [4.5, 5])),
        {"x": "x", "y": "y"},
        {"x"},
    )
    scores = matrix.scores()["x"]
    assert (scores.learned, scores.forgetting) == (3.5, 1.5)


def test_joint_training_has_many_sets_a_task():
    matrix = ForgettingMatrix(
        rows("en fr", (None, [9.0, 9.0]), ("all", [5.0, 6.0])), {"en": "all", "fr": "all"}
    )
    means = matrix.means()
    assert (means["retained"], means["learned"]) == (5.5, 5.5)
    assert means["forgetting"] is None
    assert means["backward_transfer"] is None


def test_a_run_that_stopped_early_judges_what_it_trained():
    matrix = ForgettingMatrix(THREE[:3], OWN)
    assert matrix.scores()["de"] == SetScores("de", None, None, None, None, None)
    assert matrix.means()["retained"] == pytest.approx((5.5 + 4.0) / 2)
    assert matrix.means()["forgetting"] == pytest.approx(0.5)


def test_before_the_first_step_there_is_nothing():
    assert set(ForgettingMatrix(THREE[:1], OWN).means().values()) == {None}


def test_a_nan_is_not_left_out_of_a_mean():
    spoiled = [*THREE[:3], MatrixRow(2, "de", {"en": math.nan, "fr": 3.5, "de": 3.0})]
    means = ForgettingMatrix(spoiled, OWN).means()
    assert means["retained"] is not None
    assert math.isnan(means["retained"])
    summary = summary_dict(spoiled, OWN)
    assert summary["retained"]["mean"] is None
    assert summary["forgetting"] == {"mean": None, "sets": {"en": None, "fr": -0.5, "de": None}}
    json.dumps(summary, allow_nan=False)


def test_summary():
    summary = summary_dict(THREE, OWN, ["base"], {"replay_share": 0.25})
    assert summary["learned"] == {"mean": 4.0, "sets": {"en": 5.0, "fr": 4.0, "de": 3.0}}
    assert summary["matrix"]["rows"][:2] == [
        {"label": "start", "entry": None, "task": None},
        {"label": "0 en", "entry": 0, "task": "en"},
    ]
    assert summary["matrix"]["sets"] == ["en", "fr", "de"]
    assert summary["matrix"]["losses"][2] == [5.5, 4.0, 7.0]
    assert summary["set_tasks"] == OWN
    assert summary["trained_before"] == ["base"]
    assert summary["replay_share"] == 0.25
    assert json.loads(json.dumps(summary)) == summary


def test_extras_replace_nothing():
    with pytest.raises(ValueError, match="learned, matrix"):
        summary_dict(THREE, OWN, (), {"matrix": 1, "learned": 2, "other": 3})


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ([], "first row"),
        (THREE[1:], "first row"),
        ([THREE[0], THREE[0]], "no task"),
        ([*THREE[:2], MatrixRow(1, "fr", {"zh": 1.0})], "1 fr"),
    ],
)
def test_rows_that_make_no_matrix(bad: list[MatrixRow], words: str):
    with pytest.raises(ValueError, match=words):
        ForgettingMatrix(bad, OWN)


def test_a_set_that_came_later_has_what_follows_its_coming():
    rows = [
        MatrixRow(None, None, {"en": 8.0}),
        MatrixRow(0, "en", {"en": 5.0}),
        MatrixRow(1, "fr", {"en": 5.5, "fr": 4.0}),
        MatrixRow(2, "en", {"en": 4.5, "fr": 4.25}),
    ]
    scores = ForgettingMatrix(rows, {"en": "en", "fr": "fr"}).scores()
    assert scores["fr"].forgetting == pytest.approx(0.25)
    assert scores["fr"].forward_transfer is None
    assert scores["en"].forgetting == pytest.approx(-0.5)
    json.dumps(summary_dict(rows, {"en": "en", "fr": "fr"}), allow_nan=False)


def test_bits_per_byte_by_hand():
    # 2 ln 2 nats a token are 2 bits; 100 tokens of 400 bytes: half a bit a byte.
    losses = {"en": 2 * math.log(2), "fr": math.log(2), "de": None, "ja": 1.0, "ar": 1.0}
    held_out = {
        "en": {"samples": 1, "tokens": 100, "bytes": 400},
        "fr": {"samples": 1, "tokens": 100, "bytes": 50},
        "de": {"samples": 1, "tokens": 100, "bytes": 50},
        "ja": {"samples": 1, "tokens": 100, "bytes": None},
    }
    assert bits_per_byte(losses, held_out) == {
        "mean": pytest.approx(1.25),
        "sets": {
            "en": pytest.approx(0.5), "fr": pytest.approx(2.0), "de": None, "ja": None, "ar": None
        },
    }  # fmt: skip


def test_the_measures_alone_are_those_of_the_summary():
    alone, whole = matrix_dict(THREE, OWN), summary_dict(THREE, OWN, extras={"name": "run"})
    assert {key: whole[key] for key in alone} == alone
    assert set(whole) - set(alone) == {"set_tasks", "trained_before", "name"}
