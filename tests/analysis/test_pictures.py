import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from PIL import Image

from megatron_mer.analysis.pictures import loss_figure, loss_picture, spread

LANGUAGES = ["en", "fr", "de", "ar", "ja"]
BOUNDARIES = [(150 * (at + 1), task) for at, task in enumerate(LANGUAGES)]
EVALUATIONS = [
    {"step": step, "losses": {name: 8.0 - at - step / 1000 for at, name in enumerate(LANGUAGES)}}
    for step in range(0, 751, 50)
]


def axes_of(*arguments: object, **options: object) -> Axes:
    (axes,) = loss_figure(*arguments, **options).axes  # type: ignore[arg-type]
    return axes


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_the_png(tmp_path: Path):
    path = tmp_path / "report" / "losses.png"
    loss_picture(EVALUATIONS, BOUNDARIES, path, "five languages")
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size == (1440, 810)
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 100


def test_every_task_and_every_line_has_its_name():
    axes = axes_of(EVALUATIONS, BOUNDARIES)
    assert "nats per token" in axes.get_ylabel()
    shown = texts(axes)
    assert [text for text in shown if text in LANGUAGES] == LANGUAGES
    assert {"en  7.25", "fr  6.25", "de  5.25", "ar  4.25", "ja  3.25"} <= set(shown)
    colours = {text.get_text()[:2]: to_hex(text.get_color()) for text in axes.texts[-5:]}
    assert len(set(colours.values())) == 5


def test_a_line_is_thick_in_its_own_task():
    axes = axes_of(EVALUATIONS, BOUNDARIES)
    thick = [line for line in axes.lines if line.get_linewidth() > 3]
    spans: dict[str, list[float]] = {}
    for line in thick:
        spans.setdefault(to_hex(line.get_color()), []).extend(line.get_xdata())
    assert [(min(steps), max(steps)) for steps in spans.values()] == [
        (at * 150, at * 150 + 150) for at in range(5)
    ]


def test_sets_of_a_joint_task():
    axes = axes_of(EVALUATIONS, [(750, "all")], set_tasks=dict.fromkeys(LANGUAGES, "all"))
    assert sum(line.get_linewidth() > 3 for line in axes.lines) == 5 * (len(EVALUATIONS) - 1)
    assert "all" in texts(axes)


def test_a_run_that_is_not_done_shows_the_tasks_it_reached():
    shown = texts(axes_of(EVALUATIONS[:5], BOUNDARIES))  # to step 200
    assert [text for text in shown if text in LANGUAGES] == ["en", "fr"]


def test_a_loss_that_is_no_number_is_left_out():
    lines = [
        {"step": 10, "losses": {"en": float("nan"), "fr": None}},
        {"step": 0, "losses": {"en": 8.0}},
        {"step": 20, "losses": {"en": 7.0, "fr": 5.0}},
    ]
    drawn = [line for line in axes_of(lines, [(20, "en")]).lines if line.get_linewidth() < 3]
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in drawn] == [
        ([0, 20], [8.0, 7.0]),
        ([20], [5.0]),
    ]


def test_one_evaluation_is_enough():
    assert "en  8.00" in texts(axes_of([{"step": 0, "losses": {"en": 8.0}}], []))


def test_nothing_to_draw_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match="nothing to draw"):
        loss_picture([{"step": 0, "losses": {}}], BOUNDARIES, tmp_path / "a.png")


def test_names_that_do_not_fit_are_slanted():
    many = [(40 * at + 40, f"task number {at}") for at in range(18)]
    slants = {text.get_rotation() for text in axes_of(EVALUATIONS, many).texts}
    assert 25 in slants
    assert 25 not in {text.get_rotation() for text in axes_of(EVALUATIONS, BOUNDARIES).texts}


def test_spread_moves_as_little_as_needed():
    moved = spread({"a": 0.5, "b": 0.0, "c": 0.51, "d": 0.9}, 0.1)
    assert moved == pytest.approx({"b": 0.0, "a": 0.455, "c": 0.555, "d": 0.9})


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_spread_keeps_order_and_distance(heights: list[float]):
    named = {str(at): height for at, height in enumerate(heights)}
    moved = spread(named, 0.05)
    ordered = sorted(named, key=named.__getitem__)
    result = [moved[name] for name in ordered]
    assert all(high - low >= 0.05 - 1e-9 for low, high in itertools.pairwise(result))
    assert sum(result) == pytest.approx(sum(heights))
