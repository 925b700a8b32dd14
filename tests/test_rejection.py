"""Rejection sampling (RSO): by hand, by its law, and where a group has little to choose from."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from gopo_lightning.rollout import RejectionSample
from gopo_lightning.rollout.rejection import accepted
from gopo_lightning.rollout.transforms import Context
from gopo_lightning.types import Rollout
from tests.rollouts import rollout_of

NAN, INF = math.nan, math.inf
REWARDS = [2.0, 1.0, 0.0, 1.5]


def kept(rollout: Rollout, keep: int, beta: float = 0.5, seed: int = 0, step: int = 0) -> list[list[float]]:
    weights_PG = RejectionSample(keep, beta)(rollout, Context(seed, step)).weights_PG
    assert weights_PG is not None
    return weights_PG.tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(("keep", "expected"), [(2, [0, 1]), (3, [0, 1, 3]), (4, [0, 1, 3, 2])])
def test_rounds_by_hand(keep: int, expected: list[int]) -> None:
    """Round 1 keeps 2.0, whose probability is 1, and no other: .5 ≥ .135, .9 ≥ .018, .4 ≥ .368. In round 2 the highest
    is 1.5: 1.0 has exp(−1) = .368 > .2 and comes first."""
    draws = [[0.3, 0.5, 0.9, 0.4], [0.7, 0.2, 0.6, 0.1], [0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]]
    assert accepted(REWARDS, draws[:keep], keep, 0.5) == expected


def test_the_law_of_the_pair_that_is_kept() -> None:
    """Exact by enumeration of the chain: {1, 2} .332725, {1, 3} .032723, {1, 4} .634552."""
    prompts = 4000
    counts = Counter(tuple(row) for row in kept(rollout_of([REWARDS] * prompts), 2))
    for pair, probability in {(1, 1, 0, 0): 0.332725, (1, 0, 1, 0): 0.032723, (1, 0, 0, 1): 0.634552}.items():
        deviation = math.sqrt(probability * (1 - probability) / prompts)
        assert abs(counts[tuple(map(float, pair))] / prompts - probability) < 4 * deviation


def test_limits_of_beta() -> None:
    """β → ∞ keeps the first k, β → 0 the best k."""
    many = rollout_of([REWARDS] * 20)
    assert kept(many, 2, 1e9) == [[1.0, 1.0, 0.0, 0.0]] * 20
    assert kept(many, 2, 1e-3) == [[1.0, 0.0, 0.0, 1.0]] * 20
    assert kept(many, 4) == [[1.0] * 4] * 20


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([NAN, 1.0, NAN, 2.0], [0, 1, 0, 1]),
        ([NAN] * 4, [0, 0, 0, 0]),
        ([1.0, 1.0, 1.0, 1.0], [1, 1, 1, 0]),
        ([INF, 0.0, INF, INF], [1, 0, 1, 1]),
        ([-INF, 0.0, 1.0, 2.0], [0, 1, 1, 1]),
    ],
)
def test_edges(rewards: list[float], expected: list[int]) -> None:
    assert kept(rollout_of([rewards]), 3) == [expected]


def test_what_has_no_weight_is_not_kept_and_other_weights_stay() -> None:
    rollout = replace(rollout_of([[0.0, 3.0, 2.0]]), weights_PG=torch.tensor([[1.0, 0.0, 0.5]]))
    assert kept(rollout, 2) == [[1.0, 0.0, 0.5]]


def test_draws_belong_to_seed_step_and_prompt() -> None:
    wide = [[float(i) / 4 for i in range(8)]]
    alone = kept(rollout_of(wide, indices=[7]), 3)
    assert kept(rollout_of(wide * 2, indices=[4, 7]), 3)[1:] == alone
    others = [kept(rollout_of(wide, indices=[7]), 3, seed=s, step=t) for s, t in itertools.product(range(5), range(5))]
    assert len({str(weights) for weights in others}) > 5


@pytest.mark.parametrize(
    ("keep", "beta", "message"),
    [(1, 0.5, "keep=1 of RejectionSample must be at least 2"), (2, 0.0, "beta=0.0 of RejectionSample must be above 0")],
)
def test_bad_settings_are_refused(keep: int, beta: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RejectionSample(keep, beta)
    with pytest.raises(ValueError, match="keep=5 for groups of 4 completions"):
        kept(rollout_of([REWARDS]), 5)
