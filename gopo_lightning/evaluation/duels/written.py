"""Results as tables, as JSON and as a picture."""

import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from rich.table import Table
from rich.text import Text

from gopo_lightning.data.json_lines import dumps
from gopo_lightning.evaluation.duel import DuelResult
from gopo_lightning.evaluation.intervals import Interval
from gopo_lightning.evaluation.terminal import shown


def bounds(interval: Interval, form: str = ".3f") -> str:
    """`0.412 to 0.588`; a dash where there is no interval."""
    return "–" if math.isnan(interval.low) else f"{interval.low:{form}} to {interval.high:{form}}"


def verdict(interval: Interval, first: str = "A", second: str = "B") -> str:
    """Who wins, if the interval leaves no doubt.

    >>> verdict(Interval(0.6, 0.52, 0.68, 100)), verdict(Interval(0.6, 0.45, 0.75, 20))
    ('A wins', 'open: the interval holds 0.5')
    """
    if math.isnan(interval.low):
        return "open: one prompt has no interval"
    if interval.low == interval.high:
        return "open: it is the same on all prompts, so nothing says how others would differ"
    return (
        f"{first} wins"
        if interval.low > 0.5
        else f"{second} wins"
        if interval.high < 0.5
        else "open: the interval holds 0.5"
    )


def duel_table(result: DuelResult, first: str, second: str, judge: str) -> Table:
    """A against B, a line a number."""
    table = Table(show_header=False)
    rate, asked = result.win_rate, result.num_pairs + result.num_abstained
    bias = (
        "–" if math.isnan(result.first_bias) else f"{result.first_bias:+.3f}  (above 0: it prefers what it reads first)"
    )
    ties = f"{result.num_ties / result.num_pairs:.1%} ties"
    rows: dict[str, str | Text] = {
        "A": shown(first),
        "B": shown(second),
        "judge": shown(judge),
        "win rate of A": f"{rate.mean:.3f}  ({verdict(rate)})",
        "95 % interval": f"{bounds(rate)}  over {rate.n} prompts",
        "the paper's interval": f"{bounds(result.authors)}  (means of {result.authors.n} prompts: docs/duel.md)",
        "pairs": f"{result.num_pairs} answered of {asked}, {ties}",
        "position bias": bias,
    }
    if result.num_unanswered:
        rows["prompts without an answer"] = str(result.num_unanswered)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def ladder_table(names: Sequence[str], ratings: Sequence[Interval], rates: np.ndarray) -> Table:
    """Players from the strongest to the weakest, with the mean of their win rates against the others."""
    table = Table("policy", "Elo", "95 % interval", "mean win rate")
    for k in sorted(range(len(names)), key=lambda k: -ratings[k].mean):
        others = float(np.nanmean(np.delete(rates[k], k)))
        table.add_row(shown(names[k]), f"{ratings[k].mean:+.0f}", bounds(ratings[k], "+.0f"), f"{others:.3f}")
    return table


def curve_table(results: Mapping[int, DuelResult]) -> Table:
    """A line a step."""
    table = Table("step", "win rate of A", "95 % interval", "prompts", "")
    for step, result in results.items():
        rate = result.win_rate
        table.add_row(str(step), f"{rate.mean:.3f}", bounds(rate), str(rate.n), verdict(rate))
    return table


def save_curve(results: Mapping[int, DuelResult], path: Path, title: str) -> None:
    """Win rate over steps, with intervals, as a PNG."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps, rates = list(results), [result.win_rate for result in results.values()]
    figure, axis = plt.subplots(figsize=(6, 3.6))
    means = np.array([rate.mean for rate in rates])
    spans = np.array([[rate.mean - rate.low, rate.high - rate.mean] for rate in rates]).T
    axis.errorbar(steps, means, np.nan_to_num(spans), marker="o", markersize=4, capsize=3)
    axis.axhline(0.5, color="grey", linewidth=0.8, linestyle="--")
    axis.set(title=title, xlabel="optimiser step", ylabel="win rate of A, 95 % interval", ylim=(0, 1))
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plain_interval(interval: Interval) -> dict[str, Any]:
    """As JSON has it."""
    return {"mean": interval.mean, "low": interval.low, "high": interval.high, "n": interval.n}


def plain(result: DuelResult, first: str, second: str) -> dict[str, Any]:
    """As JSON has it: shares by the prompt's index."""
    return {
        "first": first,
        "second": second,
        "win_rate": plain_interval(result.win_rate),
        "authors_interval": plain_interval(result.authors),
        "num_pairs": result.num_pairs,
        "num_ties": result.num_ties,
        "num_abstained": result.num_abstained,
        "num_prompts_unanswered": result.num_unanswered,
        "first_bias": result.first_bias,
        "shares": {str(index): share for index, share in result.shares.items()},
    }


def save_json(path: Path, values: Mapping[str, Any]) -> None:
    """Strict JSON: NaN is null. A file that is there is replaced when the new one is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.writing")
    aside.write_text(dumps(values) + "\n", encoding="utf-8")
    aside.replace(path)


def versions() -> dict[str, str]:
    """Of what a result may depend on."""
    found = {"python": platform.python_version()}
    for name in ("gopo-lightning", "torch", "transformers", "numpy", "openai"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
