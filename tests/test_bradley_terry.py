"""Strengths from duels: worked by hand, recovered, connected or not, and how often their intervals hold the truth."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from gopo_lightning.evaluation.bradley_terry import ELO, ladder, strengths


def test_two_players_by_hand() -> None:
    """3 : 1 are log-odds of ln 3, so ±ln 3 / 2; with half a vote each ln(3.5 / 1.5)."""
    wins = np.array([[0.0, 3.0], [1.0, 0.0]])
    assert strengths(wins) == pytest.approx([math.log(3) / 2, -math.log(3) / 2])
    assert strengths(wins, prior=0.5) == pytest.approx(np.array([0.5, -0.5]) * math.log(3.5 / 1.5))


def test_ten_to_one_is_400_elo() -> None:
    found = ELO * strengths(np.array([[0.0, 10.0], [1.0, 0.0]]))
    assert found[0] - found[1] == pytest.approx(400)


def test_consistent_odds_are_recovered() -> None:
    """Votes in the proportion of σ(θ_i − θ_j), some pairs not met: maximum likelihood gives θ back."""
    theta = np.array([1.5, 0.2, -0.4, -1.3])
    wins = 40 / (1 + np.exp(theta[None, :] - theta[:, None]))
    wins[0, 3] = wins[3, 0] = 0
    assert strengths(wins) == pytest.approx(theta, abs=1e-9)


def test_it_is_the_maximum_that_scipy_finds() -> None:
    wins = np.random.default_rng(0).uniform(0, 9, (5, 5))

    def loss(theta: np.ndarray) -> float:
        gap = theta[:, None] - theta[None, :]
        return float((wins * np.logaddexp(0, -gap))[~np.eye(5, dtype=bool)].sum() + theta.mean() ** 2)

    assert strengths(wins) == pytest.approx(minimize(loss, np.zeros(5), tol=1e-12).x, abs=1e-4)


def test_a_steep_ladder_converges() -> None:
    """1000 votes to 1 along a chain of 8."""
    wins = np.diag([1000.0] * 7, 1) + np.diag([1.0] * 7, -1)
    assert np.diff(strengths(wins)) == pytest.approx([-math.log(1000)] * 7)


def test_uneven_votes_converge() -> None:
    """From 0.1 to 10 million votes, some pairs not met: Newton's whole steps run away in some of these. At the maximum
    each player has the wins that are expected."""
    generator, solved = np.random.default_rng(0), 0
    for _ in range(400):
        K = generator.integers(2, 7)
        wins = 10 ** generator.uniform(-1, 7, (K, K)) * (generator.random((K, K)) < 0.6) * ~np.eye(K, dtype=bool)
        try:
            theta = strengths(wins, prior=0.5)
        except ValueError:
            continue  # not connected
        wins += 0.5 * (wins + wins.T > 0)
        expected = (wins + wins.T) / (1 + np.exp(theta[None, :] - theta[:, None]))
        assert expected.sum(1) == pytest.approx(wins.sum(1), rel=1e-6)
        solved += 1
    assert solved > 200


def test_pairs_that_never_met_have_no_prior() -> None:
    """Every prompt says the same, so every draw does, and the interval is a point; 0 and 2 never met."""
    one = np.array([[math.nan, 0.75, math.nan], [0.25, math.nan, 0.75], [math.nan, 0.25, math.nan]])
    found = ladder(np.stack([one] * 10), draws=20).ratings
    gap = ELO * math.log(8 / 3)  # 7.5 and 2.5 votes, with half a vote more on each side
    assert [r.mean for r in found] == pytest.approx([gap, 0, -gap], abs=1e-6)
    assert all(r.low == pytest.approx(r.mean, abs=1e-6) and r.high == pytest.approx(r.mean, abs=1e-6) for r in found)


def test_who_won_everything_has_a_strength_only_with_a_prior() -> None:
    wins = np.array([[0.0, 5.0], [0.0, 0.0]])
    with pytest.raises(ValueError, match="won or lost every vote.*prior=0.5"):
        strengths(wins)
    assert strengths(wins, prior=0.5)[0] == pytest.approx(math.log(11) / 2)


def test_who_never_met_cannot_be_compared() -> None:
    wins = np.zeros((4, 4))
    wins[0, 1] = wins[1, 0] = wins[2, 3] = wins[3, 2] = 1
    with pytest.raises(ValueError, match=r"no chain of duels connects the players \[0, 1\] and \[2, 3\]"):
        strengths(wins, prior=0.5)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_votes_are_finite(bad: float) -> None:
    with pytest.raises(ValueError, match="votes must be finite"):
        strengths(np.array([[0.0, bad], [1.0, 0.0]]))


def shares(theta: np.ndarray, n: int, generator: np.random.Generator) -> np.ndarray:
    """One vote on each prompt and pair."""
    K = len(theta)
    chance = 1 / (1 + np.exp(theta[None, :] - theta[:, None]))
    upper = np.triu(generator.random((n, K, K)) < chance, 1).astype(float)
    return upper + np.tril(1 - upper.transpose(0, 2, 1), -1)


def test_intervals_hold_the_truth() -> None:
    """Three players, 60 prompts, 400 repetitions: 95 % for each of them, within three standard errors."""
    theta, generator = np.array([0.6, 0.1, -0.7]), np.random.default_rng(1)
    held = []
    for k in range(400):
        found = ladder(shares(theta, 60, generator), draws=200, seed=k)
        held.append([r.low <= ELO * x <= r.high for r, x in zip(found.ratings, theta, strict=True)])
    assert (abs(np.mean(held, 0) - 0.95) < 0.033).all(), np.mean(held, 0)


def test_a_ladder_is_centred_and_ignores_what_was_not_asked() -> None:
    votes = shares(np.array([1.0, 0.0, -1.0]), 30, np.random.default_rng(0))
    votes[:10, 0, 2] = votes[:10, 2, 0] = np.nan
    found = ladder(votes, draws=100)
    ratings = [r.mean for r in found.ratings]
    assert sum(ratings) == pytest.approx(0, abs=1e-9) and ratings == sorted(ratings, reverse=True)
    assert all(r.low < r.mean < r.high and r.n == 30 for r in found.ratings)


def test_one_prompt_has_no_interval_and_a_clean_sweep_is_finite() -> None:
    one = ladder(shares(np.array([9.0, -9.0]), 1, np.random.default_rng(0)))
    assert math.isnan(one.ratings[0].low) and one.ratings[0].mean == pytest.approx(ELO * math.log(3) / 2)
    swept = ladder(shares(np.array([99.0, -99.0]), 20, np.random.default_rng(0)), draws=50)
    assert swept.ratings[0].mean == pytest.approx(ELO * math.log(41) / 2) and math.isfinite(swept.ratings[0].high)
