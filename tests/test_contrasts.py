"""Differences between groups: against scipy, by hand, and in words."""

import math
from pathlib import Path

import pytest
from scipy import stats

from gopo_lightning.evaluation.contrasts import HIGH_IS_GOOD, contrast, contrasts, holm, paired_p, sentence, welch
from gopo_lightning.evaluation.event_files import Run
from gopo_lightning.evaluation.run_groups import Group

A, B = [1.0, 2.5, 3.0, 4.0], [0.5, 1.0, 2.75, 2.0]


def group(label: str, rewards: dict[int, dict[int, float]]) -> Group:
    """By seed."""
    return Group(label, {}, {str(s): Run(Path(label), {}, {"val/reward": c}, {}) for s, c in rewards.items()})


def test_p_values_are_those_of_scipy() -> None:
    assert paired_p([a - b for a, b in zip(A, B, strict=True)]) == pytest.approx(stats.ttest_rel(A, B).pvalue)
    expected = stats.ttest_ind(A, B[:3], equal_var=False)
    interval, p = welch(A, B[:3])
    bounds = expected.confidence_interval(0.95)
    assert p == pytest.approx(expected.pvalue) and interval.n == 3
    assert (interval.low, interval.high) == pytest.approx((bounds.low, bounds.high))


def test_differences_without_spread_or_of_one_seed() -> None:
    assert paired_p([0.0, 0.0]) == 1 and math.isnan(paired_p([1.0]))
    assert welch([1.0, 1.0], [1.0, 1.0])[1] == 1
    for p in (paired_p([0.5, 0.5]), paired_p([0.3 - 0.2, 0.8 - 0.7]), welch([2.0, 2.0], [1.0, 1.0])[1]):
        assert math.isnan(p)  # not 0: two equal differences are no certainty
    interval, p = welch([1.0, 2.0], [1.0])
    assert interval.mean == 0.5 and math.isnan(interval.low) and math.isnan(p)


@pytest.mark.parametrize("seeds", [(1, 2), (3, 4)])
def test_equal_differences_are_no_certainty(seeds: tuple[int, int]) -> None:
    """Scores of few prompts are coarse, so that two seeds may well differ by the same."""
    second = group("b", {seed: {5: 0.875} for seed in seeds})
    found = contrast(group("a", {1: {5: 1.0}, 2: {5: 1.0}}), second, "val/reward")
    assert found is not None and found.difference.mean == 0.125 and math.isnan(found.difference.low)
    assert not found.is_clear and "+0.125 on val/reward at step 5 in each of 2 seeds" in sentence(found, 1)


def test_holm() -> None:
    # R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1, 1] and holm([]) == []
    found = holm([0.02, math.nan, 0.03])
    assert found[0] == 0.04 and math.isnan(found[1]) and found[2] == 0.04


def test_a_difference_is_paired_by_seed_at_the_last_common_step() -> None:
    first = group("a", {1: {0: 0.0, 10: 1.0}, 2: {0: 0.0, 10: 2.0, 20: 9.0}, 7: {0: 50.0, 10: 60.0}})
    second = group("b", {2: {0: 0.0, 10: 1.0, 20: 5.0}, 1: {0: 0.0, 10: 0.5, 20: 5.0}})
    found = contrast(first, second, "val/reward")
    assert found is not None and found.is_paired and found.step == 10 and found.difference.n == 2
    assert found.difference.mean == 0.75 and found.difference.half_width == pytest.approx(12.7062 * 0.25, rel=1e-4)
    assert list(found.by_step) == [0, 10] and found.steps_ratio is not None
    assert contrast(first, second, "val/other") is None


def test_without_a_common_seed_it_is_not_paired() -> None:
    found = contrast(group("a", {1: {5: 1.0}, 2: {5: 2.0}}), group("b", {3: {5: 0.0}, 4: {5: 1.0}}), "val/reward")
    assert found is not None and not found.is_paired and found.steps_ratio is None
    assert found.difference.mean == 1 and found.p == pytest.approx(stats.ttest_ind([1, 2], [0, 1]).pvalue)
    unknown = [Group(x, {}, {"unknown": Run(Path(x), {}, {"val/reward": {5: 1.0}}, {})}) for x in "ab"]
    found = contrast(*unknown, "val/reward")
    assert found is not None and not found.is_paired


def seeds(label: str, *values: float) -> Group:
    return group(label, {i: {10: value} for i, value in enumerate(values)})


def test_the_answer_in_words() -> None:
    base = seeds("base", 0.0, 0.0, 0.0)

    def say(*others: Group) -> list[str]:
        found = contrasts([base, *others], base, ["val/reward"])
        return [sentence(c, len(found)) for c in found]

    (ahead,) = say(seeds("up", 1.0, 1.1, 0.9))
    assert ahead.startswith(
        "up is ahead of base on val/reward at step 10 "
        "(+1.000, 95 % interval +0.752 to +1.248; 3 seeds, paired; p = 0.0033)."
    )
    (behind,) = say(seeds("down", -1.0, -1.1, -0.9))
    assert behind.startswith("base is ahead of down on val/reward at step 10 (−1.000, 95 % interval −1.248 to −0.752")
    (level,) = say(seeds("same", 1.0, -1.0, 0.1))
    assert level.startswith(
        "No difference between same and base can be told on val/reward at step 10: the interval includes 0 ("
    )
    (single,) = say(seeds("one", 1.0))
    assert "one − base is +1.000 on val/reward at step 10" in single and "no difference can be told" in single
    near, *_ = say(seeds("near", 0.6, 1.0, 1.4), *(seeds(f"n{i}", 1.0, -1.0, 0.1) for i in range(3)))
    assert near.startswith("near and base cannot be told apart on val/reward at step 10: the interval alone excludes 0")
    assert "of 4 comparisons one may do so by chance (p = 0.049, Holm's p over 4 comparisons 0.2)." in near


def test_only_what_is_better_when_higher_can_be_ahead() -> None:
    for tag, good in (
        *(("val/reward", True), ("val/a/win_rate", True), ("reward/mean", True), ("reward/a/mean", True)),
        *(("val/pair_accuracy_all", True), ("train/loss", False), ("val/length_mean", False), ("reward/std", False)),
    ):
        assert bool(HIGH_IS_GOOD.fullmatch(tag)) is good, tag
    first, second = (
        Group(name, {}, {str(s): Run(Path(name), {}, {"train/loss": {0: 0.0, 9: mean + s / 10}}, {}) for s in range(3)})
        for name, mean in (("a", 2.0), ("b", 1.0))
    )
    first.runs["0"].scalars["train/loss"][9] += 0.01  # without any spread nothing could be told
    (found,) = contrasts([first, second], second, ["train/loss"])
    assert sentence(found, 1).startswith("a is higher than b on train/loss at step 9") and found.steps_ratio is None
