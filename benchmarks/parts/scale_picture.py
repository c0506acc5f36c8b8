"""The picture of `benchmarks/scale.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np


def draw(curves: Mapping[str, Mapping[str, Any]], changes: Sequence[str], path: Path) -> None:
    """Cost of a row along each run, and its median by length of the run."""
    figure, (along, lengths) = plt.subplots(
        1, 2, figsize=(11, 4), width_ratios=(3, 1), sharey=True, layout="constrained"
    )
    colors = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000")  # Okabe and Ito
    for color, (name, one) in zip(colors, curves.items(), strict=False):
        share = np.array(one["batches"]) / max(one["total_batches"] - 1, 1) * 100
        label = f"{name}: {one['total_batches']:,} steps"
        along.plot(share, one["ns_a_row"], color=color, lw=1, label=label)
        quartiles = np.percentile(one["ns_a_row"], (25, 50, 75))
        spread = [[quartiles[1] - quartiles[0]], [quartiles[2] - quartiles[1]]]
        lengths.errorbar(one["tokens"], quartiles[1], spread, color=color, marker="o", capsize=3)
    longest = max(curves.values(), key=lambda one: one["tokens"])
    for number, (start, change) in enumerate(
        zip(longest["segment_starts"][1:], changes, strict=True)
    ):
        place = start / longest["total_batches"] * 100
        along.axvline(place, color="0.7", lw=0.8, ls=":")
        along.annotate(
            f" {change}",
            (place, 0.02 + 0.05 * (number % 2)),
            xycoords=("data", "axes fraction"),
            fontsize=8,
            color="0.4",
        )
    along.set(
        xlabel="place in the run, %", ylabel="planning a step, cold caches, ns a row", xlim=(0, 100)
    )
    along.set_ylim(bottom=0)
    along.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 0.08))
    lengths.set(xscale="log", xlabel="tokens of the run")
    lengths.set_title("median and quartiles", fontsize=9)
    along.set_title("20 tasks, 10,000 datasets, 5 segments", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
