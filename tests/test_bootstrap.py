"""Intervals over prompts: worked by hand, turned round, and counted: how often they hold the truth."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gopo_lightning.evaluation.bootstrap import (
    authors_interval,
    cluster_bootstrap,
    draw_counts,
    expanded_level,
    on_grid,
    score_bound,
)
from gopo_lightning.evaluation.duels.written import verdict

REPETITIONS = 1000


def coverage(
    sample: Callable[[np.random.Generator], np.ndarray], truth: float, repetitions: int = REPETITIONS
) -> float:
    """How often the 95 % interval of a sample holds ``truth``."""
    generator = np.random.default_rng(5)
    found = [cluster_bootstrap(sample(generator), draws=400, seed=k) for k in range(repetitions)]
    return float(np.mean([interval.low <= truth <= interval.high for interval in found]))


def votes(n: int, pairs: int, concentration: float, truth: float) -> Callable[[np.random.Generator], np.ndarray]:
    """``n`` prompts, each with a win rate of its own around ``truth``, and ``pairs`` votes on each."""
    a, b = concentration * truth, concentration * (1 - truth)
    return lambda generator: generator.binomial(pairs, generator.beta(a, b, n)) / pairs


@pytest.mark.parametrize(
    ("n", "pairs", "concentration", "truth"),
    [(20, 9, 4, 0.5), (50, 9, 4, 0.5), (200, 9, 4, 0.5), (50, 1, 1, 0.6), (20, 1, 1, 0.9), (50, 4, 2, 0.8)],
)
def test_the_interval_holds_the_truth_in_95_of_100(n: int, pairs: int, concentration: float, truth: float) -> None:
    """A binomial of 1000 at 95 % stays within ±2 %; near 0 or 1 the interval is allowed to be cautious."""
    found = coverage(votes(n, pairs, concentration, truth), truth)
    assert 0.93 <= found <= (0.97 if truth == 0.5 else 1.0), found


def test_pairs_of_a_prompt_are_no_independent_votes() -> None:
    """What an interval over all pairs would do on the same data: it misses the truth far too often."""
    generator, missed = np.random.default_rng(5), 0
    for _ in range(REPETITIONS):
        shares = votes(50, 9, 4, 0.5)(generator)
        missed += abs(shares.mean() - 0.5) > 1.96 * math.sqrt(0.25 / (50 * 9))
    assert missed / REPETITIONS > 0.2


def test_by_hand() -> None:
    """Draws of [0, 1] have the mean 0, ½, 1 with ¼, ½, ¼; of two prompts the whole range is left."""
    found = cluster_bootstrap([0.0, 1.0])
    assert (found.mean, found.low, found.high, found.n) == (0.5, 0.0, 1.0, 2)


def test_the_score_bound_of_votes_is_that_of_wilson_with_students_quantile() -> None:
    """3 of 4 votes: m = 0.75, variance 0.25, design effect 4/3, t(0.975, 3) = 3.18245, c = t² / 3 = 3.37600;
    (0.75 + 1.688 − √(0.633 + 2.849344)) / 4.376 = 0.571897 / 4.376 = 0.130690."""
    assert score_bound(np.array([1.0, 1.0, 1.0, 0.0])) == pytest.approx(0.130690, abs=1e-6)


def test_ten_wins_of_ten_are_no_certainty() -> None:
    """t(0.975, 9)² = 5.11737: the lower bound is 1 / (1 + 0.511737)."""
    found = cluster_bootstrap([1.0] * 10)
    assert (found.mean, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(1 / 1.511737, abs=1e-6)


def test_equal_shares_within_the_bounds_are_a_point() -> None:
    found = cluster_bootstrap([0.5] * 10)
    assert (found.low, found.mean, found.high) == (0.5, 0.5, 0.5)
    assert verdict(cluster_bootstrap([0.75] * 10)).startswith("open: it is the same on all prompts")


def test_one_prompt_has_no_interval_and_none_no_mean() -> None:
    found = cluster_bootstrap([0.25])
    assert found.mean == 0.25 and math.isnan(found.low) and math.isnan(found.high) and found.n == 1
    with pytest.raises(ValueError, match="at least one prompt"):
        cluster_bootstrap([])


@pytest.mark.parametrize("bad", [-0.1, 1.5, math.nan])
def test_what_is_no_share_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="a share is"):
        cluster_bootstrap([0.5, bad])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_turned_round_it_is_the_same_to_the_last_bit(shares: list[float], seed: int) -> None:
    grid = on_grid(np.array(shares))
    found, turned = cluster_bootstrap(grid, 200, seed), cluster_bootstrap(1 - grid, 200, seed)
    assert found.mean + turned.mean == 1.0 and turned.mean == 1.0 - found.mean
    if len(shares) > 1:
        assert (turned.low, turned.high) == (1 - found.high, 1 - found.low)
        assert 0 <= found.low <= found.mean <= found.high <= 1


def test_the_grid_is_symmetric_at_its_halves() -> None:
    """(k + ½) · 2⁻³² lies halfway between two multiples, whose even one both sides must not take."""
    halves = (np.arange(8) + 0.5) / 2.0**32
    assert (on_grid(halves) + on_grid(1 - halves) == 1).all()


def test_draws_come_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(draw_counts(5, 100, 3)))
    monkeypatch.setattr("gopo_lightning.evaluation.bootstrap._BLOCK", 35)
    assert (np.concatenate(list(draw_counts(5, 100, 3))) == whole).all()
    assert whole.shape == (100, 5) and (whole.sum(1) == 5).all()


def test_levels() -> None:
    """t(0.025, 9) = −2.26216, times √(10/9) = 1.05409: Φ(−2.38452) = 0.00855."""
    assert expanded_level(10) == pytest.approx(0.00855, abs=1e-5)
    assert expanded_level(2) < expanded_level(20) < expanded_level(1000) < 0.025


def test_the_authors_interval_does_not_narrow_with_more_prompts() -> None:
    """It shows the spread of means of 25 prompts: ±1.7 · ½ / √25 for single votes, as of 25 numbers the 2.5 % point is
    nearer than −1.96. So it is too narrow for 25 prompts, and too wide for many."""
    generator = np.random.default_rng(0)
    widths = {}
    for n in (25, 100, 1600):
        shares = generator.integers(0, 2, n).astype(float)
        ours = cluster_bootstrap(shares).half_width
        theirs = np.mean([authors_interval(shares, seed=k).half_width for k in range(100)])
        widths[n] = (ours, theirs)
    assert widths[1600][0] == pytest.approx(0.98 / 40, rel=0.05)
    assert widths[25][0] > 1.2 * widths[25][1]
    assert all(theirs == pytest.approx(0.167, rel=0.06) for _, theirs in widths.values())


def test_the_authors_interval_by_hand() -> None:
    """B = 1 draw: its mean is both bounds."""
    found = authors_interval([0.0, 1.0], N=4, B=1, seed=1)
    assert found.low == found.mean == found.high and found.mean * 4 % 1 == 0 and found.n == 4
