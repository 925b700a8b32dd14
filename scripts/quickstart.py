"""The quickstart: reward model from human ratings, GOPO on SmolLM2-135M, and a before/after table.

Runs the same commands that you would type, then reads what they wrote:

    python -m gopo_lightning fit --config configs/quickstart/reward_model.yaml
    python -m gopo_lightning fit --config configs/quickstart/gopo.yaml
    python -m gopo_lightning predict --config configs/quickstart/gopo.yaml --model.init_args.policy.name EXPORTED
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from time import perf_counter

from rich.console import Console
from rich.table import Table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gopo_lightning import assets

console = Console(width=None if sys.stdout.isatty() else 120)


def gopo(*args: str) -> None:
    """Run ``python -m gopo_lightning`` and show the command."""
    console.print(f"\n[bold]$ python -m gopo_lightning {' '.join(args)}[/bold]", soft_wrap=True)
    subprocess.run([sys.executable, "-m", "gopo_lightning", *args], check=True)


def scalars(run: Path, tag: str) -> list[tuple[int, float]]:
    """``(step, value)`` of a TensorBoard tag."""
    events = EventAccumulator(str(run))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def print_samples(before: list[dict], after: list[dict], source: str, num_rows: int) -> None:
    """The first completion of a prompt before and after training, each with the mean reward of its group."""
    table = Table("prompt", "before", "reward", "after", "reward", title="Held-out prompts", show_lines=True)
    for old, new in list(zip(before, after, strict=True))[:num_rows]:
        assert old["index"] == new["index"]
        rewards = [statistics.fmean(old["rewards"]), statistics.fmean(new["rewards"][source])]
        cells = [
            old["prompt"],
            old["completions"][0],
            f"{rewards[0]:+.2f}",
            new["completions"][0],
            f"{rewards[1]:+.2f}",
        ]
        table.add_row(*(" ".join(cell.split()) for cell in cells))
    console.print(table)


def main() -> None:
    """Run the quickstart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="3 steps of everything: does it run?")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--config", default="configs/quickstart/gopo.yaml")
    parser.add_argument("--name", help="run folder below runs/quickstart; the config's name and the seed by default")
    options = parser.parse_args()
    config, start = options.config, perf_counter()
    root = Path("runs/quickstart-smoke" if options.smoke else "runs/quickstart")
    name = options.name or f"{Path(config).stem}-seed{options.seed}"
    run, reward_model = root / name, root / "reward_model" / "export"

    for asset in ("smollm2-135m-instruct", "minilm-l6-v2", "movie-ratings"):
        assets.path(asset)
    if reward_model.exists():
        console.print(f"the reward model is there already: {reward_model}")
    else:
        smoke = ["--trainer.max_steps=3", "--trainer.limit_val_batches=1"] if options.smoke else []
        gopo(
            *("fit", "--config", "configs/quickstart/reward_model.yaml"),
            *("--model.init_args.export_dir", str(reward_model)),
            *smoke,
        )
    smoke = []
    if options.smoke:
        smoke = [f"--data.init_args.{part}.limit=4" for part in ("validation", "predict")]
        smoke.append("--model.init_args.sampling.max_new_tokens=8")
    shared = [
        *("--config", config),
        f"--seed_everything={options.seed}",
        "--trainer.logger.init_args.save_dir=runs",
        f"--trainer.logger.init_args.name={root.name}",
        *smoke,
    ]
    rewards = json.dumps(
        [
            {
                "class_path": "gopo_lightning.rewards.SequenceClassifierReward",
                "init_args": {"model": str(reward_model), "name": "sentiment"},
            }
        ]
    )
    if options.smoke:
        shared += [f"--model.init_args.rewards={rewards}"]
    steps = ["--trainer.max_steps=3", "--trainer.val_check_interval=3"] if options.smoke else []
    gopo("fit", *shared, f"--trainer.logger.init_args.version={name}", *steps)
    gopo(
        *("predict", *shared, f"--trainer.logger.init_args.version={name}-after"),
        *("--model.init_args.policy.name", str(run / "policy")),
    )

    after = read_jsonl(root / f"{name}-after" / "predictions.jsonl")
    print_samples(read_jsonl(run / "reference_completions.jsonl"), after, "sentiment", num_rows=6)
    reward, win_rate = scalars(run, "val/reward"), scalars(run, "val/win_rate")
    console.print(
        f"mean validation reward {reward[0][1]:+.2f} → {reward[-1][1]:+.2f} ({reward[-1][1] - reward[0][1]:+.2f}), "
        f"win rate against the reference {win_rate[-1][1]:.2f}, after {reward[-1][0]} steps and "
        f"{(perf_counter() - start) / 60:.1f} minutes"
    )
    console.print(f"TensorBoard: tensorboard --logdir {root}\nmodel: {run / 'policy'}")


if __name__ == "__main__":
    main()
