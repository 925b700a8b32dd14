"""Draws the panels of a report: SVG that takes the colours of its page, and PNG."""

import io
import re
import textwrap
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gopo_lightning.evaluation.panels import Line, Panel

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8B6D3F", "#7F7F7F")
"""Of groups; they can be told apart by the colour-blind (Okabe and Ito), and by dashes and markers in grey."""
MARKERS, STYLES = "os^Dv<>P", ("-", "--", "-.", ":")
_INK = "#010203"
"""Stands for the page's colour of text in an SVG."""
_SIZE, _TITLE_CHARS = (4.6, 3.2), 60


def colour(group: int) -> str:
    """Of a group, everywhere."""
    return COLOURS[group % len(COLOURS)]


def svg(panel: Panel) -> str:
    """For inside a page: no declaration, no ids that another figure has, text as text."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": panel.name, "text.parse_math": False}):
        figure = _draw(panel, _INK)
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator")))
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    return text.replace(_INK, "currentColor")


def png(panel: Panel, path: Path) -> None:
    """By itself: on white, with a legend."""
    with mpl.rc_context({"text.parse_math": False}):
        figure = _draw(panel, "black")
        if len(panel.lines) > 1:
            figure.legend(loc="outside lower center", frameon=False, fontsize=8)
        figure.savefig(path, format="png", dpi=130, facecolor="white")


def _draw(panel: Panel, ink: str) -> Figure:
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    for line in panel.lines:
        _draw_line(axes, line)
    if panel.zero:
        axes.axhline(0, color=ink, linewidth=0.8)
    axes.set_title(textwrap.fill(panel.title, _TITLE_CHARS), color=ink, fontsize=10, loc="left")
    axes.set_xlabel(panel.x, color=ink, fontsize=9)
    axes.tick_params(colors=ink, labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(ink)
    axes.grid(alpha=0.25)
    return figure


def _draw_line(axes: Axes, line: Line) -> None:
    tint, marker = colour(line.group), MARKERS[line.group % len(MARKERS)]
    for points in line.seeds:
        axes.plot(*zip(*points, strict=True), color=tint, linewidth=0.6, alpha=0.5)
    if not line.mean:
        return
    xs, ys = zip(*line.mean, strict=True)
    few = marker if len(xs) <= 25 else ""
    style = STYLES[line.group % len(STYLES)]  # so that one is seen under another
    axes.plot(xs, ys, style, color=tint, linewidth=2, marker=few, markersize=4, label=line.label)
    if line.low:
        axes.fill_between(xs, line.low, line.high, color=tint, alpha=0.2, linewidth=0)
