"""Draws the charts of docs/quickstart.md and docs/performance.md from the tables on these pages.

python -m scripts.docs.figures
"""

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path("docs")
TRL, OURS, COMPILED = ("#c4c4c4", "#808080"), ("#8fc1ee", "#2a6fb0"), ("#a5d6b0", "#3b8f52")
SIDES = {
    "trl": ("TRL", TRL),
    "ours": ("gopo_lightning", OURS),
    "compiled": ("gopo_lightning, policy.compile", COMPILED),
}
STEPS = (0, 10, 20)
QUANTITIES = ("reward model's score", "win rate against step 0", "completions cut off (%)", "mean length (tokens)")


def rows(page: str, first: str) -> list[list[str]]:
    """The cells of the table whose header begins with ``first``."""
    table = page[page.index(f"| {first} |") :].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def numbers(cell: str) -> list[float]:
    """Every number of a cell.

    >>> numbers("+0.60, +1.70, **+1.89**")
    [0.6, 1.7, 1.89]
    """
    return [float(number) for number in re.findall(r"[−+-]?\d+(?:\.\d+)?", cell.replace("−", "-"))]


def quickstart(path: Path) -> None:
    """Four quantities of three seeds at steps 0, 10 and 20."""
    found = rows((DOCS / "quickstart.md").read_text(encoding="utf-8"), "seed")
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.2), layout="constrained")
    for seed, *cells in found:
        for axis, quantity, cell in zip(axes, QUANTITIES, cells, strict=True):
            axis.plot(STEPS, numbers(cell), "o-", markersize=4, label=f"seed {seed}")
            axis.set(title=quantity, xlabel="optimiser step", xticks=STEPS)
    axes[0].legend(frameon=False)
    _finish(figure, path)


def performance(path: Path) -> None:
    """Seconds of a step, rollout and training, in every shape."""
    found = rows((DOCS / "performance.md").read_text(encoding="utf-8"), "P × L × T × G")
    shapes = list(dict.fromkeys(row[0] for row in found))
    figure, axis = plt.subplots(figsize=(1.5 + 1.25 * len(shapes), 4.8), layout="constrained")
    labels = []
    for x, shape in enumerate(shapes):
        sides = {row[2]: row for row in found if row[0] == shape}
        for i, side in enumerate(side for side in SIDES if side in sides):
            step, rollout, *_ = numbers(sides[side][3].replace("+", ""))
            name, (light, dark) = SIDES[side]
            at = x + (i - (len(sides) - 1) / 2) * 0.28
            axis.bar(at, rollout, 0.26, color=light, label=f"{name}: rollout")
            axis.bar(at, step - rollout, 0.26, bottom=rollout, color=dark, label=f"{name}: training")
        P, L, T, G = shape.split(" × ")
        ratio = numbers(sides["trl"][3].replace("+", ""))[0] / numbers(sides["ours"][3].replace("+", ""))[0]
        labels.append(f"L = {L}\nT = {T}\n{P} × {G}\n{ratio:.1f}×")
    axis.set_xticks(range(len(shapes)), labels)
    axis.set_xlabel("L prompt tokens, T new tokens; prompts × completions of each; speed-up over TRL without compile")
    axis.set_ylabel("seconds per step")
    unique = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside upper center", ncols=3, frameon=False)
    _finish(figure, path)


def _finish(figure: plt.Figure, path: Path) -> None:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3, axis="y")
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    quickstart(DOCS / "quickstart.png")
    performance(DOCS / "performance.png")
