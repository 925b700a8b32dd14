"""Pair and list objectives in a run: what it refuses, and what it hands them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gopo_lightning.objectives import PRO, Objective, PairObjective
from gopo_lightning.rewards import FunctionComparator, FunctionReward
from gopo_lightning.rollout import Transform
from gopo_lightning.rollout.shaping import Shaping
from gopo_lightning.rollout.transforms import Context, RankFilter
from gopo_lightning.types import Experience
from tests.rollouts import rollout_of
from tests.runs import make_data, make_module, make_trainer

JUDGE = FunctionComparator("tests.test_shaping.longer")
REBEL = PairObjective(anchor="old", link="regression", beta=1.0)


class Halves(Transform):
    """Changes the advantages."""

    position = "advantages"

    def __call__(self, rollout: Any, context: Context) -> Any:
        return replace(rollout, advantages_PG=rollout.advantages_PG / 2)


class Seen(PairObjective):
    """Keeps what it reads."""

    def active(self, experience: Experience) -> torch.Tensor:
        self.__dict__.setdefault("_seen", []).append(experience)
        return super().active(experience)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": REBEL, "rewards": [JUDGE]}, r"reads differences of rewards, and \['longer'\] only compare"),
        ({"loss": PairObjective(), "advantage": "grpo"}, "objective.advantage=grpo has no effect: PairObjective reads"),
        (
            {"loss": PRO(), "advantage": {"function": "ordinal", "init_args": {"ties": "arbitrary"}}},
            "has no effect: PRO reads rewards or comparisons",
        ),
        ({"loss": PairObjective(), "credit": "reward_to_go"}, "objective.credit=reward_to_go has no effect"),
        ({"loss": PairObjective(anchor="iterate")}, "reads the iterate: set objective.iterate_every"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str, tiny_policy: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_module(tiny_policy, **options)


def test_what_can_work_is_not(tiny_policy: Path) -> None:
    score = FunctionReward("tests.runs.count_vowels")
    allowed: list[tuple[Objective, list[Any]]] = [(REBEL, [JUDGE, score]), (PairObjective(), [JUDGE]), (PRO(), [JUDGE])]
    for loss, rewards in allowed:
        assert make_module(tiny_policy, loss=loss, rewards=rewards).loss is loss


def test_a_transform_of_advantages_that_nothing_reads_is_refused() -> None:
    rollout = rollout_of([[1.0, 0.0, 2.0, 3.0]])

    def shape(transform: Transform, *, read: bool) -> Experience:
        advantage = lambda rewards_PG: rewards_PG.float()  # noqa: E731
        return Shaping(advantage, transforms=[transform], advantages_are_read=read)(rollout, Context(0, 0))

    assert shape(Halves(), read=True).advantages_PG.tolist() == [[0.5, 0.0, 1.0, 1.5]]
    with pytest.raises(ValueError, match="changes the advantages, but the objective reads rewards or comparisons"):
        shape(Halves(), read=False)
    assert shape(RankFilter("bon", 1), read=False).weights_N.tolist() == [0, 0, 0, 1]


def test_draws_belong_to_seed_step_and_prompt() -> None:
    def draws(indices: list[int], seed: int = 0, step: int = 0) -> torch.Tensor:
        rollout = rollout_of([[1.0, 0.0, 2.0]] * len(indices), indices=indices)
        shaping = Shaping(lambda rewards_PG: rewards_PG.float(), draws_are_read=True)
        drawn = shaping(rollout, Context(seed, step)).draws_PGG
        assert drawn is not None and drawn.shape == (len(indices), 3, 3)
        return drawn

    both = draws([4, 7])
    assert torch.equal(both[1:], draws([7])) and torch.equal(both.flip(0), draws([7, 4]))
    assert (
        len({x.item() for x in (*both.flatten(), *draws([4], seed=1).flatten(), *draws([4], step=1).flatten())}) == 36
    )
    assert both.min() >= 0 and both.max() < 1


@pytest.mark.parametrize("judged", [True, False])
def test_an_objective_reads_comparisons_where_the_advantage_does(
    judged: bool, tiny_policy: Path, prompts_file: Path, tmp_path: Path
) -> None:
    """And draws of its own at every step."""
    loss = Seen(pairs="random", num_random_pairs=2)
    sources = [JUDGE] if judged else [JUDGE, FunctionReward("tests.runs.count_vowels")]
    module = make_module(tiny_policy, loss=loss, rewards=sources)
    make_trainer(tmp_path, limit_val_batches=0).fit(module, make_data(prompts_file))
    first, second = loss.__dict__["_seen"]
    assert (first.preferences_PGG is not None) is judged
    assert not torch.equal(first.draws_PGG, second.draws_PGG)
    assert {"train/pair_accuracy", "train/pair_margin", "train/kl"} <= module.trainer.callback_metrics.keys()
