"""What a budget of comparisons buys: the error of a group's ordinal advantages against the number of pairs asked.

    python scripts/benchmark_comparisons.py --groups 300 --output comparisons.json

Each group has G completions of strengths drawn from N(0, 1), whose ordinal advantages are the truth. A synthetic judge
answers each pair once and for all: i beats j with probability σ(k (θ_i − θ_j)); k = ∞ is without noise. The same
answers are given to the round-robin of `num_opponents`, to the same with the other pairs inferred as by
`BudgetedComparisons`, and to this, which also chooses the pairs. The regret is Σ_i |A_i − A_i*| / G, of advantages
between −2 and 2; with 95 % intervals over groups, and of the paired difference between the first and the last.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gopo_lightning.evaluation.intervals import paired, student
from gopo_lightning.objectives.advantages import ordinal, ordinal_from_wins
from gopo_lightning.rewards import BudgetedComparisons, PairComparator, PairwiseSource
from gopo_lightning.rewards.budgeted import with_inferred
from gopo_lightning.rewards.pairwise import round_robin
from gopo_lightning.types import Prompt

SPREAD = 1.5
"""Of the strengths before any answer; the default of `BudgetedComparisons`."""


class SyntheticJudge(PairComparator):
    """Answers from tables_PGG; the text of completion i is its number."""

    def __init__(self, tables_PGG: Tensor, num_opponents: int | None = None) -> None:
        super().__init__("synthetic", num_opponents)
        self.tables_PGG = tables_PGG

    def compare(self, prompts: Sequence[Prompt], firsts: Sequence[str], seconds: Sequence[str]) -> list[float]:
        """1 or 0."""
        asked = zip(prompts, firsts, seconds, strict=True)
        return [float(self.tables_PGG[prompt.index, int(a), int(b)]) for prompt, a, b in asked]


def draw(P: int, G: int, k: float, seed: int) -> tuple[Tensor, Tensor]:
    """True advantages_PG, and the judge's answers tables_PGG of 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    theta_PG = torch.randn(P, G, generator=generator, dtype=torch.float64)
    margin_PGG = theta_PG[:, :, None] - theta_PG[:, None, :]
    p_PGG = (margin_PGG > 0).double() if math.isinf(k) else (k * margin_PGG).sigmoid()
    wins_PGG = (torch.rand(P, G, G, generator=generator, dtype=torch.float64) < p_PGG).double().triu(1)
    return ordinal(theta_PG).double(), wins_PGG + (1 - wins_PGG).mT.tril(-1)


def wins_of(source: PairwiseSource, P: int, G: int) -> Tensor:
    """wins_PGG of all groups."""
    return source([Prompt(p, (1,), "") for p in range(P)], [[str(i) for i in range(G)]] * P)


def completed(wins_PGG: Tensor) -> Tensor:
    """With what the answers imply of the other pairs."""
    mirrored_PGG = torch.where(wins_PGG.isnan(), 1 - wins_PGG.mT, wins_PGG)
    return torch.stack([with_inferred(wins_GG, SPREAD) for wins_GG in mirrored_PGG])


def regrets(wins_PGG: Tensor, truth_PG: Tensor) -> list[float]:
    """Of each group."""
    return (ordinal_from_wins(wins_PGG) - truth_PG).abs().mean(-1).tolist()  # type: ignore[no-any-return]


def measure(P: int, G: int, k: float, seed: int) -> list[dict[str, Any]]:
    """A row for each number of opponents."""
    truth_PG, tables_PGG = draw(P, G, k, seed)
    rows = []
    for opponents in [*range(1, G - 1), G - 1]:
        pairs = len(round_robin(G, opponents))
        robin_PGG = wins_of(SyntheticJudge(tables_PGG, opponents), P, G)
        chosen_PGG = wins_of(BudgetedComparisons(SyntheticJudge(tables_PGG), pairs, spread=SPREAD), P, G)
        matrices = {"round_robin": robin_PGG, "inferred": completed(robin_PGG), "budgeted": chosen_PGG}
        found = {name: regrets(wins_PGG, truth_PG) for name, wins_PGG in matrices.items()}
        row = {name: student(values) for name, values in found.items()}
        row["difference"] = paired(found["budgeted"], found["round_robin"])
        rows.append({"k": k, "pairs": pairs, "num_opponents": opponents, **{n: vars(v) for n, v in row.items()}})
        print(f"| {k:g} | {pairs} | " + " | ".join(str(interval) for interval in row.values()) + " |", flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=300, help="per level of noise")
    parser.add_argument("--size", type=int, default=8, help="G, completions of a group")
    parser.add_argument("--noise", type=float, nargs="+", default=[math.inf, 4.0, 1.5], help="k of the judges")
    parser.add_argument("--seed", type=int, default=0, help="of strengths and answers")
    parser.add_argument("--output", type=Path, help="JSON file of the rows")
    options = parser.parse_args(arguments)
    print("| k | pairs | round-robin | others inferred | budget | difference |\n|---|---|---|---|---|---|")
    rows = [row for k in options.noise for row in measure(options.groups, options.size, k, options.seed)]
    if options.output is not None:
        options.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return rows


if __name__ == "__main__":
    main()
