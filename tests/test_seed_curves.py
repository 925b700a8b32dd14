"""Curves over seeds, by hand."""

import math
from pathlib import Path

import pytest

from gopo_lightning.evaluation.event_files import Run
from gopo_lightning.evaluation.panels import over_axis, over_kl, over_steps, thinned
from gopo_lightning.evaluation.run_groups import Group
from gopo_lightning.evaluation.seed_curves import (
    band,
    common_steps,
    over,
    resampled_band,
    sampled_tokens,
    steps_ratio,
    steps_to,
)


def group(*rewards: dict[int, float], **tags: dict[int, float]) -> Group:
    """A run of each of ``rewards``."""
    scalars = {"train/kl": tags["kl"]} if "kl" in tags else {}
    runs = {
        str(i): Run(Path(str(i)), {}, {"val/reward": r, **scalars}, tags.get("seconds", {}))
        for i, r in enumerate(rewards)
    }
    return Group("a", {}, runs)


def test_a_band_is_where_all_seeds_have_a_value() -> None:
    curves = [{0: 1.0, 10: 2.0, 20: 5.0}, {0: 3.0, 10: 4.0}, {0: 2.0, 5: 7.0, 10: 6.0}]
    found = band(curves)
    assert common_steps(curves) == list(found) == [0, 10]
    assert found[10].mean == 4 and found[10].half_width == pytest.approx(4.303 * 2 / math.sqrt(3), rel=1e-3)
    assert band([]) == {} and common_steps([]) == []


def test_another_axis_is_interpolated_and_the_band_is_where_all_are_known() -> None:
    assert over({0: 1.0, 10: 2.0, 15: 3.0}, {0: 0.0, 10: 100.0, 20: 300.0}) == [(0, 1), (100, 2), (200, 3)]
    assert over({0: 1.0}, {}) == []
    points = resampled_band([[(0.0, 0.0), (10.0, 10.0)], [(2.0, 4.0), (6.0, 8.0), (20.0, 8.0)]], num_points=3)
    assert [x for x, _ in points] == [2, 6, 10]
    assert [interval.mean for _, interval in points] == [3, 7, 9]
    assert resampled_band([[(0.0, 1.0)], [(5.0, 1.0)]]) == [] and resampled_band([]) == []


def test_tokens_of_rollouts_that_were_not_logged_count_like_the_next() -> None:
    scalars = {
        "throughput/rollout_tokens_per_second": {4: 50.0, 8: 25.0, 16: 10.0},
        "seconds/rollout": {4: 2.0, 8: 2.0, 16: 2.0},
    }
    update = {"num_inner_epochs": 2, "num_minibatches": 2}
    run = Run(Path("a"), {"model": {"init_args": {"update": update}}}, scalars, {})
    assert sampled_tokens(run) == {0: 0, 4: 100, 8: 150, 16: 190}
    assert sampled_tokens(Run(Path("a"), {}, {}, {})) == {}


def test_the_first_step_at_a_target() -> None:
    curve = {0: 0.0, 10: 1.0, 20: 0.5, 30: 2.0}
    assert steps_to(curve, 0.5) == 5 and steps_to(curve, 1.0) == 10 and steps_to(curve, 1.25) == 25
    assert steps_to(curve, 2.1) is None and steps_to(curve, -1.0) == 0 and steps_to({}, 0.0) is None


def test_the_ratio_of_steps_is_a_geometric_mean_over_pairs() -> None:
    baselines = [{0: 0.0, 40: 1.0}, {0: 0.0, 40: 1.0}]
    found = steps_ratio([{0: 0.0, 10: 1.0, 40: 2.0}, {0: 0.0, 40: 1.0}], baselines)
    assert (found.never, found.without_target) == (0, 0) and found.ratio is not None
    assert found.ratio.mean == pytest.approx(0.5)  # of ¼ and 1
    spread = 12.7062 * math.log(2)  # t(1) × standard error of ln ¼ and ln 1
    assert (found.ratio.low, found.ratio.high) == pytest.approx(
        (0.5 / math.exp(spread), 0.5 * math.exp(spread)), rel=1e-4
    )


def test_runs_that_never_get_there_are_counted_and_bound_the_ratio_from_below() -> None:
    baselines = [{0: 0.0, 10: 1.0, 20: 0.5}, {0: 0.0, 20: 1.0}, {0: 1.0, 20: 0.5}]
    found = steps_ratio([{0: 0.0, 40: 0.4}, {0: 0.0, 5: 1.0, 20: 1.0}, {0: 0.0, 20: 9.0}], baselines)
    assert (found.never, found.without_target) == (1, 1) and found.ratio is not None
    assert found.ratio.mean == pytest.approx(math.sqrt(40 / 5 * 5 / 20)) and found.ratio.n == 2
    assert math.isnan(found.ratio.low) and math.isnan(found.ratio.high)
    for nothing in ({0: 0.0}, {10: 1.0, 20: 0.5}):
        assert steps_ratio([{10: 0.0, 20: 1.0}], [nothing]).ratio is None


def test_long_curves_are_drawn_as_means_of_neighbours() -> None:
    assert thinned({1: 1.0, 2: 3.0, 3: 5.0, 4: 7.0, 5: 9.0}, 2) == {2: 2.0, 4: 6.0}
    assert thinned({0: 1.0, 10: 3.0}, 1) == {0: 1.0, 10: 3.0}
    long = {step: float(step % 2) for step in range(1, 161)}
    panel = over_steps([group(long, {1: 1.0})], "val/reward", "val/reward")
    assert panel is not None and panel.caption == "means of 2 steps"
    assert len(panel.lines[0].seeds) == 1 and {y for _, y in panel.lines[0].seeds[0]} == {0.5}


def test_panels_over_seconds_and_kl() -> None:
    one = group({0: 0.0, 10: 1.0}, {0: 0.0, 10: 3.0}, seconds={0: 1.0, 10: 11.0}, kl={5: 0.1, 10: 0.2})
    seconds = over_axis([one], "val/reward", "seconds", "seconds", lambda run: run.seconds)
    assert seconds is not None and seconds.lines[0].seeds == [[(1, 0), (11, 1)], [(1, 0), (11, 3)]]
    assert seconds.lines[0].mean[-1] == (11, 2) and len(seconds.lines[0].low) == len(seconds.lines[0].mean)
    kl = over_kl([one], "val/reward")
    assert kl is not None and kl.lines[0].mean == [(0.0, 0.0), (0.2, 2.0)]
    single = over_steps([group({0: 0.0, 10: 1.0})], "val/reward", "reward")
    assert single is not None and (single.lines[0].mean, single.lines[0].low) == ([(0, 0), (10, 1)], [])
    assert over_kl([group({0: 0.0})], "val/reward") is None
    assert over_axis([group({0: 0.0})], "val/reward", "seconds", "s", lambda run: run.seconds) is None
