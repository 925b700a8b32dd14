"""A bonus for a behaviour that helps: by the paper's rule, where nothing is known, and the sign it follows."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gopo_lightning.rewards import FunctionReward
from gopo_lightning.rollout import ConditionalBonus
from gopo_lightning.rollout.conditional import helps
from gopo_lightning.rollout.transforms import Context
from gopo_lightning.types import Rollout
from tests.rollouts import rollout_of, setting_of
from tests.runs import count_vowels, make_module
from tests.test_module import fit

NAN, INF = math.nan, math.inf
NOW = Context(0, 0)
CORRECT = [1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
MARKED = [1, 1, 1, 0, 0, 0, 0, 1]
"""3/4 of the marked are correct, 1/4 of the others."""


def marked(rewards: list[float], flags: list[int] = MARKED, **fields: Any) -> Rollout:
    texts = ["so we Draw a line" if flag else "no line" for flag in flags]
    return rollout_of([rewards], texts=texts, **fields)


def after(rollout: Rollout, **options: Any) -> list[float]:
    bonus = ConditionalBonus("[Dd]raw", **options)
    bonus.set_up(setting_of(FunctionReward(count_vowels, name="vowels")))
    return bonus(rollout, NOW).rewards_PG[0].tolist()  # type: ignore[no-any-return]


def says_draw(text: str) -> bool:
    return "draw" in text.lower()


def counts_draw(text: str) -> int:
    return text.lower().count("draw")


def test_the_bonus_by_hand() -> None:
    assert after(marked(CORRECT)) == [1.5, 1.5, 0.5, 1.0, 0.0, 0.0, 0.0, 1.5]


def test_where_it_hurts_it_is_taken_off() -> None:
    wrong = [1 - reward for reward in CORRECT]
    assert after(marked(wrong), weight=0.25) == [-0.25, -0.25, 0.75, 0.0, 1.0, 1.0, 1.0, -0.25]


@pytest.mark.parametrize(
    ("rewards", "flags", "epsilon", "expected"),
    [
        (CORRECT, MARKED, 0.49, 1),
        (CORRECT, MARKED, 0.5, 0),  # a difference of just ε does not count
        ([1 - reward for reward in CORRECT], MARKED, 0.49, -1),
        ([1 - reward for reward in CORRECT], MARKED, 0.5, 0),
        (CORRECT, [1] * 8, 0.1, 0),
        (CORRECT, [0] * 8, 0.1, 0),
        (CORRECT, [1] * 8, -INF, 0),
        ([0.0] * 8, MARKED, 0.1, 0),
        ([0.0] * 8, MARKED, -INF, 1),
        ([NAN] * 8, MARKED, 0.1, 0),
        ([NAN, NAN, 0.0, NAN, 1.0, NAN, NAN, NAN], MARKED, 0.1, -1),
        ([NAN, NAN, 1.0, NAN, NAN, NAN, NAN, NAN], MARKED, 0.1, 0),
    ],
)
def test_the_sign(rewards: list[float], flags: list[int], epsilon: float, expected: int) -> None:
    sign_P = helps(torch.tensor([rewards]).double(), torch.tensor([flags]).bool(), epsilon)
    assert sign_P.tolist() == [expected]


def test_the_sign_follows_what_helps_and_groups_do_not_mix() -> None:
    """Swapping right and wrong, or marked and unmarked, turns it; other groups do not enter."""
    generator = torch.Generator().manual_seed(0)
    correct_PG, marked_PG = (torch.rand(200, 6, generator=generator) < 0.5 for _ in range(2))
    sign_P = helps(correct_PG.double(), marked_PG, 0.2)
    assert {-1.0, 0.0, 1.0} == set(sign_P.tolist())
    assert torch.equal(helps(1 - correct_PG.double(), marked_PG, 0.2), -sign_P)
    assert torch.equal(helps(correct_PG.double(), ~marked_PG, 0.2), -sign_P)
    assert torch.equal(helps(correct_PG[7:9].double(), marked_PG[7:9], 0.2), sign_P[7:9])


def test_what_is_not_known_enters_neither_share_and_stays_without_a_reward() -> None:
    """Without the second and third the marked have 1 of 2, with ε = ¼ no longer more than the ¼ of the others."""
    rewards = [1.0, NAN, 0.0, 1.0, 0.0, 0.0, 0.0, NAN]
    assert after(marked(rewards), epsilon=0.25)[2] == 0.0
    assert [math.isnan(reward) for reward in after(marked(rewards))] == [math.isnan(reward) for reward in rewards]
    dropped = replace(marked(CORRECT), weights_PG=torch.tensor([[0.0, 0, 1, 1, 1, 1, 1, 0]]))
    assert after(dropped) == [0.5, 0.5, -0.5, 1.0, 0.0, 0.0, 0.0, 0.5]  # 0 of 1 against 1 of 4


def test_another_source_says_what_is_correct() -> None:
    """The combined reward is a style; the source has 0.3 or more where it is correct."""
    rollout = marked([5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0])
    scores_PG1 = torch.tensor([[[0.3, 0.4, 0.2, 0.9, 0.0, 0.1, 0.29, 1.0]]]).double().transpose(1, 2)
    rollout = replace(rollout, rewards_PGK=scores_PG1)
    assert after(rollout, source="vowels", tau=0.3, epsilon=0.4) == [5.5, 6.5, 7.5, 8.0, 9.0, 10.0, 11.0, 12.5]
    assert after(rollout, tau=8.0) == [4.5, 5.5, 6.5, 8.0, 9.0, 10.0, 11.0, 11.5]


@pytest.mark.parametrize("function", [says_draw, "tests.test_conditional_bonus.says_draw"])
def test_a_function_may_mark(function: Any) -> None:
    assert ConditionalBonus(function=function)(marked(CORRECT), NOW).rewards_PG[0].tolist() == after(marked(CORRECT))


def test_what_was_seen_is_measured() -> None:
    bonus = ConditionalBonus("Draw")
    texts = ["Draw", "", "Draw", "", "Draw", ""]
    bonus(rollout_of([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], texts=texts), NOW)
    means = {name: float(mean.sum / mean.count) for name, mean in bonus.metrics().items()}
    assert means == pytest.approx(
        {"marked_fraction": 1 / 2, "marker_helps_fraction": 2 / 3, "marker_hurts_fraction": 1 / 3}
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "pattern=None and function=None of ConditionalBonus: give one of them"),
        ({"pattern": "a", "function": says_draw}, "give one of them, and not both"),
        ({"pattern": "(a"}, r"pattern='\(a' of ConditionalBonus is no regular expression: .*Correct it"),
        ({"function": "draw"}, "'draw' is no dotted path"),
        ({"pattern": "a", "weight": 0.0}, "weight=0.0 of ConditionalBonus must be above 0"),
        ({"pattern": "a", "epsilon": 1.0}, "epsilon=1.0 of ConditionalBonus must be below 1"),
        ({"pattern": "a", "epsilon": NAN}, "epsilon=nan of ConditionalBonus must be below 1"),
        ({"pattern": "a", "tau": INF}, "tau=inf of ConditionalBonus must be finite"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConditionalBonus(**options)


def test_a_source_that_is_not_there_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(
        ValueError, match=r"source='maths' of ConditionalBonus is none of the reward sources \['vowels'"
    ):
        make_module(Path(), transforms=[ConditionalBonus("a", source="maths")])


def test_a_marker_says_yes_or_no() -> None:
    with pytest.raises(ValueError, match="the marker of ConditionalBonus returned 1 for the text 'so we Draw"):
        ConditionalBonus(function=counts_draw)(marked(CORRECT), NOW)


def test_the_bonus_in_a_run(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    """On a random policy's bytes; the accuracy is the source's, by its name."""
    bonus = ConditionalBonus("e", weight=0.25, source="vowels", tau=0.5, epsilon=0.0)
    keep = fit(make_module(tiny_policy, transforms=[bonus]), prompts_file, tmp_path, max_steps=1, limit_val_batches=0)
    (experience,) = keep.experiences
    raw_PG = experience.rewards_PGK[..., 0]
    expected_PG = raw_PG.clone()
    groups = zip(raw_PG.tolist(), experience.completions.groups(4), strict=True)
    for p, (rewards, texts) in enumerate(groups):
        sides: list[list[bool]] = [[], []]
        for reward, text in zip(rewards, texts, strict=True):
            sides["e" in text].append(reward >= 0.5)
        if all(sides):
            without, having = (sum(side) / len(side) for side in sides)
            sign = (having > without) - (having < without)
            expected_PG[p] += 0.25 * sign * torch.tensor(["e" in text for text in texts])
    assert not torch.equal(expected_PG, raw_PG)
    assert torch.equal(experience.rewards_PG, expected_PG)
