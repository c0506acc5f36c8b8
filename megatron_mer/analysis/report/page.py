"""The page: one HTML file that fetches nothing and runs no program."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from megatron_mer.analysis.report.charts import heats
from megatron_mer.analysis.report.drawing import Chart, svgs

NONE = "–"


def render(report: Mapping[str, Any], charts: Sequence[Mapping[str, Chart]]) -> str:
    """The page of a report.

    Every number on it stands in a <span class="n"> with `data-key`, the JSON pointer (RFC 6901) of
    the value in the report, and `data-value`, the value itself in full.

    Args:
        report: {"title", "runs": [as `content.run_content`], "comparison": as `compare.compare`,
            absent for one run}.
        charts: Those of each run; then, for several, those that compare them.
    """
    environment = Environment(
        loader=PackageLoader("megatron_mer.analysis.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["heats"] = heats
    environment.filters["command"] = command
    environment.filters["compact"] = compact
    drawn = [
        {key: (chart, _markup(svgs(chart, f"c{at}-{key}"))) for key, chart in some.items()
         if key != "matrix"}
        for at, some in enumerate(charts)
    ]  # fmt: skip
    return environment.get_template("page.html").render(
        report=report, drawn=drawn, n=partial(number, report)
    )


def _markup(drawings: Mapping[str, str]) -> dict[str, Markup]:
    """Drawings are markup already: matplotlib escaped the text in them."""
    return {name: Markup(svg) for name, svg in drawings.items()}


def number(
    report: Mapping[str, Any], kind: str, *path: str | int | tuple[str | int, ...]
) -> Markup:
    """A value of the report, rounded, with the place and the value in full.

    Args:
        report: What the page shows.
        kind: A key of `SHOWN`.
        path: Keys and places from the report to the value, several also as one tuple; a value
            that is missing is no number.
    """
    value: Any = report
    keys = [key for part in path for key in (part if isinstance(part, tuple) else (part,))]
    for key in keys:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            value = None
    pointer = "".join(f"/{str(key).replace('~', '~0').replace('/', '~1')}" for key in keys)
    if value is None:
        empty = '<span class="n" data-key="{}" data-value="null" aria-label="none">{}</span>'
        return Markup(empty).format(pointer, NONE)
    full = json.dumps(value)
    shown = SHOWN[kind](value)
    return Markup('<span class="n" data-key="{}" data-value="{}" title="{}">{}</span>').format(
        pointer, full, full, shown
    )


def _minus(text: str) -> str:
    return text.replace("-", "\u2212")


def duration(seconds: float) -> str:
    """45.3 s; 3:21 min; 2:03:21 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} h" if hours else f"{minutes}:{rest:02} min"


SHOWN: dict[str, Callable[[Any], str]] = {
    "loss": lambda value: _minus(f"{value:.3f}"),
    "signed": lambda value: _minus(f"{value:+.3f}"),
    "count": lambda value: f"{value:,}",
    "signed_count": lambda value: _minus(f"{value:+,}"),
    "rate": lambda value: f"{value:,.0f}",
    "share": lambda value: f"{100 * value:.1f}%",
    "mean_count": lambda value: f"{value:,.1f}".removesuffix(".0"),
    "short_time": lambda value: f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms",
    "two": lambda value: f"{value:,.2f}",
    "time": duration,
    "signed_time": lambda value: ("+" if value >= 0 else "\u2212") + duration(abs(value)),
}
"""How values are rounded for the page."""


def command(words: Any) -> str:
    """A command line as it would be typed."""
    if isinstance(words, list):
        return shlex.join(map(str, words))
    return str(words)


def compact(value: Any) -> str:
    """A value of environment.json in one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {compact(one)}" for key, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(compact, value))
    return NONE if value is None else str(value)
