"""``gopo-lightning compare``: does one config beat another? Trains both with the same seeds."""

import argparse
import hashlib
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import gopo_lightning
from gopo_lightning.commands.errors import Parser
from gopo_lightning.commands.named_configs import find

if TYPE_CHECKING:
    from gopo_lightning.evaluation.event_files import Run

DESCRIPTION = """\
Does one config beat another? Trains both with the same seeds, prints the paired difference at every validation with its
95 % interval (Student's, over seeds), and writes the report of these runs.

A config is a file or a name of `gopo-lightning config list`. Joined by + they are layers of one: a later one overrides
those before it. What follows -- goes to fit.

A run that is finished is read, not trained again, if nothing that makes it has changed: the whole config with its
defaults, the seed, this package's code and the versions of the libraries. It is in
runs/compare/<config>-<hash of these>-seed<n>, in TensorBoard's files whatever logger the config names. An interrupted
run goes on from its last checkpoint.
Data, models and reward functions outside of the package are not looked at: delete the folders if these have changed.
"""
EXAMPLES = """\
examples:
  gopo-lightning compare quickstart/gopo quickstart/grpo --seeds 1 2 3 4 5
  gopo-lightning compare paper/tldr paper/tldr+advantage/grpo
  gopo-lightning compare a.yaml b.yaml --tags val/sentiment/reward -- --trainer.max_steps=50
"""
ROOT = Path("runs/compare")
FINISHED = "compare.json"
"""In a run's folder, once it is complete: what it was made of."""
LIBRARIES = ("lightning", "torch", "transformers")


def layers(config: str) -> list[Path]:
    """The files of a config, in the order in which one overrides another.

    Raises:
        ValueError: neither a file nor the name of a packaged config.
    """
    return [Path(find(file)) for file in config.split("+")]


def name_of(config: str) -> str:
    """The names of its files, without folders."""
    return "+".join(file.stem for file in layers(config))


def fit_arguments(config: str) -> list[str]:
    """``fit`` and the layers."""
    return ["fit", *(argument for file in layers(config) for argument in ("--config", str(file)))]


@cache
def resolved(config: str, flags: tuple[str, ...]) -> Mapping[str, Any]:
    """The whole config that ``fit`` would run with: all layers and flags, and every default.

    Raises:
        ValueError: it is not a config; with what `fit` says.
    """
    command = [sys.executable, "-m", "gopo_lightning", *fit_arguments(config), *flags, "--print_config"]
    printed = subprocess.run(command, capture_output=True, text=True, check=False)
    if printed.returncode:
        said = printed.stderr.strip().removeprefix("error: ")
        raise ValueError(f"{config} is no config that fit can run: {said}")
    whole: dict[str, Any] = yaml.safe_load(printed.stdout)
    whole.pop("seed_everything", None)  # both are set for each run
    whole.get("trainer", {}).pop("logger", None)
    return whole


def made_of(config: str, seed: int, flags: Sequence[str]) -> dict[str, Any]:
    """All that makes a run, by content: names of files, comments and how a flag is written do not matter."""
    code = hashlib.sha256()
    for file in sorted(Path(gopo_lightning.__file__).parent.rglob("*.py")):
        code.update(file.read_bytes())
    libraries = {name: version(name) for name in LIBRARIES}
    whole = resolved(config, tuple(flags))
    return {"config": whole, "seed": seed, "code": code.hexdigest(), "libraries": libraries}


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
    if resolved.__wrapped__(config, tuple(flags)) != resolved(config, tuple(flags)):
        raise ValueError(
            f"{config} has changed since this comparison began, so {run} would not be what its name says. The same "
            "command compares the config as it is now."
        )
    place = {"save_dir": str(ROOT.parent), "name": ROOT.name, "version": run.name}
    logger = json.dumps({"class_path": "TensorBoardLogger", "init_args": place})
    command = [*fit_arguments(config), f"--seed_everything={seed}", f"--trainer.logger={logger}"]
    command += ["--ckpt_path=last", *flags]
    try:
        subprocess.run([sys.executable, "-m", "gopo_lightning", *command], check=True)
    except subprocess.CalledProcessError as error:  # it has said why
        raise ValueError(
            f"{run} failed with exit code {error.returncode}. Mend what it says; the same command goes on from there."
        ) from error
    run.mkdir(parents=True, exist_ok=True)
    (run / FINISHED).write_text(json.dumps(made_of(config, seed, flags), indent=1, default=str), encoding="utf-8")
    return run


def table(tag: str, names: Sequence[str], first: Sequence["Run"], second: Sequence["Run"]) -> str:
    """A row a step that all runs have, in Markdown; the runs are in the same order of seeds."""
    from gopo_lightning.evaluation.intervals import paired, student
    from gopo_lightning.evaluation.seed_curves import common_steps

    ours, theirs = ([run.scalars.get(tag, {}) for run in runs] for runs in (first, second))
    lines = [f"| {tag}, step | {names[0]} | {names[1]} | difference, same seed |", "|---|---|---|---|"]
    for step in common_steps([*ours, *theirs]):
        a, b = ([curve[step] for curve in curves] for curves in (ours, theirs))
        cells = [student(a), student(b), paired(a, b)]
        texts = [f"{cell.mean:+.3f}" + (f" ± {cell.half_width:.3f}" if cell.n > 1 else "") for cell in cells]
        lines.append(f"| {step} | {' | '.join(texts)} |")
    return "\n".join(lines)


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


def main(arguments: Sequence[str]) -> None:
    """Train, print, report."""
    own, flags = list(arguments), []
    if "--" in own:
        own, flags = own[: own.index("--")], own[own.index("--") + 1 :]
    options = _parser().parse_args(own)
    command = f"gopo-lightning compare {shlex.join(arguments)}"
    _compare(options, flags, command)


def _compare(options: argparse.Namespace, flags: Sequence[str], command: str) -> None:
    from gopo_lightning.commands.report import make
    from gopo_lightning.evaluation.event_files import read_run
    from gopo_lightning.evaluation.report import reward_tags
    from gopo_lightning.evaluation.report_page import check_output

    names = labels(options.configs)
    output = options.output or ROOT / f"{'-vs-'.join(name_of(config) for config in options.configs)}"
    check_output(output)
    if resolved(options.configs[0], tuple(flags)) == resolved(options.configs[1], tuple(flags)):
        raise ValueError(f"{names[0]} and {names[1]} say the same, defaults filled in. Name two configs that differ.")
    folders: list[list[Path]] = [[], []]
    for seed in dict.fromkeys(options.seeds):  # pair by pair, so that a stop leaves whole pairs
        for runs, config in zip(folders, options.configs, strict=True):
            runs.append(train(config, seed, flags))
    first, second = ([read_run(folder) for folder in runs] for runs in folders)
    tags = options.tags or reward_tags([*first, *second])
    for tag in tags:
        print(table(tag, names, first, second), end="\n\n")
    print(make([*folders[0], *folders[1]], output, tags, None, command))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="gopo-lightning compare",
        usage="%(prog)s [-h] [--seeds SEED ...] [--tags TAG ...] [--output DIR] CONFIG CONFIG [-- FLAGS OF FIT]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("configs", nargs=2, metavar="CONFIG", help="a file or a name, or several joined by +")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5], metavar="SEED", help="[1 2 3 4 5]")
    parser.add_argument(
        "--tags", nargs="+", default=[], metavar="TAG",
        help="what is compared, the most important first [val/reward, that of each source if there are several, and "
        "val/win_rate]",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="DIR", help="of the report [runs/compare/<config>-vs-<config>]")
    return parser
