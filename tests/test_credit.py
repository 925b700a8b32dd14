"""Credit: reward-to-go against hand-worked returns and a loop, and where it is broadcast."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gopo_lightning.objectives import credit
from gopo_lightning.objectives.credit import broadcast, discounted, reward_to_go
from gopo_lightning.types import Experience
from tests.rollouts import experience_of

NAN = math.nan
LENGTHS = (4, 2, 3, 1, 1, 1)
ADVANTAGES = [[1.0, 0.0, -1.0], [2.0, -2.0, 0.0]]


def ragged(rewards: list[list[float]] | None = None, **fields: Any) -> Experience:
    """Two groups of three completions of 1 to 4 tokens, whose tokens earn what was drawn; garbage after their ends."""
    generator = torch.Generator().manual_seed(5)
    earned_NT = torch.randn(6, 4, generator=generator)
    ended_NT = torch.arange(4) >= torch.tensor(LENGTHS)[:, None]
    return experience_of(
        rewards or [[3.0, 2.0, 1.0], [1.0, 0.0, 0.5]],
        LENGTHS,
        advantages=ADVANTAGES,
        token_rewards_NT=earned_NT.masked_fill(ended_NT, NAN),
        **fields,
    )


def by_a_loop(experience: Experience, gamma: float) -> Tensor:
    """One token at a time, over Python floats."""
    lengths = experience.completions.lengths_N.tolist()
    rewards = experience.rewards_PG.flatten().tolist()
    assert experience.token_rewards_NT is not None
    earned = experience.token_rewards_NT.tolist()

    def to_go(n: int, t: int) -> float:
        return sum(gamma ** (u - t) * earned[n][u] for u in range(t, lengths[n]))

    expected_NT = torch.zeros(len(lengths), max(lengths))
    for n, length in enumerate(lengths):
        group = range(n // 3 * 3, n // 3 * 3 + 3)
        for t in range(0 if math.isnan(rewards[n]) else length):
            running = [m for m in group if lengths[m] > t and not math.isnan(rewards[m])]
            baseline = sum(to_go(m, t) for m in running) / len(running)
            expected_NT[n, t] = experience.advantages_PG.flatten()[n] + to_go(n, t) - baseline
    return expected_NT


def test_returns_by_hand() -> None:
    returns_1T = discounted(torch.tensor([[0.009, 0.019, -0.024, 0.701]], dtype=torch.float64), 1.0)
    torch.testing.assert_close(returns_1T, torch.tensor([[0.705, 0.696, 0.677, 0.701]], dtype=torch.float64))


def test_two_completions_by_hand() -> None:
    """At tokens 1 and 2 both run: returns (3, 2) and (1, 0.5) are less their means (2, 1.25); the third is alone."""
    experience = experience_of(
        [[1.0, 0.0]],
        [3, 2],
        advantages=[[2.0, -2.0]],
        token_rewards_NT=torch.tensor([[1.0, -2.0, 4.0], [0.5, 0.5, 0.0]]),
    )
    assert reward_to_go(experience).tolist() == [[3.0, 2.75, 2.0], [-3.0, -2.75, 0.0]]


@pytest.mark.parametrize("gamma", [1.0, 0.7, 0.0])
@pytest.mark.parametrize(
    "rewards", [[[3.0, 2.0, 1.0], [1.0, 0.0, 0.5]], [[NAN, 2.0, 1.0], [1.0, NAN, NAN]], [[NAN] * 3, [1.0, 0.0, 0.5]]]
)
def test_reward_to_go_equals_a_loop(gamma: float, rewards: list[list[float]]) -> None:
    experience = ragged(rewards)
    actual_NT = reward_to_go(experience, gamma=gamma)
    assert actual_NT.dtype == torch.float32
    torch.testing.assert_close(actual_NT, by_a_loop(experience, gamma))


def test_a_completion_left_alone_earns_nothing() -> None:
    """The first runs on alone at its fourth token; in the second group the others have no reward."""
    advantages_NT = reward_to_go(ragged([[3.0, 2.0, 1.0], [1.0, NAN, NAN]]))
    assert advantages_NT[0, 3] == ADVANTAGES[0][0]
    assert advantages_NT[3].tolist() == [ADVANTAGES[1][0], 0, 0, 0]
    assert advantages_NT[4:].eq(0).all()


def test_without_differences_it_is_broadcast() -> None:
    """What all completions earn at a token drops out; what stands outside the mask never enters."""
    same_NT = torch.tensor([0.3, -0.1, 0.2, 0.0]).expand(6, 4)
    experience = experience_of(
        [[3.0, 2.0, 1.0], [1.0, 0.0, 0.5]], [4] * 6, advantages=ADVANTAGES, token_rewards_NT=same_NT
    )
    expected_NT = experience.advantages[:, None] * experience.completions.mask_NT
    torch.testing.assert_close(reward_to_go(experience), expected_NT, rtol=0, atol=1e-6)
    assert broadcast(experience) is None and experience.advantages_NT is None


def test_the_baseline_does_not_depend_on_weights() -> None:
    """Else a filter that keeps one completion of a group would take all that its tokens earn."""
    plain, filtered = ragged(), ragged(weights_PG=torch.tensor([[0.0, 1.0, 0.0], [0.3, 0.0, 0.0]]))
    assert torch.equal(reward_to_go(plain), reward_to_go(filtered))


def test_groups_do_not_mix() -> None:
    experience = ragged()
    whole_NT = reward_to_go(experience)
    second_NT = reward_to_go(experience.select(torch.tensor([1])))
    assert torch.equal(whole_NT[3:, :1], second_NT)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gamma=1\.5 of reward_to_go must lie in \[0, 1\]"):
        reward_to_go(ragged(), gamma=1.5)
    with pytest.raises(ValueError, match="which nothing gives here. Add a transform .* or use credit: broadcast"):
        reward_to_go(experience_of([[1.0, 0.0]]))


def test_a_credit_is_found_by_name_or_path() -> None:
    assert torch.equal(credit.get_credit("reward_to_go", gamma=0.5)(ragged()), reward_to_go(ragged(), gamma=0.5))
    assert credit.get_credit("broadcast")(ragged()) is None
    assert torch.equal(credit.get_credit("tests.test_credit.named", name=2.0)(ragged()), torch.full((6, 4), 2.0))
    with pytest.raises(ValueError, match=r"unknown credit 'gae'. Use one of \['broadcast', 'brpo', 'reward_to_go'\]"):
        credit.get_credit("gae")
    with pytest.raises(
        ValueError, match="credit 'broadcast' with init_args {'gamma': 0.5}.*Its signature is broadcast"
    ):
        credit.get_credit("broadcast", gamma=0.5)


def named(experience: Experience, *, name: float) -> Tensor:
    """An option may be called like a parameter of ours."""
    return torch.full(experience.completions.mask_NT.shape, name)
