"""The calibrated advantage, QAE, MaxRL and ODRPO: by hand, at their limits, and against each other's formulas."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from gopo_lightning.objectives import advantages
from tests.test_advantages import REWARDS, groups

NAN, INF, LN3 = math.nan, math.inf, math.log(3)
NAMES = {"calibrated": {"tau": 1.0}, "qae": {}, "maxrl": {}, "odrpo": {}}


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def expect(actual: Tensor, *values: float) -> None:
    torch.testing.assert_close(actual, torch.tensor([values], dtype=torch.float32), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("name", "options"), NAMES.items())
def test_what_all_advantages_have_in_common(name: str, options: dict[str, float]) -> None:
    advantage = advantages.get_advantage(name, **options)
    rewards_PG = torch.tensor([[0.1, 0.1, NAN, 0.1], [NAN, 4.0, NAN, NAN], [NAN] * 4, [1.0, NAN, 0.0, 0.0]])
    advantages_PG = advantage(rewards_PG)
    assert advantages_PG.dtype == torch.float32
    assert not advantages_PG[:3].any() and not advantages_PG[rewards_PG.isnan()].any()
    torch.testing.assert_close(advantages_PG[3:, [0, 2, 3]], advantage(torch.tensor([[1.0, 0.0, 0.0]])))
    with pytest.raises(ValueError, match="at least 2"):
        advantage(torch.zeros(3, 1))
    with pytest.raises(ValueError, match="shape"):
        advantage(torch.zeros(3))


# Calibrated: σ(ln 3) = 3/4 and σ(2 ln 3) = 9/10


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([2 * LN3, LN3, 0.0], [1.3, 0.0, -1.3]),
        ([LN3, LN3, 0.0, NAN], [0.5, 0.5, -1.0, 0.0]),
        ([INF, INF, LN3, 0.0], [4 / 3, 4 / 3, -1.0, -5 / 3]),
        ([-INF, 0.0], [-2.0, 2.0]),
        ([INF, INF, -INF, -INF], [4 / 3, 4 / 3, -4 / 3, -4 / 3]),
    ],
)
def test_calibrated_by_hand(rewards: list[float], expected: list[float]) -> None:
    expect(advantages.calibrated(row(*rewards), tau=1.0), *expected)
    expect(advantages.calibrated(5 * row(*rewards), tau=5.0), *expected)


def test_an_infinity_wins_fully_whatever_tau() -> None:
    for tau in (5e-324, 1e-3, 1e308):
        assert advantages.calibrated(row(INF, 0.0, 0.0), tau=tau).tolist() == [[2.0, -1.0, -1.0]]


@given(groups(REWARDS))
def test_calibrated_is_ordinal_as_tau_goes_to_zero(rewards_PG: Tensor) -> None:
    """To the bit, ties and infinities included, from a τ on that the smallest gap exceeds 40 times."""
    finite = rewards_PG[rewards_PG.isfinite()].double().unique()
    gap = finite.diff().min().item() if len(finite) > 1 else 1.0
    assume(gap / 40 > 0)
    assert torch.equal(advantages.calibrated(rewards_PG, tau=gap / 40), advantages.ordinal(rewards_PG))


@given(groups(st.one_of(st.floats(-100, 100, width=32), st.just(NAN))))
def test_tau_times_calibrated_is_rloo_as_tau_goes_to_infinity(rewards_PG: Tensor) -> None:
    """The constant is 1; what is left is of the order (gap / τ)², here 4e-10."""
    limit_PG = 1e7 * advantages.calibrated(rewards_PG, tau=1e7).double()
    torch.testing.assert_close(limit_PG, advantages.rloo(rewards_PG).double(), atol=1e-4, rtol=1e-6)


@given(groups(REWARDS), st.sampled_from([0.1, 1.0, 30.0]))
def test_calibrated_sums_to_zero_rises_with_the_reward_and_reads_wins(rewards_PG: Tensor, tau: float) -> None:
    """It is `ordinal_from_wins` of the probabilities σ((r_i − r_j) / τ), ½ for equal infinities."""
    A_PG = advantages.calibrated(rewards_PG, tau=tau)
    assert abs(A_PG.double().sum().item()) <= 1e-6 and A_PG.abs().max().item() <= 2
    assert (A_PG[0, rewards_PG[0].argsort()].diff()[: -int(rewards_PG.isnan().sum()) or None] >= -1e-6).all()
    wins_PGG = ((rewards_PG.double()[:, :, None] - rewards_PG.double()[:, None]) / tau).sigmoid()
    wins_PGG = torch.where(rewards_PG[:, :, None] == rewards_PG[:, None], 0.5, wins_PGG)
    torch.testing.assert_close(A_PG, advantages.ordinal_from_wins(wins_PGG), atol=1e-6, rtol=0)


@pytest.mark.parametrize("tau", [0.0, -1.0, INF, NAN, True, "1e-3", None])
def test_a_tau_that_is_no_scale_is_refused(tau: float) -> None:
    with pytest.raises(ValueError, match=rf"tau={tau!r} .*finite number above 0. Set it to"):
        advantages.get_advantage("calibrated", tau=tau)


def test_a_tau_that_is_not_known_yet_is_asked_for_at_every_call() -> None:
    taus = iter([1.0, 2.0])
    late = {"tau": lambda: next(taus)}
    advantage = advantages.get_advantage("calibrated", late=late)
    assert advantage(row(LN3, 0.0)).tolist() == [[1.0, -1.0]]
    expect(advantage(row(2 * LN3, 0.0)), 1.0, -1.0)
    assert advantages.get_advantage("calibrated", late=late, tau=LN3)(row(LN3**2, 0.0)).tolist() == [[1.0, -1.0]]
    advantages.get_advantage("ordinal", late=late)(row(1.0, 0.0))  # does not ask


# QAE


@pytest.mark.parametrize(
    ("rewards", "quantile", "expected"),
    [
        ([5.0, 1.0, 3.0, 9.0], 0.5, [2.0, -2.0, 0.0, 6.0]),  # the lower median is 3
        ([5.0, 1.0, 3.0, 9.0], 0.51, [0.0, -4.0, -2.0, 4.0]),
        ([5.0, 1.0, 3.0, 9.0], 0.01, [4.0, 0.0, 2.0, 8.0]),
        ([5.0, NAN, 3.0, 9.0], 0.5, [0.0, 0.0, -2.0, 4.0]),  # of the three valid
        ([5.0, NAN, 3.0, 9.0], 0.9, [-4.0, 0.0, -6.0, 0.0]),
        ([float(r) for r in range(25)], 0.28, [r - 6.0 for r in range(25)]),  # 0.28 · 25 is 7.000000000000001
        ([0.0, 0.0, 0.0, 0.0, 1.0], 0.8, [0.0, 0.0, 0.0, 0.0, 1.0]),  # p = 1 − K: hard
        ([0.0, 0.0, 0.0, 1.0, 1.0], 0.8, [-1.0, -1.0, -1.0, 0.0, 0.0]),  # p > 1 − K: easy
    ],
)
def test_qae_by_hand(rewards: list[float], quantile: float, expected: list[float]) -> None:
    expect(advantages.qae(row(*rewards), quantile=quantile, normalise=False), *expected)
    deviation = np.nanstd(rewards, ddof=1) + 1e-4
    expect(advantages.qae(row(*rewards), quantile=quantile), *(a / deviation for a in expected))


@given(groups(st.floats(-1e6, 1e6, width=32)), st.integers(1, 99))
def test_qae_has_numpys_inverted_cdf(rewards_PG: Tensor, percent: int) -> None:
    G = rewards_PG.shape[1]
    rank = -(-percent * G // 100)  # exact
    baseline = np.sort(rewards_PG[0].double().numpy())[rank - 1]
    if (percent * G) % 100:  # NumPy multiplies in floating point
        assert baseline == np.quantile(rewards_PG[0].double().numpy(), percent / 100, method="inverted_cdf")
    actual_PG = advantages.qae(rewards_PG, quantile=percent / 100, normalise=False)
    torch.testing.assert_close(actual_PG, (rewards_PG.double() - baseline).float(), atol=1e-4, rtol=1e-6)


# MaxRL


def test_maxrl_by_hand() -> None:
    expect(advantages.maxrl(row(1.0, 0.0, 0.0, 0.0)), 3.0, -1.0, -1.0, -1.0)  # mean ¼
    expect(advantages.maxrl(row(1.0, 1.0, 1.0, 0.0)), 1 / 3, 1 / 3, 1 / 3, -1.0)
    expect(advantages.maxrl(row(0.5, NAN, 1.5)), -0.5, 0.0, 0.5)
    expect(advantages.maxrl(row(0.0, 0.0, NAN)), 0.0, 0.0, 0.0)


@pytest.mark.parametrize(("name", "bad"), [("maxrl", -0.5), ("maxrl", INF), ("qae", INF), ("qae", -INF)])
def test_magnitudes_that_have_no_meaning_are_refused(name: str, bad: float) -> None:
    with pytest.raises(ValueError, match=r"prompt 1 .*(go down to -0\.5.*Use a reward|infinity)"):
        advantages.get_advantage(name)(torch.tensor([[0.0, 1.0, NAN], [NAN, 1.0, bad]]))


# ODRPO


def test_odrpo_by_hand() -> None:
    plain = {"normalise": False}
    # reaching 1, 2 and 4: (1 1 1 1), (1 1 0 0) − ½, (1 0 0 0) − ¼
    expect(advantages.odrpo(row(4.0, 2.0, 1.0, 1.0), **plain), 1.25, 0.25, -0.75, -0.75)
    expect(advantages.odrpo(row(4.0, 2.0, 1.0, 1.0), thresholds=[3.0, 100.0], **plain), 0.75, -0.25, -0.25, -0.25)
    expect(advantages.odrpo(row(4.0, 2.0, 1.0, 1.0), thresholds=[3.0, 3.0], **plain), 1.5, -0.5, -0.5, -0.5)
    expect(advantages.odrpo(row(INF, 0.0, NAN), **plain), 0.5, -0.5, 0.0)
    # at the threshold is half a success: (1 1 ½ ½) − ¾, (1 ½ 0 0) − ⅜, (½ 0 0 0) − ⅛
    expect(advantages.odrpo(row(4.0, 2.0, 1.0, 1.0), half_ties=True, **plain), 1.25, 0.25, -0.75, -0.75)
    halves = advantages.odrpo(row(4.0, 2.0, 1.0, 1.0), thresholds=[2.0], half_ties=True, **plain)
    expect(halves, 0.625, 0.125, -0.375, -0.375)
    std = {2: math.sqrt(1 / 3) + 1e-4, 1: 0.5 + 1e-4}  # unbiased, of two and of one success in four
    expected = 0.5 / std[2] + 0.75 / std[1], 0.5 / std[2] - 0.25 / std[1], *[-0.5 / std[2] - 0.25 / std[1]] * 2
    expect(advantages.odrpo(row(4.0, 2.0, 1.0, 1.0)), *expected)


@given(groups(REWARDS))
def test_odrpo_with_half_ties_and_every_completion_a_threshold_is_ordinal(rewards_PG: Tensor) -> None:
    """Σ_k centred ½(1[r ≥ t_k] + 1[r > t_k]) = (wins − losses) / 2."""
    A_PG = advantages.odrpo(rewards_PG, normalise=False, repeats=True, half_ties=True)
    factor = ((~rewards_PG.isnan()).sum(-1, keepdim=True) - 1) / 4
    torch.testing.assert_close(A_PG, factor * advantages.ordinal(rewards_PG), atol=1e-5, rtol=0)


@given(groups(REWARDS))
def test_odrpo_over_distinct_values_is_ordinal_without_ties_alone(rewards_PG: Tensor) -> None:
    scores = rewards_PG[~rewards_PG.isnan()]
    assume(len(scores.unique()) == len(scores) > 1)
    A_PG = advantages.odrpo(rewards_PG, normalise=False)
    torch.testing.assert_close(A_PG, (len(scores) - 1) / 4 * advantages.ordinal(rewards_PG), atol=1e-5, rtol=0)


def test_odrpo_over_distinct_values_is_not_ordinal_with_ties() -> None:
    rewards_PG = row(2.0, 1.0, 1.0, 0.0, 0.0, 0.0)
    dense_PG, ordinal_PG = advantages.odrpo(rewards_PG, normalise=False), advantages.ordinal(rewards_PG)
    expect(dense_PG, 4 / 3, 1 / 3, 1 / 3, -2 / 3, -2 / 3, -2 / 3)  # dense ranks 2 1 1 0 0 0 less their mean
    expect(5 / 4 * ordinal_PG, 2.5, 1.0, 1.0, -1.5, -1.5, -1.5)
    assert not torch.allclose(dense_PG / dense_PG[0, 0], ordinal_PG / ordinal_PG[0, 0], atol=1e-2)


@given(groups(st.sampled_from([0.0, 1.0, 2.0, NAN])))
def test_odrpo_of_given_thresholds_is_the_sum_of_grpo(rewards_PG: Tensor) -> None:
    indicators = [torch.where(rewards_PG.isnan(), NAN, (rewards_PG >= t).float()) for t in (1.0, 2.0)]
    expected_PG = sum(advantages.grpo(indicator_PG) for indicator_PG in indicators)
    torch.testing.assert_close(advantages.odrpo(rewards_PG, thresholds=[1, 2]), expected_PG, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("qae", {"quantile": 1.0}, r"quantile=1\.0: .* Use 0\.4"),
        ("odrpo", {"thresholds": []}, "at least one number"),
        ("odrpo", {"thresholds": [NAN]}, "no NaN"),
        ("odrpo", {"thresholds": [1.0], "repeats": True}, "repeats only where"),
        ("calibrated", {}, r"advantage 'calibrated' needs the options \['tau'\]"),
    ],
)
def test_options_that_say_nothing_are_refused_at_once(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        advantages.get_advantage(name, **options)
