"""Transforms, credit and iterate on two ranks: as on one, through a resume, and where one rank alone fails."""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gopo_lightning.objectives.clipped import ClippedSurrogate
from gopo_lightning.rewards import FunctionComparator
from gopo_lightning.rollout.transforms import Context, KLInReward, RankFilter, Transform
from gopo_lightning.types import Experience
from tests.ranks import Case, assert_same_run, launch, on, read, run_case
from tests.test_resume import assert_identical
from tests.test_shaping import Moody


class OnRank1(Transform):
    """Fails there, in the call or in commit."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __call__(self, rollout: Any, context: Context) -> Any:
        if os.environ["RANK"] != "1" or self.how == "commit":
            return rollout
        if self.how == "raises":
            raise LookupError("nothing is known of this prompt")
        return {
            "shape": replace(rollout, weights_PG=torch.ones(1)),
            "rewards": replace(rollout, rewards_PG=rollout.rewards_PG + 1),
        }[self.how]

    def commit(self, experience: Experience) -> None:
        if os.environ["RANK"] == "1":
            raise LookupError("nothing was learnt")


def credit_on_rank_1(experience: Experience) -> Tensor | None:
    """Of a wrong shape there."""
    return torch.ones(1) if os.environ["RANK"] == "1" else None


PAIRWISE = {"rewards": [FunctionComparator("tests.test_shaping.longer")]}
FAILURES: dict[str, tuple[dict[str, Any], str, str]] = {
    "raises": ({"transforms": [OnRank1("raises")]}, "LookupError .*nothing is known", "the transform OnRank1"),
    "shape": ({"transforms": [OnRank1("shape")]}, "ValueError .*gave weights_PG=", "the transform OnRank1"),
    "commit": ({"transforms": [OnRank1("commit")]}, "LookupError .*nothing was learnt", "commit of the transform"),
    "credit": (
        {"credit": "tests.test_shaping_on_ranks.credit_on_rank_1"},
        "ValueError .*the credit returned",
        "the credit",
    ),
    "rewards": ({"transforms": [OnRank1("rewards")]} | PAIRWISE, "ValueError .*changes the rewards", "the advantage"),
}
MIRROR = ClippedSurrogate(kl_coef=0.5, kl_anchor="iterate")
NAMES = ("token", "filter", "iterate", "lora")


def case(name: str) -> Case:
    """With transforms of its own, as they have a state."""
    cases = {
        "token": Case(
            "token",
            max_steps=4,
            kl_coef=0.1,
            module={"transforms": [KLInReward(0.2, per="token")], "credit": "reward_to_go", "num_minibatches": 2},
        ),
        "filter": Case(
            "filter",
            max_steps=4,
            module={
                "transforms": [KLInReward(0.2), RankFilter("br", 2)],
                "num_minibatches": 2,
                "loss": ClippedSurrogate(mask_truncated=True, aggregation="sequence"),
            },
        ),
        "iterate": Case("iterate", max_steps=6, module={"loss": MIRROR, "iterate_every": 3, "num_inner_epochs": 2}),
        "lora": Case(
            "lora",
            max_steps=6,
            lora=True,
            module={
                "loss": MIRROR,
                "iterate_every": 3,
                "num_minibatches": 2,
                "transforms": [KLInReward(0.2), Moody(), RankFilter("bw", 2)],
            },
        ),
    }
    return cases[name]


SHARDED = ("iterate", "lora")
RESUMED = [("ddp", "lora"), ("fsdp2", "iterate")]


@pytest.fixture(scope="module")
def results(tiny_policy: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run on this process and on two ranks; some of them from a checkpoint on; and those that fail."""
    folder = tmp_path_factory.mktemp("runs")
    for name in NAMES:
        run_case(case(name), tiny_policy, prompts_file, folder, 1)
    cases = [on("ddp", case(name)) for name in NAMES] + [on("fsdp2", case(name)) for name in SHARDED]
    for strategy, name in RESUMED:
        whole, first = (
            replace(on(strategy, case(name)), name=f"{strategy}-{name}.{part}") for part in ("rest", "first")
        )
        cases += [replace(first, max_steps=2), replace(whole, resume=f"{first.name}.ckpt")]
    cases += [
        Case(f"fails-{name}", "ddp", max_steps=1, fails=True, module=options)
        for name, (options, _, _) in FAILURES.items()
    ]
    launch(cases, tiny_policy, prompts_file, folder, 2)
    return folder


@pytest.mark.parametrize("run", NAMES)
def test_two_ranks_train_like_one(run: str, results: Path) -> None:
    assert_same_run(results, f"ddp-{run}", run)


@pytest.mark.parametrize("run", SHARDED)
def test_sharded_ranks_train_like_one(run: str, results: Path) -> None:
    assert_same_run(results, f"fsdp2-{run}", run)


@pytest.mark.parametrize(("strategy", "run"), RESUMED)
def test_ranks_go_on_bit_for_bit(strategy: str, run: str, results: Path) -> None:
    """From the second update on, whose rollout reads the iterate of the first."""
    name = f"{strategy}-{run}"
    rest, whole = (read(results, each) for each in (f"{name}.rest", name))
    assert [step["texts"] for step in rest[0]["steps"]] == [step["texts"] for step in whole[0]["steps"][1:]]
    for key in ("state_dict", "optimizer_states"):
        assert_identical(rest[1][key], whole[1][key])
    kept, expected = (each[1]["callbacks"]["RolloutCallback"] for each in (rest, whole))
    assert_identical(kept["iterate"], expected["iterate"])
    assert kept["transforms"] == expected["transforms"]


@pytest.mark.parametrize("strategy", ["", "ddp-", "fsdp2-"])
@pytest.mark.parametrize("run", SHARDED)
def test_a_checkpoint_keeps_the_iterate_whole(strategy: str, run: str, results: Path) -> None:
    """What is trained, in the shapes of one process."""
    checkpoint = read(results, f"{strategy}{run}")[1]
    iterate = checkpoint["callbacks"]["RolloutCallback"]["iterate"]
    shapes = {name: tensor.shape for name, tensor in checkpoint["state_dict"].items()}
    assert {f"policy.{name}": tensor.shape for name, tensor in iterate["weights"].items()} == shapes
    assert iterate["step"] == 4


@pytest.mark.parametrize("run", NAMES)
def test_the_runs_are_worth_comparing(run: str, results: Path) -> None:
    steps = read(results, run)[0]["steps"]
    assert all(step["metrics"]["train/grad_norm"] > 1e-2 for step in steps)


@pytest.mark.parametrize("name", FAILURES)
def test_an_error_on_one_rank_ends_all_and_is_said_on_all(name: str, results: Path) -> None:
    _, own, others = FAILURES[name]
    peer, failed = ((results / f"fails-{name}.rank{rank}.txt").read_text() for rank in (0, 1))
    assert re.match(own, failed, re.DOTALL)
    assert peer.startswith("PeerError") and f"rank 1 failed in {others}" in peer
    assert re.search(own.partition(".*")[2], peer, re.DOTALL)  # the same reason
