"""Penalties for endings: loops by hand and against a brute-force search, the soft limit by its formula."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gopo_lightning.objectives.advantages import ordinal
from gopo_lightning.rollout import OverlongPenalty, RepetitionPenalty, SamplingConfig
from gopo_lightning.rollout.penalties import looped_share
from gopo_lightning.rollout.transforms import Context
from gopo_lightning.types import Rollout
from tests.rollouts import rollout_of, setting_of
from tests.runs import make_module
from tests.test_module import fit

NAN = math.nan
NOW = Context(0, 0)
LOOPS = [
    ([1, 2, 3, 4, 5, 6], 0.0),
    ([1, 2, 3, 3, 3, 3], 4 / 6),
    ([9, 1, 2, 1, 2, 1, 2], 6 / 7),
    ([1, 1], 1.0),
    ([5, 7, 7, 8], 0.0),
    ([3] * 7, 6 / 7),  # the longest run is of three
    ([4], 0.0),
    ([], 0.0),
]


def cut_off(rollout: Rollout, truncated: Sequence[bool], tokens: Sequence[Sequence[int]] | None = None) -> Rollout:
    completions = replace(rollout.completions, truncated_N=torch.tensor(truncated))
    if tokens is not None:
        width = completions.tokens_NT.shape[1]
        rows = [[*row, *([row[-1]] * (width - len(row)))] for row in tokens]  # padding that would go on with the loop
        completions = replace(completions, tokens_NT=torch.tensor(rows))
    return replace(rollout, completions=completions)


def looping(rewards: Sequence[float], truncated: Sequence[bool]) -> Rollout:
    """Looped shares 4/6, 6/7 and 0 of completions of 6, 7 and 4 tokens."""
    tokens = [LOOPS[1][0], LOOPS[2][0], LOOPS[4][0]]
    return cut_off(rollout_of([rewards], [6, 7, 4]), truncated, tokens)


def brute_force(tokens: Sequence[int]) -> float:
    """Every period by itself: how often the last tokens repeat to the left."""
    N, share = len(tokens), 0.0
    for period in range(1, N // 2 + 1):
        copies = 1
        while (copies + 1) * period <= N and tokens[N - (copies + 1) * period : N - copies * period] == tokens[
            N - period :
        ]:
            copies += 1
        if copies >= 2:
            share = copies * period / N
    return share


# --- RepetitionPenalty ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "share"), LOOPS)
def test_looped_shares_by_hand(tokens: list[int], share: float) -> None:
    assert looped_share(tokens) == pytest.approx(share)


def test_looped_shares_against_a_search_of_all_periods() -> None:
    draw, shares = random.Random(0), set()
    for _ in range(3000):
        period = [draw.randrange(3) for _ in range(draw.randrange(1, 6))]
        start = [draw.randrange(3) for _ in range(draw.randrange(5))]
        tokens = start + period * draw.randrange(1, 5) + period[: draw.randrange(len(period))]
        assert looped_share(tokens) == brute_force(tokens), tokens
        shares.add(looped_share(tokens))
    assert len(shares) > 20


def test_a_long_completion_takes_linear_time() -> None:
    """Of 100,000 tokens all periods would take 5e9 comparisons in the worst case."""
    assert looped_share([0] * 100_000) == 1.0
    assert looped_share([0] * 50_000 + [1] + [0] * 49_999) == 49_998 / 100_000


def test_a_constant_and_a_proportional_penalty() -> None:
    rollout = looping([1.0, 1.0, 1.0], [True] * 3)
    assert RepetitionPenalty(0.1)(rollout, NOW).rewards_PG.tolist() == [[0.9, 0.9, 1.0]]
    proportional_PG = RepetitionPenalty(0.5, "proportional")(rollout, NOW).rewards_PG
    torch.testing.assert_close(proportional_PG, torch.tensor([[1 - 2 / 6, 1 - 3 / 7, 1.0]], dtype=torch.float64))


def test_what_ended_by_itself_is_left_as_it_is() -> None:
    rollout = looping([0.1, NAN, 0.3], [False] * 3)
    assert torch.equal(RepetitionPenalty()(rollout, NOW).rewards_PG.isnan(), rollout.rewards_PG.isnan())
    assert RepetitionPenalty()(rollout, NOW).rewards_PG.nan_to_num(7).tolist() == [[0.1, 7.0, 0.3]]
    one = looping([0.1, NAN, 0.3], [True, True, False])
    assert RepetitionPenalty()(one, NOW).rewards_PG.nan_to_num(7).tolist() == [[0.0, 7.0, 0.3]]


def test_under_ranks_it_breaks_ties() -> None:
    """Of three that are wrong, and one that is right, the loop is last and the right one stays first."""
    rollout = cut_off(rollout_of([[0.0, 0.0, 1.0]], [6, 6, 6]), [True, False, True], [LOOPS[1][0]] * 3)
    rewards_PG = RepetitionPenalty()(rollout, NOW).rewards_PG
    assert ordinal(rewards_PG).tolist() == [[-2.0, 0.0, 2.0]]


def test_the_mean_share_is_measured() -> None:
    penalty = RepetitionPenalty()
    penalty(looping([1.0, 1.0, 1.0], [True, False, True]), NOW)
    mean = penalty.metrics()["looped_share"]
    assert float(mean.sum / mean.count) == pytest.approx(4 / 6 / 3)


# --- OverlongPenalty --------------------------------------------------------------------------------------------------


def test_the_soft_limit_by_hand() -> None:
    """L_max 10, L_cache 4: 0 up to 6, then −¼ a token; cut off is −1 whatever its length, as is a full 10."""
    lengths = [1, 6, 7, 8, 9, 10, 5]
    rollout = cut_off(rollout_of([[1.0] * 7], lengths), [False] * 6 + [True])
    penalty = OverlongPenalty(4)
    rewards_PG = penalty(rollout, NOW).rewards_PG
    assert rewards_PG.tolist() == [[1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]]
    assert OverlongPenalty(4, 0.5)(rollout, NOW).rewards_PG.tolist() == [[1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.5]]
    mean = penalty.metrics()["overlong_penalty"]
    assert float(mean.sum / mean.count) == pytest.approx(-3.5 / 7)


def test_beside_ranks_a_penalty_of_the_gap_makes_ties_and_a_smaller_one_breaks_them() -> None:
    """Right and wrong, short and cut off: with c the gap of the rewards the long right one ties with the short wrong
    one; below it stays above."""
    rollout = cut_off(rollout_of([[1.0, 1.0, 0.0, 0.0]], [2, 4, 2, 4]), [False, True, False, True])
    ranks = {c: ordinal(OverlongPenalty(2, c)(rollout, NOW).rewards_PG)[0].tolist() for c in (1.0, 0.5, 2.0)}
    assert ranks[1.0] == [2.0, 0.0, 0.0, -2.0]
    assert ranks[0.5] == pytest.approx([2.0, 2 / 3, -2 / 3, -2.0])
    assert ranks[2.0] == pytest.approx([2.0, -2 / 3, 2 / 3, -2.0])


def test_a_reward_that_is_not_valid_stays_so() -> None:
    rollout = cut_off(rollout_of([[NAN, 1.0]], [2, 2]), [True, True])
    assert OverlongPenalty(1)(rollout, NOW).rewards_PG.nan_to_num(7).tolist() == [[7.0, 0.0]]


# --- in a run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RepetitionPenalty(0.0), "coef=0.0 of RepetitionPenalty must be above 0 and finite. Leave"),
        (lambda: RepetitionPenalty(0.1, "adaptive"), "penalty='adaptive' of RepetitionPenalty is unknown"),
        (lambda: OverlongPenalty(4, NAN), "coef=nan of OverlongPenalty must be above 0"),
        (lambda: OverlongPenalty(0).set_up(setting_of()), "buffer_tokens=0 .* between 1 and max_new_tokens=20"),
        (lambda: OverlongPenalty(21).set_up(setting_of()), "buffer_tokens=21 of OverlongPenalty .* Try 4"),
    ],
)
def test_options_that_make_no_sense_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_buffer_that_does_not_fit_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ValueError, match="buffer_tokens=9 of OverlongPenalty must lie between 1 and max_new_tokens=8"):
        make_module(Path(), transforms=[OverlongPenalty(9)], sampling=SamplingConfig(max_new_tokens=8))


def test_penalties_reach_the_rewards_and_the_curves(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    penalties = [OverlongPenalty(4), RepetitionPenalty(0.5, "proportional")]
    module = make_module(tiny_policy, transforms=penalties, sampling=SamplingConfig(max_new_tokens=8))
    keep = fit(module, prompts_file, tmp_path, max_steps=1, limit_val_batches=0)
    (experience,) = keep.experiences
    completions = experience.completions
    over_N = (completions.lengths_N - 4).clamp(0, 4) / 4
    rows = zip(completions.tokens_NT, completions.mask_NT, completions.truncated_N.tolist(), strict=True)
    shares = [brute_force(tokens[mask].tolist()) if cut else 0.0 for tokens, mask, cut in rows]
    expected_N = experience.rewards_PGK.flatten() - over_N.double() - 0.5 * torch.tensor(shares, dtype=torch.float64)
    assert completions.truncated_N.any() and not completions.truncated_N.all()
    torch.testing.assert_close(experience.rewards_PG.flatten(), expected_N)
    logged = module.trainer.logged_metrics
    assert float(logged["transform/overlong_penalty"]) == pytest.approx(-float(over_N.mean()))
    assert float(logged["transform/looped_share"]) == pytest.approx(sum(shares) / len(shares))
