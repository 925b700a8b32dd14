"""``gopo-lightning quickstart``: reward model from human ratings, GOPO on SmolLM2-135M, and a before/after table."""

import argparse
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gopo_lightning.commands.errors import Parser
from gopo_lightning.commands.named_configs import find

DESCRIPTION = """\
Trains a reward model on human ratings and a policy on its ranks, below runs/quickstart, and compares what the policy
writes before and after. It runs the same commands that you would type, and shows them:

  gopo-lightning fit --config quickstart/reward_model
  gopo-lightning fit --config quickstart/gopo
  gopo-lightning predict --config quickstart/gopo
  gopo-lightning predict --config quickstart/gopo --model.init_args.policy.name EXPORTED

With --config quickstart/gopo quickstart/borda (or quickstart/pairwise), it has other rewards. 8 to 13 minutes on two
cores. Models and ratings come from the package index and are kept in $GOPO_CACHE, by default ~/.cache/gopo_lightning.
"""
CONFIG_ROOT = "runs/quickstart"
"""Where the configs write, and find the reward model."""

console = Console(width=None if sys.stdout.isatty() else 120)


class Outcome(NamedTuple):
    """What a policy wrote to the held-out prompts, and how one reward model judges it."""

    scores_PG: list[list[float]]
    truncated_fraction: float
    mean_tokens: float


def gopo(*args: str) -> None:
    """Run ``gopo-lightning`` and show the command."""
    console.print(Text(f"\n$ gopo-lightning {shlex.join(args)}", "bold"), soft_wrap=True)
    subprocess.run([sys.executable, "-m", "gopo_lightning", *args], check=True)


def outcome(rows: list[dict[str, Any]], source: str) -> Outcome:
    """Scores by ``source``, share of completions that were cut off, and their length, from lines of `predict`."""
    from gopo_lightning.data.json_lines import number

    reasons = [reason for row in rows for reason in row["finish_reasons"]]
    return Outcome(
        [[number(score) for score in row["rewards"][source]] for row in rows],
        reasons.count("length") / len(reasons),
        statistics.fmean(tokens for row in rows for tokens in row["num_tokens"]),
    )


def win_rate(after_PG: list[list[float]], before_PG: list[list[float]]) -> float:
    """Share of pairs (after, before) of one prompt that the first wins, ties half, averaged over prompts."""
    shares = [
        statistics.fmean((a > b) + 0.5 * (a == b) for a in after_G for b in before_G)
        for after_G, before_G in zip(after_PG, before_PG, strict=True)
    ]
    return statistics.fmean(shares)


def print_samples(before: list[dict[str, Any]], after: list[dict[str, Any]], source: str, num_rows: int) -> None:
    """The first completion of a prompt before and after training, each with its score."""
    from gopo_lightning.data.json_lines import number
    from gopo_lightning.evaluation.terminal import shown

    table = Table("prompt", "before", source, "after", source, title="Held-out prompts", show_lines=True)
    for old, new in list(zip(before, after, strict=True))[:num_rows]:
        assert old["index"] == new["index"]
        cells = [shown(old["prompt"])]
        for row in (old, new):
            cells += [shown(row["completions"][0]), Text(f"{number(row['rewards'][source][0]):+.2f}")]
        table.add_row(*cells)
    console.print(table)


def print_outcomes(before: Outcome, after: Outcome, source: str) -> None:
    """The numbers over all completions."""
    means = [statistics.fmean(score for scores in o.scores_PG for score in scores) for o in (before, after)]
    table = Table("all held-out completions", "before", "after")
    table.add_row(f"mean {source}", *(f"{mean:+.2f}" for mean in means))
    table.add_row(f"win rate by {source}", "0.50", f"{win_rate(after.scores_PG, before.scores_PG):.2f}")
    table.add_row("cut off by max_new_tokens", *(f"{o.truncated_fraction:.1%}" for o in (before, after)))
    table.add_row("mean tokens", *(f"{o.mean_tokens:.1f}" for o in (before, after)))
    console.print(table)


