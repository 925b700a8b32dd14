"""Scores of prefixes and BRPO's credit: by the paper's numbers, a loop, and in a run."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gopo_lightning.objectives.advantages import dr_grpo
from gopo_lightning.objectives.credit import brpo, budgets, get_credit, reward_to_go
from gopo_lightning.rewards import FunctionReward, SequenceClassifierReward
from gopo_lightning.rollout import PrefixScores
from gopo_lightning.rollout.prefixes import gains
from gopo_lightning.rollout.transforms import Context
from gopo_lightning.types import Experience
from tests.rollouts import experience_of, rollout_of, setting_of
from tests.runs import make_module
from tests.test_module import fit

NAN, INF = math.nan, math.inf
NOW = Context(0, 0)
X = [[0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]]


def scored(
    scores: Sequence[Sequence[float]], lengths: Sequence[int], rewards: Sequence[float] | None = None
) -> Experience:
    """One group, with budgets of equal parts of the longest."""
    experience = experience_of([rewards or [0.0] * len(lengths)], lengths)
    parts = budgets(len(scores[0]), max(lengths))
    cuts = [[min(b, length) for b in parts] for length in lengths]
    earned_NT = gains(torch.tensor(scores), cuts, max(lengths)).float()
    return replace(experience, token_rewards_NT=earned_NT.masked_fill(~experience.completions.mask_NT, NAN))


def by_a_loop(scores: Sequence[Sequence[float]], p: Sequence[float], valid: Sequence[bool]) -> list[list[float]]:
    """Adv[g, s] in Python floats."""
    S, rows = len(p), []
    for own in scores:
        row = []
        for s in range(S):
            to_go = [sum(x[q] * p[q] for q in range(s, S)) for x, ok in zip(scores, valid, strict=True) if ok]
            mine = sum(own[q] * p[q] for q in range(s, S))
            v1 = sum(2**q * own[q] for q in range(s)) / (2**s - 1) * sum(p[s:]) if s else 0.0
            row.append(mine - (s * v1 + (S - s) * sum(to_go) / len(to_go)) / S)
        rows.append(row)
    return rows


# --- the credit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prior", "expected"),
    [
        ("uniform", [[0.25, 0.375, 0.145833, 0.026786], [-0.25, -0.125, 0.0625, 0.1875]]),
        ("base", [[0, 0.25, 0.166667, 0.107143], [0, 0.25, 0.5, 0.75]]),
    ],
)
def test_golden_values(prior: Any, expected: list[list[float]]) -> None:
    advantages_NT = brpo(scored(X, [4, 4]), num_cuts=4, prior=prior)
    assert advantages_NT.dtype == torch.float32
    torch.testing.assert_close(advantages_NT, torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("prior", ["uniform", "linear", "base"])
def test_segments_of_ragged_completions_equal_a_loop(prior: Any) -> None:
    """Four budgets of 3, 5, 8 and 10 tokens; the third has no valid reward."""
    lengths, rewards = [10, 4, 7, 3], [1.0, 0.0, NAN, 0.0]
    scores = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).tolist()
    for row, length in zip(scores, lengths, strict=True):
        last = next(s for s, b in enumerate((3, 5, 8, 10)) if b >= length)
        row[last:] = [row[last]] * (4 - last)  # nothing changes after the end
    p = {"uniform": [0.25] * 4, "linear": [b / 26 for b in (3, 5, 8, 10)], "base": [0, 0, 0, 1]}[prior]
    rows = by_a_loop(scores, p, [True, True, False, True])
    expected_NT = torch.zeros(4, 10)
    for n, length in enumerate(lengths):
        for t in range(0 if n == 2 else length):
            expected_NT[n, t] = rows[n][[b > t for b in (3, 5, 8, 10)].index(True)]
    actual_NT = brpo(scored(scores, lengths, rewards), num_cuts=4, prior=prior)
    torch.testing.assert_close(actual_NT, expected_NT, rtol=0, atol=1e-5)


def test_one_budget_is_dr_grpo() -> None:
    x_PG = torch.tensor([[0.3, 1.0, -2.0, 0.5]])
    advantages_NT = brpo(scored([[x] for x in x_PG[0].tolist()], [5, 2, 5, 1]), num_cuts=1)
    mask_NT = torch.arange(5) < torch.tensor([[5], [2], [5], [1]])
    torch.testing.assert_close(advantages_NT, dr_grpo(x_PG).float().flatten()[:, None] * mask_NT)


def test_groups_do_not_mix_and_a_narrower_batch_is_the_same() -> None:
    """A group of short completions by itself has fewer columns than budgets."""
    x = [[0.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]]
    one = scored(x, [3, 2, 8, 8])
    both = replace(
        experience_of([[0.0, 0.0], [0.0, 0.0]], [3, 2, 8, 8]), token_rewards_NT=one.token_rewards_NT, max_new_tokens=8
    )
    whole_NT = brpo(both, num_cuts=4)
    for p in (0, 1):
        part = both.select(torch.tensor([p]))
        width = part.completions.mask_NT.shape[1]
        assert torch.equal(brpo(part, num_cuts=4), whole_NT[2 * p : 2 * p + 2, :width])


def test_what_the_credit_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="credit=brpo reads scores of prefixes.*Add the transform PrefixScores"):
        brpo(experience_of([[1.0, 2.0]]), num_cuts=1)
    with pytest.raises(ValueError, match="num_cuts=5 must lie between 1 and max_new_tokens=4"):
        brpo(scored(X, [4, 4]), num_cuts=5)
    with pytest.raises(ValueError, match="prior='late' is unknown"):
        brpo(scored(X, [4, 4]), num_cuts=4, prior="late")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="credit 'brpo' with init_args {}: missing a required argument: 'num_cuts'"):
        get_credit("brpo")


@pytest.mark.parametrize(
    ("cuts", "advantage", "message"),
    [
        ([4], "grpo", "objective.advantage=grpo has no effect: credit brpo"),
        ([3], "ordinal", r"credit brpo has num_cuts=4, and the transforms PrefixScores have \[3\]"),
        ([], "ordinal", r"PrefixScores have \[\]: it reads the scores of one of them, at the same cuts"),
        ([4, 4], "ordinal", r"PrefixScores have \[4, 4\]"),
    ],
)
def test_what_does_not_go_together_is_refused(cuts: list[int], advantage: str, message: str) -> None:
    transforms = [PrefixScores(FunctionReward(texts_so_far), num_cuts) for num_cuts in cuts]
    credit = {"function": "brpo", "init_args": {"num_cuts": 4}}
    with pytest.raises(ValueError, match=message):
        make_module(Path(), credit=credit, advantage=advantage, transforms=transforms)


# --- the transform ----------------------------------------------------------------------------------------------------


def tokens_so_far(completions: list[str], num_tokens: list[int], truncated: list[bool]) -> list[float | None]:
    """10 × tokens, and 1 more where the completion is whole; none of a prefix of 2 tokens of it."""
    return [None if n == 2 and cut else 10.0 * n + (not cut) for n, cut in zip(num_tokens, truncated, strict=True)]


def texts_so_far(completions: list[str]) -> list[float]:
    seen.append(completions)
    return [float(len(text)) for text in completions]


seen: list[list[str]] = []


def given(rollout: Any, function: Any, num_cuts: int) -> Any:
    transform = PrefixScores(FunctionReward(function), num_cuts)
    transform.set_up(setting_of(max_new_tokens=rollout.max_new_tokens))
    return transform(rollout, NOW), transform


def test_gains_stand_at_the_last_tokens() -> None:
    """Budgets 3, 6; one of 6 tokens, one of 5, one of 3 and one of 1."""
    shaped, transform = given(rollout_of([[0.0] * 4], [6, 5, 3, 1]), tokens_so_far, 2)
    expected = [[0, 0, 30, 0, 0, 31], [0, 0, 30, 0, 21, 0], [0, 0, 31, 0, 0, 0], [11, 0, 0, 0, 0, 0]]
    assert shaped.token_rewards_NT.tolist() == expected
    assert shaped.rewards_PG.tolist() == [[0.0] * 4]
    mean = transform.metrics()["prefix_score"]
    assert float(mean.sum / mean.count) == pytest.approx((30 + 61 + 30 + 51 + 31 + 31 + 11 + 11) / 8)


def test_a_prefix_without_a_score_leaves_no_valid_reward() -> None:
    """Budgets 2 and 4: the first is asked at 2 tokens of 4, the second is whole there."""
    shaped, _ = given(rollout_of([[1.0, 1.0]], [4, 2]), tokens_so_far, 2)
    assert math.isnan(shaped.rewards_PG[0, 0]) and shaped.rewards_PG[0, 1] == 1.0
    assert shaped.token_rewards_NT.tolist() == [[0.0] * 4, [0.0, 21.0, 0.0, 0.0]]


def test_prefixes_are_decoded_once_each_and_the_whole_is_its_own_text() -> None:
    rollout = rollout_of([[1.0, 1.0]], [4, 2], texts=["wholly", "end"])
    letters = torch.tensor([list(setting_of().tokenizer()("abcd")["input_ids"][-4:])] * 2)
    rollout = replace(rollout, completions=replace(rollout.completions, tokens_NT=letters))
    seen.clear()
    shaped, _ = given(rollout, texts_so_far, 4)
    assert seen == [["a", "ab", "abc", "wholly", "a", "end"]]
    assert shaped.token_rewards_NT.tolist() == [[1, 1, 1, 3], [1, 2, 0, 0]]


def test_other_token_rewards_are_kept() -> None:
    rollout = rollout_of([[1.0, 1.0]], [1, 1], token_rewards_NT=torch.tensor([[0.5], [-0.5]]))
    assert given(rollout, tokens_so_far, 1)[0].token_rewards_NT.tolist() == [[11.5], [10.5]]


def test_what_the_transform_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="source='rm' of PrefixScores holds a model"):
        PrefixScores(SequenceClassifierReward("nowhere", name="rm"))
    source = FunctionReward(texts_so_far)
    with pytest.raises(ValueError, match="num_cuts=25 must lie between 1 and max_new_tokens=24"):
        make_module(Path(), transforms=[PrefixScores(source, 25)])
    with pytest.raises(ValueError, match="gave infinite scores, of which there are no differences"):
        given(rollout_of([[1.0, 1.0]]), lambda completions: [INF] * len(completions), 1)


def test_in_a_run_segments_are_credited(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    """From the tokens alone: prefixes decoded one by one, scored, and the formula in Python."""
    vowels = FunctionReward("tests.runs.count_vowels")
    module = make_module(
        tiny_policy,
        transforms=[PrefixScores(vowels, 3)],
        credit={"function": "brpo", "init_args": {"num_cuts": 3}},
    )
    keep = fit(module, prompts_file, tmp_path, max_steps=1, limit_val_batches=0)
    (experience,) = keep.experiences
    completions, expected_NT = experience.completions, torch.zeros_like(experience.advantages_NT)
    for p in range(len(experience)):
        scores = []
        for n in range(4 * p, 4 * p + 4):
            tokens = completions.tokens_NT[n, completions.mask_NT[n]]
            texts = [module.tokenizer.decode(tokens[:b], skip_special_tokens=True) for b in (8, 16, 24)]
            scores.append([float(sum(character in "aeiou" for character in text)) for text in texts])
        rows = by_a_loop(scores, [1 / 3] * 3, [True] * 4)
        for g, n in enumerate(range(4 * p, 4 * p + 4)):
            for t in range(int(completions.lengths_N[n])):
                expected_NT[n, t] = rows[g][t // 8]
    assert expected_NT.any()
    torch.testing.assert_close(experience.advantages_NT, expected_NT, rtol=0, atol=1e-5)
    assert isinstance(reward_to_go(experience), Tensor) and not torch.equal(reward_to_go(experience), expected_NT)
