"""Rewards by comparison with an anchor: values, missing anchors, equal texts, and a run."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gopo_lightning.objectives.advantages import ordinal
from gopo_lightning.rewards import (
    AnchorReward,
    FunctionComparator,
    PairwiseSource,
    RankingOracle,
    SourceConfigError,
    score,
    score_groups,
)
from gopo_lightning.rewards.pairwise import Groups
from gopo_lightning.types import Prompt
from tests.runs import make_module
from tests.test_module import fit, scalars
from tests.test_rewards import prompt

NAN = math.nan
ROW = prompt("q", anchor="an anchor")


def by_letter(first: list[str], second: list[str]) -> list[float | None]:
    """.7 where the completion is first, .4 where the anchor is; of "?" nothing is known."""
    return [None if "?" in a + b else 0.4 if a.startswith("an ") else 0.7 for a, b in zip(first, second, strict=True)]


def anchored(**options: Any) -> AnchorReward:
    return AnchorReward(FunctionComparator(by_letter, both_orders=True), **options)


def test_both_orders_make_the_score() -> None:
    """Golden: answers .7 and .4."""
    assert score([anchored()], [ROW], ["y"]).tolist() == [[pytest.approx(0.65)]]
    assert score([anchored(scale="logit")], [ROW], ["y"]).tolist() == [[pytest.approx(0.619039, abs=1e-6)]]


@pytest.mark.parametrize("scale", ["probability", "logit"])
def test_who_has_no_anchor_or_answer_has_no_score_and_the_anchor_itself_ties(scale: Any) -> None:
    rows = [ROW, prompt("q", 1, anchor=None), prompt("q", 2), ROW, ROW, prompt("q", 3, anchor=" ")]
    scores = anchored(scale=scale)(rows, ["y", "y", "y", "?", "an anchor", "y"]).tolist()
    assert [math.isnan(s) for s in scores] == [False, True, True, True, False, True]
    assert scores[4] == (0.5 if scale == "probability" else 0.0)


def certain(first: list[str], second: list[str]) -> list[float]:
    return [float(a < b) for a, b in zip(first, second, strict=True)]


def test_a_certain_judge_gives_no_infinite_logit() -> None:
    source = AnchorReward(FunctionComparator(certain), scale="logit")
    assert source([ROW, ROW], ["aa", "zz"]).tolist() == [6.0, -6.0]


def graded(first: list[str], second: list[str]) -> list[float]:
    """Depends on both texts, and on their order."""
    return [((sum(a.encode()) * 7 + sum(b.encode()) * 3) % 101) / 101 for a, b in zip(first, second, strict=True)]


@pytest.mark.parametrize("both_orders", [False, True])
def test_swapping_completion_and_anchor_turns_the_score_round(both_orders: bool) -> None:
    source = AnchorReward(FunctionComparator(graded, both_orders=both_orders))
    texts = ["a", "bb", "c d", "eeee"]
    for y in texts:
        for a in texts:
            one, other = (source([prompt("q", anchor=x)], [z]).item() for x, z in ((a, y), (y, a)))
            assert one == pytest.approx(1 - other, abs=1e-15)


def around(first: list[str], second: list[str]) -> list[float]:
    """Rock, paper, scissors."""
    order = {"r": "s", "s": "p", "p": "r"}
    return [float(order[a] == b) if a != b else 0.5 for a, b in zip(first, second, strict=True)]


def test_a_judge_that_goes_in_circles_still_orders_by_the_anchor() -> None:
    scores = score_groups([AnchorReward(FunctionComparator(around))], [prompt("q", anchor="r")], [["r", "p", "s"]])
    assert scores.rewards_PGK[0, :, 0].tolist() == [0.5, 1.0, 0.0] and scores.wins_PGGK is None
    assert ordinal(scores.rewards_PGK[..., 0])[0].tolist() == [0, 2, -2]


class Silent(PairwiseSource):
    """Answers nothing, and shows what it was asked."""

    name = "silent"

    def __init__(self) -> None:
        self.groups: list[list[str]] = []

    def __call__(self, prompts: Sequence[Prompt], groups: Groups) -> Tensor:
        self.groups += [list(map(str, group)) for group in groups]
        return torch.full((len(groups), len(groups[0]), len(groups[0])), NAN)

    def counters(self) -> dict[str, int]:
        return {"asked": len(self.groups)}


def test_any_pairwise_source_compares_each_with_the_anchor_alone() -> None:
    silent = Silent()
    source = AnchorReward(silent)
    scores = source([ROW, ROW], ["an anchor", "b"])
    assert silent.groups == [["an anchor", "an anchor"], ["b", "an anchor"]] and source.counters() == {"asked": 2}
    assert scores[0] == 0.5 and scores[1].isnan()
    shortest = RankingOracle(lambda completions: sorted(range(len(completions)), key=lambda i: len(completions[i])))
    assert AnchorReward(shortest)([ROW, ROW], ["b", "b" * 20]).tolist() == [1.0, 0.0]


def reads_ends(first: list[str], second: list[str], first_truncated: list[bool]) -> list[float]:
    return [0.5] * len(first)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match=r"scale='odds' is unknown; choose one of \['probability', 'logit'\]"):
        anchored(scale="odds")
    with pytest.raises(ValueError, match="'reads_ends': its comparator reads how texts ended"):
        AnchorReward(FunctionComparator(reads_ends))
    waiting = Silent()
    waiting.waits_for_people = True
    with pytest.raises(ValueError, match="'silent': its comparator asks people"):
        AnchorReward(waiting)
    with pytest.raises(SourceConfigError, match=r"column 'gold', but row 0 .* only \['anchor'\]\. Set `anchor`"):
        score([anchored(anchor="gold")], [ROW], ["y"])
    with pytest.raises(SourceConfigError, match=r"column 'anchor' of row 0 .* is \['y'\], and an anchor is a text"):
        score([anchored()], [prompt("q", anchor=["y"])], ["y"])


def test_a_run_learns_from_anchors_and_logs_what_the_comparator_counts(
    tiny_policy: Path, prompts_file: Path, tmp_path: Path
) -> None:
    source = AnchorReward(Counting(graded), anchor="letter", name="anchored")
    fit(make_module(tiny_policy, rewards=[source]), prompts_file, tmp_path)
    assert scalars(tmp_path, "reward/anchored/calls") == [1, 2]
    assert all(value > 0 for value in scalars(tmp_path, "train/grad_norm"))


class Counting(FunctionComparator):
    """Counts its calls in training."""

    calls = 0

    def compare(self, *args: Any) -> Any:
        self.calls += len(args[1]) > 10  # the batches of validation are smaller
        return super().compare(*args)

    def counters(self) -> dict[str, int]:
        return {"calls": self.calls}
