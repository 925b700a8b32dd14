"""Does one config beat another? Trains both with the same seeds and prints the paired difference with its interval.

    python scripts/compare.py configs/quickstart/gopo.yaml configs/quickstart/grpo.yaml --seeds 1 2 3 4 5

A run whose folder is there (runs/compare/<config>-seed<n>) is read, not trained again; what follows `--` goes to `fit`.
Seeds are the unit: intervals are Student's 95 % of the mean over seeds, and of the mean difference within seeds.
"""

import argparse
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from quickstart import scalars
from scipy.stats import t

ROOT = Path("runs/compare")
Curves = dict[int, list[float]]
"""Value of each seed at each step."""


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval, by Student's t with n − 1 degrees of freedom; NaN for one value."""
    if len(values) < 2:
        return values[0], math.nan
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), float(half)


def train(config: Path, seed: int, flags: Sequence[str]) -> Path:
    """The run's folder; trains if it is not there."""
    run = ROOT / f"{config.stem}-seed{seed}"
    if not run.exists():
        logger = [f"--trainer.logger.init_args.{key}" for key in ("save_dir", "name", "version")]
        names = [f"{key}={value}" for key, value in zip(logger, (ROOT.parent, ROOT.name, run.name), strict=True)]
        command = ["fit", "--config", str(config), f"--seed_everything={seed}", *names, *flags]
        subprocess.run([sys.executable, "-m", "gopo_lightning", *command], check=True)
    return run


def curves(runs: Sequence[Path], tag: str) -> Curves:
    """The tag of all runs, at the steps that all have."""
    seen = [dict(scalars(run, tag)) for run in runs]
    steps = sorted(set.intersection(*(set(points) for points in seen)))
    return {step: [points[step] for points in seen] for step in steps}


def table(tag: str, names: Sequence[str], first: Curves, second: Curves) -> str:
    """A row a step, in markdown."""
    lines = [f"| {tag}, step | {names[0]} | {names[1]} | difference, same seed |", "|---|---|---|---|"]
    for step in sorted(first.keys() & second.keys()):
        difference = [a - b for a, b in zip(first[step], second[step], strict=True)]
        cells = [interval(values) for values in (first[step], second[step], difference)]
        lines.append(f"| {step} | " + " | ".join(f"{mean:+.3f} ± {half:.3f}" for mean, half in cells) + " |")
    return "\n".join(lines)


def draw(tags: Sequence[str], groups: dict[str, dict[str, Curves]], path: Path) -> None:
    """A panel a tag: every seed as a thin line, the mean as a thick one in its interval."""
    figure, axes = plt.subplots(1, len(tags), figsize=(4.5 * len(tags), 3.4), squeeze=False, layout="constrained")
    for axis, tag in zip(axes[0], tags, strict=True):
        for number, (name, curves_of) in enumerate(groups.items()):
            points, colour = curves_of[tag], f"C{number}"
            steps = list(points)
            means, halves = zip(*(interval(points[step]) for step in steps), strict=True)
            for seed in zip(*points.values(), strict=True):
                axis.plot(steps, seed, colour, linewidth=0.6, alpha=0.5)
            label = f"{name}, {len(points[steps[0]])} seeds"
            axis.plot(steps, means, colour, linewidth=2, marker="o", markersize=4, label=label)
            low, high = ([m + sign * h for m, h in zip(means, halves, strict=True)] for sign in (-1, 1))
            axis.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
        axis.set(title=tag, xlabel="optimiser step")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    axes[0][0].legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Train, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs=2, type=Path, metavar="CONFIG")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--tags", nargs="+", default=["val/reward", "val/win_rate"])
    parser.add_argument("--output", type=Path, default=ROOT / "compare.png", help="the picture")
    own, flags = sys.argv[1:], []
    if "--" in own:
        own, flags = own[: own.index("--")], own[own.index("--") + 1 :]
    options = parser.parse_args(own)
    runs: dict[str, list[Path]] = {config.stem: [] for config in options.configs}
    for seed in options.seeds:  # pair by pair, so that a stop leaves whole pairs
        for config in options.configs:
            runs[config.stem].append(train(config, seed, flags))
    groups = {name: {tag: curves(folders, tag) for tag in options.tags} for name, folders in runs.items()}
    first, second = groups.values()
    for tag in options.tags:
        print(table(tag, list(groups), first[tag], second[tag]), end="\n\n")
    draw(options.tags, groups, options.output)
    print(options.output)


if __name__ == "__main__":
    main()
