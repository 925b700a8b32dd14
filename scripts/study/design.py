"""Which runs the study has, in the order in which they are made; each table can stand alone."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

SAMPLED = 64
"""Completions of a step, whatever G is: all runs see equally many."""
LEARNING_RATES = (4e-4, 1.2e-3, 3.6e-3)
"""The same grid for every method."""
TUNING_SEEDS = (101, 102)
SEEDS = tuple(range(1, 11))
STEPS = 50
QUICK_STEPS = 30


@dataclass(frozen=True)
class Run:
    """One training run."""

    table: str
    reward: str
    method: str
    seed: int
    lr: float
    group_size: int = 8
    steps: int = STEPS

    @property
    def name(self) -> str:
        """Of its folder."""
        size = "" if self.group_size == 8 else f"-G{self.group_size}"
        return f"{self.reward}-{self.method}{size}-lr{self.lr:g}-seed{self.seed}-{self.steps}steps"

    @property
    def key(self) -> str:
        """Two runs with the same key are the same run, whichever table asks for them."""
        return ("tuning-" if self.table == "tuning" else "") + self.name

    def record(self) -> dict[str, Any]:
        """For the results."""
        return asdict(self)


@dataclass(frozen=True)
class Table:
    """Rewards × methods, and the methods that are compared with GOPO."""

    name: str
    title: str
    rewards: tuple[str, ...]
    methods: tuple[str, ...]
    group_sizes: tuple[int, ...] = (8,)


OF_GOPO = {"gopo_arbitrary_ties": "gopo_arbitrary_ties", "gopo_rescued": "gopo"}
"""Methods with the learning rate of GOPO, for nothing ties on the clean reward; each with its advantage's layer."""

TABLES = (
    Table("1", "The score as it is, and with heavy-tailed noise", ("clean", "heavy_tailed"), ("gopo", "grpo", "rloo")),
    Table("2a", "The same order, other magnitudes", ("exp", "sigmoid", "cubed"), ("grpo", "rloo")),
    Table("2b", "Ties", ("stars", "binary"), ("gopo", *OF_GOPO, "grpo", "rloo")),
    Table("3", "Calibrated ranks and Dr. GRPO", ("clean", "heavy_tailed"), ("calibrated", "dr_grpo")),
    Table("4", "Group size, equally many completions", ("clean",), ("gopo", "grpo"), (2, 4, 16)),
    Table("5", "Other flaws", ("of_prompt", "one_rater", "few_labels"), ("gopo", "grpo", "rloo")),
)


def tuning(table: Table) -> list[Run]:
    """All learning rates for every method and group size of a table, on the clean reward."""
    return [
        Run("tuning", "clean", method, seed, lr, size)
        for size in table.group_sizes
        for method in table.methods
        if method not in OF_GOPO
        for lr in LEARNING_RATES
        for seed in TUNING_SEEDS
    ]


def chosen_lr(done: Mapping[str, Any], method: str, group_size: int) -> float | None:
    """The learning rate with the best mean outcome of the tuning runs; None until all are done."""
    method = "gopo" if method in OF_GOPO else method
    outcomes = {}
    for lr in LEARNING_RATES:
        runs = [Run("tuning", "clean", method, seed, lr, group_size) for seed in TUNING_SEEDS]
        if any(run.key not in done for run in runs):
            return None
        outcomes[lr] = fmean(outcome(done[run.key]) for run in runs)
    return max(outcomes, key=lambda lr: outcomes[lr])


def outcome(result: Mapping[str, Any]) -> float:
    """The judge's mean score of the last five evaluations: what is compared, fixed in advance."""
    return fmean(result["curves"]["val/judge/reward"][-5:])


def runs_of(table: Table, done: Mapping[str, Any], *, quick: bool = False) -> Iterable[Run]:
    """The runs of a table whose learning rates are chosen, seed by seed, so that pairs are whole."""
    for seed in SEEDS[:3] if quick else SEEDS:
        for size in table.group_sizes:
            for reward in table.rewards:
                for method in table.methods:
                    lr = LEARNING_RATES[1] if quick else chosen_lr(done, method, size)
                    if lr is not None:
                        yield Run(table.name, reward, method, seed, lr, size, QUICK_STEPS if quick else STEPS)