def rewards_of(configs: Sequence[str], reward_model: Path) -> str:
    """The last sources in ``configs``, in JSON for the command line, with the reward model at ``reward_model``."""
    models = [yaml.safe_load(Path(find(config)).read_text(encoding="utf-8")).get("model", {}) for config in configs]
    groups = [model["init_args"]["rewards"] for model in models if "rewards" in model.get("init_args", {})]
    *_, rewards = [group["sources"] for group in groups if "sources" in group]
    return yaml.safe_dump(rewards, default_flow_style=True, width=10**6).replace(
        f"{CONFIG_ROOT}/reward_model/export", str(reward_model)
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="gopo-lightning quickstart",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--smoke", action="store_true", help="3 steps of everything: does it run?")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--config", nargs="+", default=["quickstart/gopo"], help="a later one overrides")
    parser.add_argument("--name", help="run folder below runs/quickstart; the config's name and the seed by default")
    parser.add_argument("--source", default="sentiment", help="the reward that the tables show")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run the quickstart."""
    options = _parser().parse_args(arguments)
    try:
        _quickstart(options)
    except subprocess.CalledProcessError as error:  # it has said why
        raise ValueError(f"the command above failed with exit code {error.returncode}.") from error


def _precision() -> list[str]:
    """The configs compute in bfloat16, which some CPUs emulate."""
    import torch

    from gopo_lightning.rollout.engines.precision import cpu_computes_bfloat16

    if torch.cuda.is_available() or cpu_computes_bfloat16():
        return []
    console.print("This CPU emulates bfloat16: the quickstart computes in float32.")
    return ["--trainer.precision=32-true"]


def _quickstart(options: argparse.Namespace) -> None:
    from gopo_lightning.data import assets  # which imports torch, and --help has no use for it
    from gopo_lightning.data.json_lines import read_jsonl

    start = perf_counter()
    root = Path("runs/quickstart-smoke" if options.smoke else CONFIG_ROOT)
    name = options.name or f"{Path(options.config[-1]).stem}-seed{options.seed}"
    run, reward_model = root / name, root / "reward_model" / "export"

    for asset in ("smollm2-135m-instruct", "minilm-l6-v2", "movie-ratings"):
        assets.path(asset)
    precision = _precision()
    if reward_model.exists():
        console.print(f"the reward model is there already: {reward_model}", markup=False)
    else:
        smoke = ["--trainer.max_steps=3", "--trainer.limit_val_batches=1"] if options.smoke else []
        gopo(
            *("fit", "--config", "quickstart/reward_model"),
            *("--model.init_args.export_dir", str(reward_model)),
            *precision,
            *smoke,
        )
    shared = [
        *(f"--config={config}" for config in options.config),
        f"--seed_everything={options.seed}",
        "--trainer.logger.init_args.save_dir=runs",
        f"--trainer.logger.init_args.name={root.name}",
        *precision,
    ]
    steps = []
    if options.smoke:
        shared += [f"--data.init_args.{part}.limit=4" for part in ("validation", "predict")]
        shared.append(f"--model.init_args.rewards.sources={rewards_of(options.config, reward_model)}")
        steps = ["--trainer.max_steps=3", "--trainer.val_check_interval=3"]
    gopo("fit", *shared, f"--trainer.logger.init_args.version={name}", *steps)
    predictions = []
    for when, policy in (("before", None), ("after", run / "policy")):
        version = f"{name}-{when}"
        trained = [] if policy is None else ["--model.init_args.policy.name", str(policy)]
        gopo("predict", *shared, f"--trainer.logger.init_args.version={version}", *trained)
        predictions.append(list(read_jsonl(root / version / "predictions.jsonl")))

    before, after = predictions
    print_samples(before, after, options.source, num_rows=6)
    print_outcomes(outcome(before, options.source), outcome(after, options.source), options.source)
    console.print(f"{(perf_counter() - start) / 60:.1f} minutes", markup=False)
    console.print(f"TensorBoard: tensorboard --logdir {root}\nmodel: {run / 'policy'}", markup=False)
