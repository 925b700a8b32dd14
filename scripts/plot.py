r"""Draw TensorBoard curves of several runs into one picture, a panel a tag.

python scripts/plot.py --tags val/sentiment/reward val/sentiment/win_rate val/length_mean val/truncated_fraction \
    --output docs/quickstart.png runs/quickstart/gopo-seed[123]
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def scalars(run: Path, tag: str) -> list[tuple[int, float]]:
    """``(step, value)`` of a TensorBoard tag."""
    events = EventAccumulator(str(run))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def main() -> None:
    """Read the event files and save the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, each with one event file")
    parser.add_argument("--tags", nargs="+", default=["val/reward", "val/win_rate"])
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    figure, axes = plt.subplots(1, len(options.tags), figsize=(4.5 * len(options.tags), 3.2), squeeze=False)
    for run in options.runs:
        for axis, tag in zip(axes[0], options.tags, strict=True):
            axis.plot(*zip(*scalars(run, tag), strict=True), marker="o", markersize=3, label=run.name)
            axis.set(title=tag, xlabel="optimiser step")
            axis.grid(alpha=0.3)
    axes[0][-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(options.output, dpi=120)


if __name__ == "__main__":
    main()
