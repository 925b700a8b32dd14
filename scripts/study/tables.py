"""The study's tables: means over seeds, differences within seeds, and what they say after Holm's correction."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from gopo_lightning.evaluation.contrasts import holm, paired_p
from gopo_lightning.evaluation.intervals import paired, student
from gopo_lightning.evaluation.seed_curves import StepsRatio, interpolate, steps_ratio
from scripts.study.design import TABLES, Done, Table, lr_in, missing, of_same_assets, outcome, runs_of, tuning


def tables_of(chosen: Iterable[Table], done: Done, *, quick: bool = False) -> str:
    """In markdown."""
    return "\n\n".join(table_of(table, done, quick=quick) for table in chosen)


def table_of(table: Table, done: Done, *, quick: bool = False) -> str:
    """Means of each cell, and GOPO's differences from the others on the same reward and seeds."""
    groups = runs_of(table, done, quick=quick)
    cell_of: dict[tuple[str, int, str], dict[int, Mapping[str, Any]]] = {}
    for runs in groups:
        results = of_same_assets(runs, done)
        for run in runs:
            if run.key in results:
                cell_of.setdefault((run.reward, run.group_size, run.method), {})[run.seed] = results[run.key]
    lines = [
        f"**Table {table.name}. {table.title}**\n",
        "| reward | G | method | lr | seeds | judge, last 5 | proxy | at the start | won against step 0 | KL "
        "| cut off | tokens | gradient clipped |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for reward in table.rewards:
        for size in table.group_sizes:
            for method in table.methods:
                cell = cell_of.get((reward, size, method), {})
                lines.append(_row(reward, size, method, cell, lr_in(table, done, method, size)))
    if table.warps:
        lines.append(_row("clean", 8, "gopo", cell_of.get(("clean", 8, "gopo"), {}), lr_in(table, done, "gopo", 8)))
    contrasts = [
        (
            reward,
            size,
            method,
            _difference(
                cell_of.get(("clean" if table.warps else reward, size, "gopo"), {}),
                cell_of.get((reward, size, method), {}),
            ),
        )
        for reward in table.rewards
        for size in table.group_sizes
        for method in table.methods
        if method != "gopo"
    ]
    measured = [contrast for contrast in contrasts if contrast[3] is not None]
    adjusted = holm([contrast[3]["p"] for contrast in measured]) if measured else []
    lines.append(
        "\n| reward | G | GOPO minus | seeds | judge, last 5 | p, Holm | at equal KL | steps to its end | ahead at |"
    )
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for (reward, size, method, found), p in zip(measured, adjusted, strict=True):
        lines.append(
            f"| {reward} | {size} | {method} | {found['n']} | {found['outcome']} | {p:.3f} | {found['kl']} | "
            f"{_ratio(found['steps'])} | {found['ahead']} |"
        )
    gaps = sum(len(runs) - len(of_same_assets(runs, done)) for runs in groups)
    return "\n".join(lines) + (f"\n\n{gaps} of {sum(map(len, groups))} runs are missing." if gaps else "")


def _row(reward: str, size: int, method: str, cell: Mapping[int, Mapping[str, Any]], lr: float | None) -> str:
    if not cell:
        return f"| {reward} | {size} | {method} | {lr or 'not chosen'} | 0 | missing | | | | | | | |"
    results = list(cell.values())

    def mean(tag: str, n: int = -5) -> float:
        return fmean(fmean(result["curves"][tag][n:]) for result in results)

    start = fmean(result["curves"]["val/judge/reward"][0] for result in results)
    clipped = fmean(result["gradient_clip_active"] for result in results)
    return (
        f"| {reward} | {size} | {method} | {results[0]['lr']:g} | {len(results)} | "
        f"{student([*map(outcome, results)])} | "
        f"{mean('val/proxy/reward'):+.2f} | {start:+.2f} | {mean('val/judge/win_rate'):.2f} | "
        f"{mean('train/kl', -1):.2f} | {mean('val/truncated_fraction'):.0%} | {mean('val/length_mean'):.1f} | "
        f"{clipped:.0%} |"
    )


def _difference(gopo: Mapping[int, Any], other: Mapping[int, Any]) -> dict[str, Any] | None:
    """Of the outcome, and of the judge's score at equal KL; None for fewer than two common seeds."""
    seeds = sorted(gopo.keys() & other.keys())
    if len(seeds) < 2:
        return None
    values = [[outcome(cell[seed]) for seed in seeds] for cell in (gopo, other)]
    p = paired_p([a - b for a, b in zip(*values, strict=True)])
    equal = [at_equal_kl(gopo[seed], other[seed]) for seed in seeds]
    curves = [[_judged(cell[seed]) for seed in seeds] for cell in (gopo, other)]
    return {
        "n": len(seeds),
        "outcome": paired(*values),
        "kl": student(equal),
        "p": p,
        "steps": steps_ratio(*curves),
        "ahead": _ahead(*curves),
    }


def _judged(result: Mapping[str, Any]) -> dict[int, float]:
    """Step → the judge's mean score."""
    return dict(zip(result["steps_evaluated"], result["curves"]["val/judge/reward"], strict=True))


def _ahead(gopo: Sequence[Mapping[int, float]], other: Sequence[Mapping[int, float]]) -> str:
    """`7 of 10`: evaluations after step 0 at which the judge's mean over seeds is higher."""
    steps = [step for step in gopo[0] if step > 0]
    ahead = [fmean(a[step] - b[step] for a, b in zip(gopo, other, strict=True)) > 0 for step in steps]
    return f"{sum(ahead)} of {len(steps)}"


def _ratio(found: StepsRatio) -> str:
    """`× 0.80 [0.70, 0.91]`: GOPO's steps until it has what the other ends with, over the other's own."""
    if found.ratio is None:
        return "–"
    if found.never:
        return f"more than × {found.ratio.mean:.2f} ({found.never} never)"
    return f"× {found.ratio.mean:.2f} [{found.ratio.low:.2f}, {found.ratio.high:.2f}]"


def at_equal_kl(first: Mapping[str, Any], second: Mapping[str, Any]) -> float:
    """First minus second, the judge's score where both have moved as far: the mean over KLs that both have reached.

    A run's score at a KL is read off the line through its evaluations, (highest KL so far, score).
    """
    curves = [_against_kl(result) for result in (first, second)]
    reached = min(curve[-1][0] for curve in curves)
    grid = [reached * k / 10 for k in range(6, 11)]
    return fmean(interpolate(curves[0], kl) - interpolate(curves[1], kl) for kl in grid)


def _against_kl(result: Mapping[str, Any]) -> list[tuple[float, float]]:
    kl, points = 0.0, []
    for value, score in zip([0.0, *result["curves"]["train/kl"]], result["curves"]["val/judge/reward"], strict=True):
        kl = max(kl, value) if math.isfinite(value) else kl
        points.append((kl, score))
    return points


def forecast(done: Done, assets: Callable[[str], str], workers: int, *, quick: bool = False) -> str:
    """How many runs are missing, and how long they take at the speed of those that are done with these assets.

    Args:
        done: the results.
        assets: policy → those that are here.
        workers: runs at a time.
        quick: of the small version.
    """
    lines, total, minutes = [], 0, 0.0
    tuned: set[str] = set()
    asked: set[tuple[Any, ...]] = set()  # what two tables want is made once
    for table in TABLES[:1] if quick else TABLES:
        of_policy = [
            row for row in done.get(assets(table.policy), {}).values() if row.get("policy", "small") == table.policy
        ]
        seconds = median([row["seconds"] for row in of_policy] or [120.0])
        groups = [] if quick else [runs for runs in tuning(table) if runs[0].key not in tuned]
        tuned |= {runs[0].key for runs in groups}
        choosing = sum(map(len, groups))
        gaps = len(missing(groups, done, assets(table.policy)))
        wanted = {
            (table.policy, seed, size, reward, method, table.lr_of or method)
            for seed in (table.seeds[:3] if quick else table.seeds)
            for size, reward, method in table.cells
        }
        finished = {
            (run.policy, run.seed, run.group_size, run.reward, run.method, table.lr_of or run.method)
            for runs in runs_of(table, done, quick=quick)
            for results in [of_same_assets(runs, done)]
            for run in runs
            if run.key in results
        }
        to_make = len(wanted - finished - asked) + gaps
        asked |= wanted - finished
        total += to_make
        minutes += to_make * seconds / workers / 60
        lines.append(
            f"table {table.name}: {len(finished)} of {len(wanted)} runs, {choosing - gaps} of {choosing} to choose "
            f"learning rates; {seconds:.0f} s a run"
        )
    return "\n".join([*lines, f"{total} runs are missing: about {minutes:.0f} minutes"])
