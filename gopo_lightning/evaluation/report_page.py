"""Writes a report: one HTML page that loads nothing, its figures as PNG, and its numbers as JSON.

Completions, prompts and configs are untrusted: every text is escaped where it enters the page, which forbids scripts.
"""

import json
import shutil
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import version
from math import isnan
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import gopo_lightning
from gopo_lightning.data.visible import visible
from gopo_lightning.evaluation.contrasts import Contrast, curves_of, number
from gopo_lightning.evaluation.figures import colour, png, svg
from gopo_lightning.evaluation.intervals import Interval
from gopo_lightning.evaluation.report import Report
from gopo_lightning.evaluation.seed_curves import band, sampled_tokens

PAGE, NUMBERS, FIGURES = "index.html", "report.json", "figures"
_GENERATOR = "gopo_lightning report"


def mean(interval: Interval) -> str:
    """A mean and half of its interval."""
    half = "" if isnan(interval.half_width) else f" ± {number(interval.half_width)[1:]}"
    return number(interval.mean).removeprefix("+") + half


def check_output(folder: Path) -> None:
    """Refuse to write into a folder that holds anything but an earlier report.

    Raises:
        ValueError: it does.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    page = folder / PAGE
    ours = page.is_file() and f'content="{_GENERATOR}' in page.read_text(encoding="utf-8", errors="replace")[:2000]
    if not ours or names - {PAGE, NUMBERS, FIGURES}:
        raise ValueError(f"{folder} holds something else than an earlier report. Name another folder by --output.")


def write_report(report: Report, folder: Path, command: str) -> Path:
    """The page; an earlier report in ``folder`` is replaced.

    Args:
        report: what to say.
        folder: where to.
        command: how it was made, for the foot of the page.

    Raises:
        ValueError: ``folder`` holds something else.
    """
    check_output(folder)
    figures = folder / FIGURES
    shutil.rmtree(figures, ignore_errors=True)
    figures.mkdir(parents=True)
    for panel in report.panels:
        png(panel, figures / f"{panel.name}.png")
    numbers = json.dumps(report.numbers(), indent=1, allow_nan=False)
    (folder / NUMBERS).write_text(numbers + "\n", encoding="utf-8")
    (folder / PAGE).write_text(render(report, command), encoding="utf-8", errors="backslashreplace")
    return folder / PAGE


def render(report: Report, command: str) -> str:
    """The page as text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["visible"] = lambda value: visible(str(value))
    names = [group.label for group in report.groups]
    parts: dict[str, Any] = {
        "report": report,
        "title": visible(" vs ".join(names)) if 1 < len(names) <= 3 else f"{names[0] if len(names) == 1 else 'Runs'}",
        "num_runs": sum(len(group.runs) for group in report.groups),
        "made": f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        "generator": _GENERATOR,
        "versions": ", ".join(
            f"{name} {text}"
            for name, text in [
                ("gopo_lightning", gopo_lightning.__version__),
                *((name, version(name)) for name in ("lightning", "torch", "transformers")),
            ]
        ),
        "command": command,
        "colours": [colour(i) for i in range(len(names))],
        "rows": _rows(report),
        "by_step": {tag: _by_step(report, tag) for tag in report.tags},
        # our own drawing, in which matplotlib has escaped every text
        "panels": [{"title": p.title, "caption": p.caption, "svg": Markup(svg(p))} for p in report.panels],
        "runs": [
            (
                group.label,
                seed,
                run.folder,
                run.last_step,
                *(_last(axis) for axis in (sampled_tokens(run), run.seconds)),
            )
            for group in report.groups
            for seed, run in group.runs.items()
        ],
    }
    return environment.get_template("report.html.jinja").render(parts)


def _last(axis: Any) -> str:
    return f"{max(axis.values()):,.0f}" if axis else "—"


def _rows(report: Report) -> list[list[str]]:
    """A row a metric and group."""
    several, found = len(report.contrasts) > 1, {(c.tag, c.group): c for c in report.contrasts}
    rows = []
    for tag in report.tags:
        for group in report.groups:
            final, c = report.final(group, tag), found.get((tag, group.label))
            if final is None:
                continue
            own = [tag, group.label, str(c.step if c else final[0])]
            if c is None:
                empty = ["", ""] if group is report.baseline else ["not comparable", ""]
                rows.append([*own, mean(final[1]), *empty, str(len(curves_of(group, tag))), "", *[""] * several, ""])
                continue
            at = band(list(curves_of(group, tag).values())).get(c.step)
            d = c.difference
            interval = "—" if isnan(d.low) else f"{number(d.low)} to {number(d.high)}"
            seeds = str(d.n) if c.is_paired else f"≥ {d.n}, not paired"
            ps = [_p(c.p), *([_p(c.adjusted_p)] if several else [])]
            rows.append([*own, mean(at) if at else "—", number(d.mean), interval, seeds, *ps, ratio(c)])
    return rows


def _p(p: float) -> str:
    return "—" if isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def ratio(c: Contrast) -> str:
    """Steps to the baseline's end over the baseline's own."""
    found = c.steps_ratio
    if found is None:
        return "—" if c.is_paired else "— (not paired)"
    if found.ratio is None:
        return "— (the baseline did not improve)"
    value, n = found.ratio, found.ratio.n
    without = f"; {found.without_target} without improvement of the baseline" if found.without_target else ""
    if found.never:
        return f"more than × {value.mean:.2f} ({found.never} of {n} never got there{without})"
    interval = "" if isnan(value.low) else f" [{value.low:.2f}, {value.high:.2f}]"
    return f"× {value.mean:.2f}{interval}" + (f" ({without[2:]})" if without else "")


def _by_step(report: Report, tag: str) -> list[Sequence[str]]:
    """Every group's mean, and every difference, at the steps of any."""
    bands = [band(list(curves_of(group, tag).values())) for group in report.groups]
    found = [c for c in report.contrasts if c.tag == tag]
    header = ["step", *(group.label for group in report.groups), *(f"{c.group} − {c.baseline}" for c in found)]
    steps = sorted({step for group in bands for step in group})
    columns = [*bands, *(c.by_step for c in found)]
    return [header, *([str(s), *(mean(column[s]) if s in column else "—" for column in columns)] for s in steps)]
