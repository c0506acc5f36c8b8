from megatron_mer.analysis.tables import matrix_table
from megatron_mer.continual.forgetting import MatrixRow, summary_dict

ROWS = [
    MatrixRow(None, None, {"en": 8.3, "日本語": 8.4}),
    MatrixRow(0, "en", {"en": 5.5, "日本語": 8.0}),
    MatrixRow(1, "ja", {"en": 6.25, "日本語": 5.75}),
]
SET_TASKS = {"en": "en", "日本語": "ja"}


def test_matrix_and_measures_with_entropy():
    summary = summary_dict(ROWS, SET_TASKS, extras={"unigram_entropy": {"en": 6.0, "日本語": 6.5}})
    assert matrix_table(summary).splitlines() == [
        "Held-out loss in nats a token at the end of each entry (* = just trained)",
        "after        en   日本語",
        "-------------------------",
        "start     8.300    8.400",
        "0 en      5.500*   8.000",
        "1 ja      6.250    5.750*",
        "unigrams  6.000    6.500",
        "",
        "After the whole stream (forgetting > 0 is worse)",
        "set     learned  unigrams  learned - unigrams  retained  forgetting",
        "-------------------------------------------------------------------",
        "en        5.500     6.000              -0.500     6.250      +0.750",
        "日本語    5.750     6.500              -0.750     5.750           -",
        "mean      5.625         -                   -     6.000      +0.750",
    ]


def test_without_entropy_its_columns_are_not_there():
    text = matrix_table(summary_dict(ROWS, SET_TASKS))
    assert "unigrams" not in text
    assert text.splitlines()[8].split() == ["set", "learned", "retained", "forgetting"]


def test_what_is_missing_is_a_dash():
    """A run that stopped after its first task, with a loss that is not a number."""
    rows = [ROWS[0], MatrixRow(0, "en", {"en": float("nan"), "日本語": 8.0})]
    lines = matrix_table(summary_dict(rows, SET_TASKS)).splitlines()
    assert lines[4].split() == ["0", "en", "-*", "8.000"]
    assert lines[-1].split() == ["mean", "-", "-", "-"]


def test_a_run_without_evaluations_has_no_table():
    assert matrix_table({}) == ""
