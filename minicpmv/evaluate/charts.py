"""Bars and a radar of several runs, drawn by matplotlib without a display."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure


# Okabe and Ito: told apart with any kind of color vision.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#F0E442")
STYLE: dict[str, Any] = {"color": "#333333", "fontsize": 9}


def plain_text() -> AbstractContextManager[None]:
    """While it lasts, a name with dollar signs is drawn as it is written, not as a formula."""
    return rc_context({"text.parse_math": False})


def color_of(place: int) -> str:
    return COLORS[place % len(COLORS)]


def bars(labels: Sequence[str], rows: Sequence[tuple[str, Sequence[float | None], Sequence[float | None]]]) -> Figure:
    """A group of bars for each row.

    Args:
        labels: of the runs.
        rows: name, value of each run (a share; None leaves the bar out), spread of each run (None: no error bar).
    """
    thickness = 0.8 / len(labels)
    figure = Figure(figsize=(7, 1 + len(rows) * max(0.3, 0.17 * len(labels))), layout="constrained")
    axes = figure.add_subplot()
    for run, label in enumerate(labels):
        drawn = [
            (place, value, spreads[run])
            for place, (_, values, spreads) in enumerate(rows)
            if (value := values[run]) is not None
        ]
        heights = [place + (run - (len(labels) - 1) / 2) * thickness for place, _, _ in drawn]
        shares = [100 * value for _, value, _ in drawn]
        errors = [100 * (spread or 0) for _, _, spread in drawn]
        axes.barh(
            heights,
            shares,
            thickness * 0.92,
            xerr=errors if any(errors) else None,
            error_kw={"ecolor": "#333333", "elinewidth": 0.8, "capsize": 2},
            color=color_of(run),
            label=label,
        )
        for height, share, error in zip(heights, shares, errors, strict=True):
            axes.text(max(share, 0) + error + 0.8, height, f"{share:.1f}", va="center", color="#333333", fontsize=7)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows], **STYLE)
    axes.set_ylim(len(rows) - 0.4, -0.6)  # the first row on top
    axes.set_xlim(0, 108)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("%", **STYLE)
    axes.tick_params(length=0, labelsize=9)
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    if len(labels) > 1:
        figure.legend(loc="outside upper left", ncols=min(len(labels), 4), frameon=False, fontsize=9)
    return figure


def radar(labels: Sequence[str], rows: Sequence[tuple[str, Sequence[float]]]) -> Figure:
    """One closed line a run over at least three rows, each a spoke from 0 to 100 %."""
    angles = [2 * math.pi * place / len(rows) for place in range(len(rows))]
    figure = Figure(figsize=(6.4, 6.4), layout="constrained")
    axes: Any = figure.add_subplot(projection="polar")
    axes.set_theta_offset(math.pi / 2)
    axes.set_theta_direction(-1)
    for run, label in enumerate(labels):
        shares = [100 * values[run] for _, values in rows]
        axes.plot([*angles, 0], [*shares, shares[0]], color=color_of(run), linewidth=1.8, label=label)
        axes.fill(angles, shares, color=color_of(run), alpha=0.08)
    axes.set_xticks(angles, [name for name, _ in rows], **STYLE)
    for angle, text in zip(angles, axes.get_xticklabels(), strict=True):
        # Names grow away from the circle.
        side = round(math.sin(angle), 6)
        text.set_horizontalalignment("center" if side == 0 else "left" if side > 0 else "right")
    axes.set_ylim(0, 100)
    axes.set_yticks([20, 40, 60, 80, 100], ["", "40", "", "80", ""], color="#777777", fontsize=8)
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.spines["polar"].set_color("#bbbbbb")
    if len(labels) > 1:
        figure.legend(loc="outside lower center", ncols=min(len(labels), 4), frameon=False, fontsize=9)
    return figure


def accuracy_over_tokens(points: Sequence[tuple[str, float, float]]) -> Figure:
    """A point for each run: its label, generated tokens a question, and share of right answers, over the same rows."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for run, (label, tokens, share) in enumerate(points):
        axes.plot(tokens, 100 * share, "o", color=color_of(run), markersize=8, label=label)
    label_tokens(axes, "mean of the rows, %")
    return figure


def label_tokens(axes: Axes, share: str) -> None:
    """Finish a chart of shares over generated tokens."""
    axes.set_xlabel("generated tokens a question", **STYLE)
    axes.set_ylabel(share, **STYLE)
    axes.set_xlim(left=0)
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="best")
