"""Rollout metrics by hand."""

import math

import pytest
import torch

from gopo_lightning.rewards import combine
from gopo_lightning.rewards.metrics import completion_metrics, pair_ties, reward_metrics, win_rate

NAN = math.nan


def test_ties_count_pairs_of_valid_completions() -> None:
    rewards_PG = torch.tensor([[1.0, 1.0, 2.0, 1.0], [NAN, 3.0, 3.0, NAN], [NAN, NAN, NAN, 1.0]])
    tied_P, pairs_P = pair_ties(rewards_PG)
    assert tied_P.tolist() == [3, 1, 0]
    assert pairs_P.tolist() == [6, 1, 0]


def test_groups_whose_ties_the_second_source_broke() -> None:
    """The first source ties groups 0, 1 and 3; the combined reward orders 0 alone. Group 2 had an order already."""
    nan = float("nan")
    first_PG = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 2.0], [nan, 2.0]])
    second_PG = torch.tensor([[1.0, 2.0], [1.0, 1.0], [1.0, 2.0], [1.0, 2.0]])
    rewards_PGK = torch.stack([first_PG, second_PG], -1)
    combined_PG = combine.lexicographic(rewards_PGK)
    metrics = reward_metrics(rewards_PGK, combined_PG, ["a", "b"])
    assert metrics["reward/rescued_groups"] == 0.25
    assert "reward/rescued_groups" not in reward_metrics(rewards_PGK[..., :1], first_PG, ["a"])


def test_reward_metrics_leave_nan_out() -> None:
    rewards_PG = torch.tensor([[1.0, 3.0], [NAN, 5.0], [2.0, 2.0]])
    metrics = {k: v.item() for k, v in reward_metrics(rewards_PG[..., None], rewards_PG, ["a"]).items()}
    assert metrics["reward/mean"] == pytest.approx(13 / 5)
    assert metrics["reward/std"] == pytest.approx(torch.tensor([1.0, 3, 5, 2, 2]).std().item())
    assert metrics["reward/within_group_std"] == pytest.approx((math.sqrt(2) + 0) / 2)
    assert metrics["reward/tied_pair_fraction"] == pytest.approx(1 / 2)
    assert metrics["reward/all_tied_group_fraction"] == pytest.approx(1 / 3)
    assert metrics["reward/nan_fraction"] == pytest.approx(1 / 6)
    assert metrics["reward/a/mean"] == metrics["reward/mean"]


def test_completion_metrics() -> None:
    metrics = completion_metrics(torch.tensor([1, 2, 6]), torch.tensor([False, False, True]))
    assert [round(v.item(), 3) for v in metrics.values()] == [3.0, 1.0, 6.0, 0.333]


def test_win_rate_compares_all_pairs_and_ties_count_half() -> None:
    policy = torch.tensor([[1.0, 2.0], [0.0, NAN], [NAN, NAN]])
    reference = torch.tensor([[0.0, 1.0, 3.0], [0.0, 1.0, NAN], [1.0, 1.0, 1.0]])
    rates_P = win_rate(policy, reference)
    assert rates_P[0].item() == pytest.approx((1 + 0.5 + 0 + 1 + 1 + 0) / 6)
    assert rates_P[1].item() == pytest.approx(0.25)
    assert rates_P[2].isnan()
    assert win_rate(reference[:1], reference[:1]).item() == 0.5
