"""Means and their intervals against numbers worked out by hand and by scipy."""

import math

import numpy as np
import pytest
from scipy import stats

from gopo_lightning.evaluation.intervals import paired, student


def test_student_is_that_of_scipy() -> None:
    values = [0.3, -0.1, 0.8, 0.4, 0.05]
    low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    found = student(values)
    assert (found.low, found.high, found.n) == (pytest.approx(low), pytest.approx(high), 5)
    assert found.half_width == pytest.approx((high - low) / 2)


def test_by_hand() -> None:
    """Mean 1, standard deviation √2, t(0.975, 1) = 12.7062: half width 12.7062 · √2 / √2."""
    assert student([0.0, 2.0]).half_width == pytest.approx(12.7062, abs=1e-4)


def test_one_value_has_no_interval_and_none_no_mean() -> None:
    assert student([2.5]).mean == 2.5
    assert math.isnan(student([2.5]).low)
    assert str(student([2.5])) == "+2.500"
    with pytest.raises(ValueError, match="no values"):
        student([])


def test_pairs() -> None:
    assert paired([1.0, 2.0, 3.0], [0.0, 1.0, 2.0]).low == 1.0
    assert str(paired([1.0, 2.0], [0.0, 1.0])) == "+1.000 [+1.000, +1.000]"
    with pytest.raises(ValueError, match="longer"):
        paired([1.0], [1.0, 2.0])


def test_no_interval_goes_beyond_what_values_can_be() -> None:
    found = student([0.9, 0.5], lowest=-1.0, highest=1.0)
    assert (found.low, found.high) == (-1.0, 1.0)
    assert found.mean == pytest.approx(0.7)
