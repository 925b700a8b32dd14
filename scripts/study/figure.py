"""The curves of a table of the study: the judge's score by step, by KL, and beside the proxy's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from gopo_lightning.evaluation.intervals import Interval
from gopo_lightning.evaluation.seed_curves import band, resampled_band
from scripts.study.design import Done, Table, of_same_assets, runs_of

matplotlib.use("Agg")
from matplotlib import pyplot


def draw(done: Done, path: Path, table: Table) -> None:
    """A row for each reward, a colour for each method; bands are 95 % intervals over seeds.

    Where the rewards are warps, GOPO's runs are those on the clean one in each row, whose scale is not that of the row.
    """
    cells: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for runs in runs_of(table, done):
        results_of = of_same_assets(runs, done)
        for run in runs:
            if run.key in results_of:
                cells.setdefault((run.reward, run.method), []).append(results_of[run.key])
    figure, axes = pyplot.subplots(
        len(table.rewards), 3, figsize=(12, 3.4 * len(table.rewards)), squeeze=False, layout="constrained"
    )
    methods = sorted(dict.fromkeys(method for _, method in cells), key=lambda method: method != "gopo")  # its colour
    for (reward, method), results in cells.items():
        colour, label = f"C{methods.index(method)}", f"{method}, {len(results)} seeds"
        judged, trained_on = _by_step(results, "val/judge/reward"), _by_step(results, "val/proxy/reward")
        points = resampled_band([_by_kl(result) for result in results])
        for row, shown in zip(axes, table.rewards, strict=True):
            if reward == shown or reward not in table.rewards:
                _line(row[0], list(judged), list(judged.values()), colour, label)
                _line(row[1], [kl for kl, _ in points], [interval for _, interval in points], colour, label)
            if reward == shown:
                _line(row[2], list(trained_on), list(trained_on.values()), colour, label)
    for reward, row in zip(table.rewards, axes, strict=True):
        for axis, title, x in zip(
            row,
            (f"{reward}: the judge's score", f"{reward}: the judge's score by KL", f"{reward}: the reward trained on"),
            ("optimiser step", "KL to the start, nats a token", "optimiser step"),
            strict=True,
        ):
            axis.set(title=title, xlabel=x)
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.3)
        row[0].legend(frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _line(axis: Any, x: list[Any], intervals: list[Any], colour: str, label: str) -> None:
    axis.plot(x, [interval.mean for interval in intervals], colour, label=label)
    axis.fill_between(x, [i.low for i in intervals], [i.high for i in intervals], color=colour, alpha=0.15, linewidth=0)


def _by_step(results: Sequence[Mapping[str, Any]], tag: str) -> dict[int, Interval]:
    return band([dict(zip(r["steps_evaluated"], r["curves"][tag], strict=True)) for r in results])


def _by_kl(result: Mapping[str, Any]) -> list[tuple[float, float]]:
    """(highest KL so far, the judge's score), where the KL has grown."""
    points: list[tuple[float, float]] = [(0.0, result["curves"]["val/judge/reward"][0])]
    for kl, score in zip(result["curves"]["train/kl"], result["curves"]["val/judge/reward"][1:], strict=True):
        if kl > points[-1][0]:
            points.append((kl, score))
    return points
