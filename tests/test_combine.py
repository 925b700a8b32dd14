"""Several rewards → one, by hand: order within each source, abstentions, scales that do not matter."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gopo_lightning.objectives import advantages
from gopo_lightning.rewards import combine

NAN, INF = math.nan, math.inf


def columns(*sources: list[float]) -> Tensor:
    """[1, G, K] of K lists of G."""
    return torch.tensor(sources).T[None]


GROUPS = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=9).map(
    lambda rows: torch.tensor(rows, dtype=torch.float32)[None]
)


def test_borda_by_hand() -> None:
    """Source a ranks 2, −2/3, −2, 2/3; source b, with a tie, 4/3, 4/3, −4/3, −4/3."""
    rewards_PGK = columns([9.0, 1.0, 0.0, 5.0], [700.0, 700.0, 100.0, 100.0])
    expected = torch.tensor([[(2 + 4 / 3) / 2, (-2 / 3 + 4 / 3) / 2, (-2 - 4 / 3) / 2, (2 / 3 - 4 / 3) / 2]]).double()
    torch.testing.assert_close(combine.borda(rewards_PGK), expected, atol=1e-6, rtol=0)
    weighted = combine.borda(rewards_PGK, weights=[3, -1])
    assert weighted[0, 0].item() == pytest.approx((3 * 2 - 4 / 3) / 4, abs=1e-6)


def test_in_borda_a_source_without_a_score_abstains() -> None:
    """b does not score the first: of the other two it ranks 2 and −2, and the first has a's rank alone."""
    rewards_PGK = columns([3.0, 2.0, 1.0], [NAN, 5.0, 7.0])
    assert combine.borda(rewards_PGK).tolist() == [[2.0, -1.0, 0.0]]
    assert combine.borda(columns([3.0, NAN], [1.0, NAN]))[0, 1].isnan()
    assert combine.borda(columns([3.0, NAN], [1.0, 2.0]), weights=[1, 0])[0, 1].isnan()  # b has no say


@given(GROUPS, st.sampled_from(["borda", "lexicographic"]))
def test_no_scale_matters(rewards_PGK: Tensor, name: str) -> None:
    """A strictly increasing map of one source leaves every value as it is, to the bit."""
    function = combine.get_combination(name, num_sources=2)
    stretched = torch.stack([rewards_PGK[..., 0], (rewards_PGK[..., 1] * 3).exp() * 1e3], -1)
    assert torch.equal(function(stretched), function(rewards_PGK))


@given(GROUPS)
def test_borda_has_no_false_order(rewards_PGK: Tensor) -> None:
    """Completions whose sums of exact ranks are equal tie, whatever the rounding of the parts."""
    wins_PGK = (rewards_PGK[:, :, None] - rewards_PGK[:, None]).sign().sum(2)  # less losses: whole numbers
    exact_PG, borda_PG = wins_PGK.sum(-1), combine.borda(rewards_PGK)
    assert torch.equal(advantages.ordinal(borda_PG), advantages.ordinal(exact_PG.float()))


def test_lexicographic_by_hand() -> None:
    """a decides but for its tie of the first two, where b does; the last two tie in both."""
    rewards_PGK = columns([5.0, 5.0, 1.0, 1.0], [1.0, 2.0, 900.0, 900.0])
    values = combine.lexicographic(rewards_PGK)
    torch.testing.assert_close(values, torch.tensor([[1 / 3, 1.0, -2 / 3, -2 / 3]]).double(), atol=1e-6, rtol=0)
    third = columns([1.0, 1.0], [1.0, 1.0], [INF, -INF])
    assert combine.lexicographic(third).tolist() == [[1.0, -1.0]]


def test_lexicographic_tolerance_and_abstentions() -> None:
    near = columns([1.00, 1.01], [0.0, 9.0])
    assert combine.lexicographic(near).tolist() == [[-1.0, 1.0]]
    reversed_by_b = columns([1.01, 1.00], [0.0, 9.0])
    assert combine.lexicographic(reversed_by_b).tolist() == [[1.0, -1.0]]
    assert combine.lexicographic(reversed_by_b, tolerances=[0.1, 0.0]).tolist() == [[-1.0, 1.0]]
    exactly = columns([2.0, 1.0], [0.0, 9.0])
    assert combine.lexicographic(exactly, tolerances=[1.0, 0.0]).tolist() == [[-1.0, 1.0]]
    abstains = columns([9.0, NAN, 1.0], [1.0, 2.0, 3.0])  # b decides for the second; a cycle, in which all win once
    assert combine.lexicographic(abstains).tolist() == [[0.5 - 0.5, 0.0, 0.0]]
    assert combine.lexicographic(columns([1.0, NAN, 2.0], [1.0, NAN, 1.0]))[0].tolist()[:2][0] == -1.0
    assert combine.lexicographic(columns([1.0, NAN], [1.0, NAN]))[0, 1].isnan()


def test_z_score_by_hand() -> None:
    """std of (1, 2, 3) is 1, of (0, 0, 30) is 17.32; the mean of both z-scores, so that 30 does not drown 3."""
    values = combine.z_score(columns([1.0, 2.0, 3.0], [0.0, 0.0, 30.0]))
    z_b = [-10 / 17.3206, -10 / 17.3206, 20 / 17.3206]
    expected = torch.tensor([[(z_a / 1.0001 + b) / 2 for z_a, b in zip([-1, 0, 1], z_b, strict=True)]]).double()
    torch.testing.assert_close(values, expected, atol=1e-4, rtol=0)
    assert combine.z_score(columns([NAN, 0.0, 2.0], [1.0, 1.0, 1.0]))[0, 0] == 0  # b is constant: 0
    with pytest.raises(ValueError, match="infinity, which has no magnitude"):
        combine.z_score(columns([INF, 0.0], [1.0, 1.0]))


def test_one_completion_is_no_group_but_no_error() -> None:
    for name in ("weighted_sum", "borda", "lexicographic", "z_score"):
        value = combine.get_combination(name, num_sources=2)(columns([3.0], [4.0]))
        assert value.tolist() == [[7.0 if name == "weighted_sum" else 0.0]]
