"""Several updates a rollout: the same prompts in each, on any number of ranks, also where a rank has none of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gopo_lightning.objectives.clipped import ClippedSurrogate
from gopo_lightning.rewards import FunctionReward
from tests.ranks import Case, assert_same_run, launch, on, read, run_case


def mostly_tied(prompts: list[str], completions: list[str]) -> list[float | None]:
    """One prompt of five has an order; one has no score at all, and three tie."""
    scores = {"say ab": None, "say abab": 1.0, "say abababab": 2.0, "say ababababab": 2.0}
    return [
        scores[prompt] if prompt in scores else float(sum(text.encode()) % 5)
        for prompt, text in zip(prompts, completions, strict=True)
    ]


TIED: dict[str, Any] = {"rewards": [FunctionReward("tests.test_minibatches.mostly_tied", name="tied")]}
RUNS = {
    "halves": Case("halves", max_steps=4, module={"num_minibatches": 2}),
    "epochs": Case("epochs", max_steps=4, kl_coef=0.1, module={"num_minibatches": 2, "num_inner_epochs": 2}),
    # a minibatch of one prompt: every other rank has none of it
    "single": Case(
        "single",
        max_steps=6,
        prompts_per_step=6,
        module={"num_minibatches": 6, "micro_batch_tokens": 1, "loss": ClippedSurrogate(aggregation="constant")},
    ),
    "tied": Case("tied", max_steps=6, prompts_per_step=6, module={"num_minibatches": 3} | TIED),
    "whole": Case("whole", max_steps=2, prompts_per_step=6, module=TIED),
}


@pytest.fixture(scope="module")
def results(tiny_policy: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run on this process and on two ranks, two of them on three."""
    folder = tmp_path_factory.mktemp("runs")
    for case in RUNS.values():
        run_case(case, tiny_policy, prompts_file, folder, 1)
    two = [on("ddp", case) for case in RUNS.values()] + [on("fsdp2", RUNS["halves"])]
    launch(two, tiny_policy, prompts_file, folder, 2)
    three = [RUNS["single"], RUNS["tied"]]
    launch(
        [replace(on("ddp", case), name=f"three-{case.name}") for case in three], tiny_policy, prompts_file, folder, 3
    )
    return folder


@pytest.mark.parametrize("run", RUNS)
def test_two_ranks_train_like_one(run: str, results: Path) -> None:
    assert_same_run(results, f"ddp-{run}", run)


@pytest.mark.parametrize("run", ["single", "tied"])
def test_three_ranks_train_like_one(run: str, results: Path) -> None:
    assert_same_run(results, f"three-{run}", run)


def test_sharded_ranks_train_like_one(results: Path) -> None:
    assert_same_run(results, "fsdp2-halves", "halves")


@pytest.mark.parametrize("run", RUNS)
def test_the_updates_are_worth_comparing(run: str, results: Path) -> None:
    record, checkpoint = read(results, run)
    assert any(step["metrics"]["train/grad_norm"] > 1e-2 for step in record["steps"])
    assert any(float(v["exp_avg"].abs().max()) > 1e-4 for v in checkpoint["optimizer_states"][0]["state"].values())
    tied = [step["metrics"]["reward/all_tied_group_fraction"] for step in record["steps"]]
    assert (max(tied) > 0.5) is (run in ("tied", "whole"))
