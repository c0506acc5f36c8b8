"""Figures for a page (SVG in the page's colours and fonts) and for files (PNG)."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_mer.analysis.fonts import font_families
from megatron_mer.analysis.pictures import COLOURS

PIXELS = 72  # an inch: a point is a pixel of the page

# Hexadecimal colours stand in a figure for the page's variables, which differ by light and dark; so
# no two may be equal, and black is not quite black (matplotlib leaves black out of an SVG).
LINES = (*COLOURS[:-1], "#010101")
TEXTS = ("#00669f", "#b04a00", "#007a58", "#a3477c", "#8a5f00", "#1f78a8", "#020202")
"""Those of the lines, dark enough on white for text (contrast at least 4.5)."""
INK, MUTED, GRID, SHADE, PAPER = "#1f2328", "#59636e", "#dfe3e8", "#f2f4f7", "#fefefe"
VARIABLES = {
    **{colour.lower(): f"--line-{at}" for at, colour in enumerate(LINES)},
    **{colour: f"--text-{at}" for at, colour in enumerate(TEXTS)},
    INK: "--ink", MUTED: "--muted", GRID: "--grid", SHADE: "--shade", PAPER: "--paper",
}  # fmt: skip


@dataclass(frozen=True)
class Frame:
    """Size of a drawing in pixels, and what depends on it."""

    width: int
    height: int
    title: str = ""
    """Only a file has it; a page has its own."""
    labels: bool = True
    """Whether lines are named at their ends; else a legend beside the drawing names them."""


@dataclass(frozen=True)
class Chart:
    """A drawing that can be made at any size."""

    key: str
    title: str
    draw: Callable[[Frame], Figure]
    description: str
    """For who cannot see it."""
    names: tuple[str, ...] = ()
    """All text of it that people chose: its fonts must have these characters."""
    legend: tuple[tuple[str, int, bool], ...] = ()
    """(name, number of its look, dashed) of each line."""
    labelled: bool = False
    """Whether lines are named at their ends where there is room: no legend is needed there."""
    height: int = 380
    small: bool = False
    """Half a page wide, so that one drawing serves all widths."""
    note: str = ""


def svgs(chart: Chart, prefix: str) -> dict[str, str]:
    """The drawing for a page: {"wide", "narrow"}, or {"small"}.

    Args:
        chart: What to draw.
        prefix: Begins all ids, which are unique on a page.
    """
    if chart.small:
        return {"small": _svg(chart, Frame(380, 210), f"{prefix}-small")}
    frames = {"wide": Frame(900, chart.height), "narrow": Frame(362, chart.height, labels=False)}
    return {
        name: _svg(chart, replace(frame, height=min(frame.height, 2 * frame.width)), prefix + name)
        for name, frame in frames.items()
    }


def write_png(chart: Chart, path: Path) -> None:
    """Write the drawing as a PNG with its title."""
    frame = Frame(900, chart.height + 34, title=chart.title)
    with _style(chart):
        chart.draw(frame).savefig(path, format="png", dpi=2 * PIXELS, facecolor="white")


def _svg(chart: Chart, frame: Frame, prefix: str) -> str:
    buffer = io.StringIO()
    with _style(chart):
        chart.draw(frame).savefig(buffer, format="svg", dpi=PIXELS, facecolor="none")
    return _for_page(buffer.getvalue(), prefix)


@contextmanager
def _style(chart: Chart) -> Iterator[None]:
    settings: Any = {
        "svg.fonttype": "none",  # Text stays text: the browser shapes it in the page's fonts.
        "svg.hashsalt": "report",  # The same run gives the same page.
        "text.parse_math": False,  # A dollar in a name is a dollar.
        "font.family": font_families(chart.names),
        "font.size": 12.0,
    }
    log = logging.getLogger("matplotlib.font_manager")
    level = log.level
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # `font_families` has said it in words; that a fallback is not there in bold is no matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            log.setLevel(level)


def _for_page(svg: str, prefix: str) -> str:
    """An SVG file as a part of a page: its ids, colours and fonts are the page's."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"\s*<defs>\s*<style .*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    # What people chose stands between tags only, where matplotlib escapes it; so tags are safe to
    # change, and text is left alone.
    return re.sub(r"<[^!?][^>]*>", lambda tag: _tag(tag[0], prefix), svg).replace(" \n", "\n")


def _tag(tag: str, prefix: str) -> str:
    if tag.startswith("<svg"):
        box = re.search(r'viewBox="[^"]*"', tag)
        return f'<svg {box[0] if box else ""} aria-hidden="true" focusable="false">'
    tag = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', tag)
    tag = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", tag)
    tag = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{prefix}-\1"', tag)
    tag = re.sub(r" ?font-family: [^;\"]*;?", "", tag)
    tag = re.sub(r"#[0-9a-f]{6}\b(?=[;\"])", lambda found: _variable(found[0]), tag)
    if tag.startswith("<text"):
        tag = re.sub(r' transform="rotate\(-0 [^)]*\)"', "", tag)
    return tag


def _variable(colour: str) -> str:
    name = VARIABLES.get(colour)
    return f"var({name})" if name else colour


def new_figure(frame: Frame) -> Figure:
    """An empty figure of a frame's size."""
    figure = Figure(figsize=(frame.width / PIXELS, frame.height / PIXELS), dpi=PIXELS)
    FigureCanvasAgg(figure)
    if frame.title:
        figure.text(
            14 / frame.width, 1 - 20 / frame.height, frame.title,
            fontsize=14, fontweight="bold", color=INK, va="center",
        )  # fmt: skip
    return figure


def new_axes(
    figure: Figure, frame: Frame, left: float, right: float, top: float, bottom: float
) -> Axes:
    """Axes with margins in pixels, quiet, with a grid of horizontal lines."""
    top += 34 if frame.title else 0
    axes = figure.add_axes(
        (
            left / frame.width,
            bottom / frame.height,
            max(frame.width - left - right, 40) / frame.width,
            max(frame.height - top - bottom, 40) / frame.height,
        )
    )
    axes.set_facecolor("none")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelsize=11.5, length=3)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def number_steps(axes: Axes, width: float) -> None:
    """Marks of steps on the x axis: whole numbers, thousands shortened, as many as fit."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=max(2, int(width / 75))))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.set_xlabel("step", fontsize=11.5, color=MUTED)


def short(value: float) -> str:
    """A number of a scale in few characters: 12.5k, 3M, 0.001."""
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= unit:
            return f"{value / (unit if unit > 1e4 else 1e3):g}{name}"
    return f"{value:g}"


def text_width(text: str, size: float = 12.0) -> float:
    """About how many pixels a text takes."""
    return sum(1.0 if ord(char) > 0x2E80 else 0.58 for char in text) * size


def text_at(axes: Axes, x: float, y: float, text: str, **options: object) -> Text:
    """Text at data coordinates x and a share y of the axes' height."""
    return axes.text(x, y, text, transform=axes.get_xaxis_transform(), **options)  # type: ignore[arg-type]


def look(number: int) -> tuple[str, str]:
    """The colours of a line and of its name."""
    return LINES[number % len(LINES)], TEXTS[number % len(TEXTS)]


def described(names: Sequence[tuple[str, float]], digits: int = 3) -> str:
    """Names and values in words: "en 4.906, fr 4.912"."""
    return ", ".join(f"{name} {value:.{digits}f}" for name, value in names)
