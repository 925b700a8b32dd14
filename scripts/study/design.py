"""Which runs the study has, in the order in which they are made; each table can stand alone."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from statistics import fmean
from typing import Any

MAX_KL, MAX_CUT_OFF = 3.0, 0.2
"""What a learning rate may do to the policy, as means over its tuning runs: KL to the start at the end (nats a token),
and completions that are cut off. Beyond them it repeats praise without end, which the judge likes best of all.
"""
QUICK_STEPS = 30


@dataclass(frozen=True)
class Policy:
    """What is trained, and for how long."""

    learning_rates: tuple[float, ...]
    """The same grid for every method."""
    seeds: tuple[int, ...]
    steps: int
    sampled: int
    """Completions of a rollout, whatever G is: all runs see equally many."""
    base: tuple[str, ...] = ("base",)
    """Its layers, files of configs/study."""
    tuning_prompts: str = "tuning_prompts"
    """What the learning rate is chosen on, a file of the assets; that of the verdict is in the base."""
    assets: str = "facts.json"
    """What tells these assets from those of another machine."""
    tuning_seeds: tuple[int, ...] = (101, 102)


POLICIES = {
    "small": Policy((4e-4, 1.2e-3, 3.6e-3), tuple(range(1, 11)), 50, 64),
    "smollm2": Policy(
        (5e-6, 1.5e-5, 4.5e-5),
        (1, 2, 3),
        20,
        16,
        ("base", "smollm2/base"),
        "smollm2_tuning",
        tuning_seeds=(101,),
    ),
    "adder": Policy(
        (3e-5, 1e-4, 3e-4),
        (1, 2, 3),
        200,
        128,
        ("adder/base",),
        "adder/tuning",
        "adder/training.json",
    ),
    "small4": Policy(
        (1e-4, 3e-4, 1e-3),
        (1, 2, 3),
        60,
        64,
        ("base", "four_updates"),
        tuning_seeds=(101,),
    ),
}


@dataclass(frozen=True)
class Run:
    """One training run."""

    table: str
    reward: str
    method: str
    seed: int
    lr: float
    group_size: int = 8
    steps: int = POLICIES["small"].steps
    policy: str = "small"

    @property
    def name(self) -> str:
        """Of its folder."""
        size = "" if self.group_size == 8 else f"-G{self.group_size}"
        policy = "" if self.policy == "small" else f"{self.policy}-"
        return f"{policy}{self.reward}-{self.method}{size}-lr{self.lr:g}-seed{self.seed}-{self.steps}steps"

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
    policy: str = "small"
    warps: bool = False
    """The rewards are warps of the clean one, on which GOPO is therefore run."""
    lr_of: str | None = None
    """The method whose learning rate all take; else each has its own."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of every cell."""
        return POLICIES[self.policy].seeds

    @property
    def cells(self) -> list[tuple[int, str, str]]:
        """Every group size, reward and method."""
        found = list(product(self.group_sizes, self.rewards, self.methods))
        return [*found, (8, "clean", "gopo")] if self.warps else found


METHODS = ("gopo", "rloo", "dpo", "rebel", "inpo", "p3o", "lipo", "gepo", "pf_ppo", "refill")
OF_ANSWERS = ("seed_grpo", "hapo")
"""They ask which answers are the same, or right."""

OF_GOPO = {"gopo_arbitrary_ties": "gopo_arbitrary_ties", "gopo_rescued": "gopo"}
"""Methods with the learning rate of GOPO, for nothing ties on the clean reward; each with its advantage's layer."""

