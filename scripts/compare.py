"""Does one config beat another? Trains both with the same seeds and prints the paired difference with its interval.

    python scripts/compare.py configs/quickstart/gopo.yaml configs/quickstart/grpo.yaml --seeds 1 2 3 4 5
    python scripts/compare.py configs/paper/tldr.yaml configs/paper/tldr.yaml+configs/advantage/grpo.yaml

Files joined by `+` are layers of one config: a later one overrides those before it.
A run that was finished before is read, not trained again, if nothing that makes it has changed: config, seed, what
follows `--` (which goes to `fit`) and this package's code. It is in runs/compare/<config>-<hash of these>-seed<n>.
(Data, models and reward functions outside of the package are not looked at: delete the folder if these have changed.)
Seeds are the unit: intervals are Student's 95 % of the mean over seeds, and of the mean difference within seeds.
"""

import argparse
import hashlib
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import matplotlib
import yaml

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from plot import scalars
from scipy.stats import t

import gopo_lightning

ROOT = Path("runs/compare")
FINISHED = "compare.json"
"""In a run's folder, once it is complete: what it was made of."""
Curves = dict[int, list[float]]
"""Value of each seed at each step."""


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval, by Student's t with n − 1 degrees of freedom; NaN for one value."""
    if len(values) < 2:
        return values[0], math.nan
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), float(half)


def layers(config: str) -> list[Path]:
    """The files of a config, in the order in which one overrides another."""
    return [Path(file) for file in config.split("+")]


def name_of(config: str) -> str:
    """The names of its files, without folders."""
    return "+".join(file.stem for file in layers(config))


def made_of(config: str, seed: int, flags: Sequence[str]) -> dict[str, Any]:
    """All that makes a run, by content: comments and file names do not matter, overlays among ``flags`` do."""
    overlays = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    overlays.add_argument("--config", action="append", type=Path, default=[])
    files = [*layers(config), *overlays.parse_known_args(flags)[0].config]
    configs = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in files]
    code = hashlib.sha256()
    for file in sorted(Path(gopo_lightning.__file__).parent.rglob("*.py")):
        code.update(file.read_bytes())
    return {"configs": configs, "seed": seed, "flags": list(flags), "code": code.hexdigest()}


def folder_of(config: str, seed: int, flags: Sequence[str]) -> Path:
    """Where the run is, or will be."""
    text = json.dumps(made_of(config, seed, flags), sort_keys=True, default=str)
    return ROOT / f"{name_of(config)}-{hashlib.sha256(text.encode()).hexdigest()[:8]}-seed{seed}"


def train(config: str, seed: int, flags: Sequence[str]) -> Path:
    """The run's folder; trains if it is not complete, from the last checkpoint of one that was interrupted."""
    run = folder_of(config, seed, flags)
    if (run / FINISHED).exists():
        finished = datetime.fromtimestamp((run / FINISHED).stat().st_mtime)
        print(f"read, not trained: {run}, finished {finished:%Y-%m-%d %H:%M}", flush=True)
        return run
    logger = [f"--trainer.logger.init_args.{key}" for key in ("save_dir", "name", "version")]
    names = [f"{key}={value}" for key, value in zip(logger, (ROOT.parent, ROOT.name, run.name), strict=True)]
    files = [argument for file in layers(config) for argument in ("--config", str(file))]
    command = ["fit", *files, f"--seed_everything={seed}", *names, "--ckpt_path=last", *flags]
    subprocess.run([sys.executable, "-m", "gopo_lightning", *command], check=True)
    run.mkdir(parents=True, exist_ok=True)
    (run / FINISHED).write_text(json.dumps(made_of(config, seed, flags), indent=1, default=str), encoding="utf-8")
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


def labels(configs: Sequence[str]) -> list[str]:
    """Names of two configs: of their files, with the folders where the files are called alike.

    Raises:
        ValueError: it is the same config twice.
    """
    first, second = configs
    if [file.resolve() for file in layers(first)] == [file.resolve() for file in layers(second)]:
        raise ValueError(f"{first} is compared with itself. Name two configs.")
    names = [name_of(config) for config in configs]
    return names if names[0] != names[1] else [first, second]


def main() -> None:
    """Train, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs=2, metavar="CONFIG")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--tags", nargs="+", default=["val/reward", "val/win_rate"])
    parser.add_argument("--output", type=Path, default=ROOT / "compare.png", help="the picture")
    own, flags = sys.argv[1:], []
    if "--" in own:
        own, flags = own[: own.index("--")], own[own.index("--") + 1 :]
    options = parser.parse_args(own)
    names = labels(options.configs)
    runs: dict[str, list[Path]] = {name: [] for name in names}
    for seed in options.seeds:  # pair by pair, so that a stop leaves whole pairs
        for name, config in zip(names, options.configs, strict=True):
            runs[name].append(train(config, seed, flags))
    groups = {name: {tag: curves(folders, tag) for tag in options.tags} for name, folders in runs.items()}
    first, second = groups.values()
    for tag in options.tags:
        print(table(tag, list(groups), first[tag], second[tag]), end="\n\n")
    draw(options.tags, groups, options.output)
    print(options.output)


if __name__ == "__main__":
    main()
