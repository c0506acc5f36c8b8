from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from megatron_mer.analysis.length_picture import MAX_DATASETS, length_figure, length_picture
from megatron_mer.data.document_lengths import SHORT, DocumentLengths


def spread(seed: int, documents: int = 5000, empty: int = 0, scale: float = 6.0) -> DocumentLengths:
    drawn = np.random.default_rng(seed).lognormal(scale, 1.3, documents).astype(np.int64) + 1
    lengths = np.concatenate((drawn, np.zeros(empty, dtype=np.int64)))
    counts = np.bincount(lengths[lengths < SHORT], minlength=SHORT)
    return DocumentLengths(counts, np.sort(lengths[lengths >= SHORT]), int(lengths.sum()))


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_the_png(tmp_path: Path) -> None:
    path = tmp_path / "report" / "lengths.png"
    length_picture({"fr": spread(1)}, path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size[0] == 1440
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 50


def test_the_area_is_the_share_of_the_documents() -> None:
    (axes,) = length_figure({"fr": spread(1, empty=5000)}).axes
    (stairs,) = axes.patches
    values, edges, _ = stairs.get_data()
    # Half of the documents are empty and have no place on the axis.
    assert float(np.sum(values * np.diff(np.log2(edges)))) == pytest.approx(50.0)
    assert axes.get_ylim()[1] > values.max()


def test_median_and_95_percent_are_where_they_are_said_to_be() -> None:
    lengths = spread(2)
    figure = length_figure({"fr": lengths})
    places = [line.get_xdata()[0] for line in figure.axes[0].lines]
    assert places == [lengths.quantile(50), lengths.quantile(95)]
    assert texts(figure)[1] == (
        f"5,000 documents, median {places[0]:,}, 95 % up to {places[1]:,}, longest "
        f"{lengths.maximum:,}"
    )


@pytest.mark.parametrize("count", [1, 4, 5, 15])
def test_no_text_overlaps_another_or_leaves_the_picture(count: int) -> None:
    name = "a/long/prefix/of/a/dataset/that/must/be/cut/in/order/to/fit/into/its/column/$x_1$/fr"
    huge = DocumentLengths(
        np.bincount([0] * 123_456 + [7, 3], minlength=SHORT),
        np.full(2_000, 987_654_321, dtype=np.int64),
        10**13,
    )
    named = {f"{name}_{at}": huge if at == 1 else spread(at, empty=at) for at in range(count)}
    figure = length_figure(named)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    shown = [*figure.texts]
    for axes in figure.axes:
        shown += axes.texts
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            shown += [tick.label1 for tick in ticks]
    shown = [text for text in shown if text.get_visible()]
    boxes = [text.get_window_extent(renderer) for text in shown if text.get_text()]
    assert len(boxes) > 4 * count
    for at, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0
        assert box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0
        assert box.y1 <= figure.bbox.y1
        assert not [other for other in boxes[:at] if box.overlaps(other)]


def test_all_histograms_share_one_axis_that_begins_near_the_shortest() -> None:
    figure = length_figure({"short": spread(1, scale=5.0), "long": spread(2, scale=9.0)})
    limits = [axes.get_xlim() for axes in figure.axes]
    assert limits[0] == limits[1]
    shortest = min(spread(1, scale=5.0).minimum, spread(2, scale=9.0).minimum)
    assert limits[0][0] <= shortest < 10 * limits[0][0]


def test_datasets_without_lengths_say_so() -> None:
    nothing = DocumentLengths(np.zeros(SHORT, dtype=np.int64), np.zeros(0, dtype=np.int64), 0)
    figure = length_figure({"none": nothing, "void": spread(1, 0, 3), "fr": spread(1)})
    assert "no documents" in texts(figure)
    assert "only empty documents" in texts(figure)
    assert "0 documents" in texts(figure)


@pytest.mark.parametrize("count", [0, MAX_DATASETS + 1])
def test_none_and_too_many_are_errors(count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} datasets; a picture holds 1 to 40"):
        length_figure(dict.fromkeys(map(str, range(count)), spread(1)))