TABLES = (
    Table("1", "The score as it is, and with heavy-tailed noise", ("clean", "heavy_tailed"), ("gopo", "grpo", "rloo")),
    Table("2a", "The same order, other magnitudes", ("exp", "sigmoid", "cubed"), ("grpo", "rloo"), warps=True),
    Table("2b", "Ties", ("stars", "binary"), ("gopo", *OF_GOPO, "grpo", "rloo")),
    Table("3", "Calibrated ranks and Dr. GRPO", ("clean", "heavy_tailed"), ("gopo", "calibrated", "dr_grpo")),
    Table(
        "3b",
        "Calibrated ranks and Dr. GRPO at GOPO's learning rate",
        ("clean", "heavy_tailed"),
        ("gopo", "calibrated", "dr_grpo"),
        lr_of="gopo",
    ),
    Table("4", "Group size, equally many completions", ("clean",), ("gopo", "grpo"), (2, 4, 16)),
    Table("5", "Other flaws", ("of_prompt", "one_rater", "few_labels"), ("gopo", "grpo", "rloo")),
    Table("6a", "SmolLM2-135M-Instruct", ("clean", "heavy_tailed"), ("gopo", "grpo"), policy="smollm2"),
    Table("6b", "SmolLM2-135M-Instruct, RLOO", ("clean", "heavy_tailed"), ("gopo", "rloo"), policy="smollm2"),
    Table("7", "Methods on sums, four updates of a rollout", ("clean",), METHODS + OF_ANSWERS, policy="adder"),
    Table("8", "Methods on sentences, four updates of a rollout", ("clean",), METHODS, policy="small4"),
)


Done = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Assets → key of a run → its result."""


def tuning(table: Table) -> list[list[Run]]:
    """All learning rates for every method and group size of a table, on the clean reward; a list for each of these."""
    return [
        _tuning(method, size, table.policy)
        for size in table.group_sizes
        for method in ((table.lr_of,) if table.lr_of else table.methods)
        if method not in OF_GOPO
    ]


def _tuning(method: str, size: int, policy: str) -> list[Run]:
    of = POLICIES[policy]
    return [
        Run("tuning", "clean", method, seed, lr, size, of.steps, policy)
        for lr in of.learning_rates
        for seed in of.tuning_seeds
    ]


def chosen_lr(done: Done, method: str, group_size: int, policy: str = "small") -> float | None:
    """The learning rate with the best mean outcome of the tuning runs, of those that keep within MAX_KL and MAX_CUT_OFF
    (the lowest if none does); None until all are done.
    """
    runs = _tuning("gopo" if method in OF_GOPO else method, group_size, policy)
    results = of_same_assets(runs, done)
    if any(run.key not in results for run in runs):
        return None
    outcomes = {}
    for lr in POLICIES[policy].learning_rates:
        found = [results[run.key] for run in runs if run.lr == lr]
        kl = fmean(result["curves"]["train/kl"][-1] for result in found)
        cut_off = fmean(fmean(result["curves"]["val/truncated_fraction"][-5:]) for result in found)
        if kl <= MAX_KL and cut_off <= MAX_CUT_OFF:
            outcomes[lr] = fmean(map(outcome, found))
    return max(outcomes, key=lambda lr: outcomes[lr], default=POLICIES[policy].learning_rates[0])


def lr_in(table: Table, done: Done, method: str, group_size: int) -> float | None:
    """That of ``method`` in ``table``; None until it is chosen."""
    return chosen_lr(done, table.lr_of or method, group_size, table.policy)


def outcome(result: Mapping[str, Any]) -> float:
    """The judge's mean score of the last five evaluations after step 0: what is compared, fixed in advance."""
    return fmean(result["curves"]["val/judge/reward"][1:][-5:])


def runs_of(table: Table, done: Done, *, quick: bool = False) -> list[list[Run]]:
    """The runs of a table whose learning rates are chosen, a list for each seed."""
    of = POLICIES[table.policy]
    found = []
    for seed in of.seeds[:3] if quick else of.seeds:
        runs = []
        for size, reward, method in table.cells:
            lr = of.learning_rates[1] if quick else lr_in(table, done, method, size)
            if lr is not None:
                steps = QUICK_STEPS if quick else of.steps
                runs.append(Run(table.name, reward, method, seed, lr, size, steps, table.policy))
        found.append(runs)
    return found


def of_same_assets(runs: Iterable[Run], done: Done) -> dict[str, Mapping[str, Any]]:
    """The results of ``runs``, from those assets with which most of them were made: what is compared has one proxy."""
    found = [{run.key: rows[run.key] for run in runs if run.key in rows} for rows in done.values()]
    return max(found, key=len, default={})


def missing(groups: Iterable[Iterable[Run]], done: Done, assets: str) -> list[Run]:
    """What has yet to be made with ``assets``, so that every group is whole with these or with others."""
    found = []
    for runs in groups:
        whole = {run.key for run in runs} <= of_same_assets(runs, done).keys()
        found += [] if whole else [run for run in runs if run.key not in done.get(assets, {})]
    return found
