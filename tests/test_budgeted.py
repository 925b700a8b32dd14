"""Comparisons on a budget: which pairs are asked, what is inferred of the others, and what a run does with it."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.optimize import minimize

from gopo_lightning.objectives.advantages import ordinal, ordinal_from_wins, valid_from_wins
from gopo_lightning.objectives.strengths import expected_change, posterior, surely_better
from gopo_lightning.rewards import (
    BudgetedComparisons,
    FunctionComparator,
    RankingOracle,
    SourceConfigError,
    score_groups,
)
from scripts.benchmark_comparisons import draw
from scripts.benchmark_comparisons import main as benchmark
from tests.runs import make_module
from tests.test_module import fit, scalars
from tests.test_pairwise import longer
from tests.test_rewards import prompt

NAN = math.nan


def answers(G: int, known: dict[tuple[int, int], float]) -> torch.Tensor:
    wins_GG = torch.full((G, G), NAN, dtype=torch.float64)
    for (i, j), win in known.items():
        wins_GG[i, j], wins_GG[j, i] = win, 1 - win
    return wins_GG


# --- strengths -------------------------------------------------------------------------------------------------------


def test_the_mean_is_the_mode_that_scipy_finds() -> None:
    known = {(0, 1): 1.0, (1, 2): 1.0, (0, 3): 0.25, (2, 4): 0.5, (3, 4): 1.0}

    def loss(theta: Any) -> float:
        t = torch.as_tensor(theta)
        fit = sum(
            w * torch.nn.functional.softplus(t[j] - t[i]) + (1 - w) * torch.nn.functional.softplus(t[i] - t[j])
            for (i, j), w in known.items()
        )
        return float(fit + (t**2).sum() / 2 / 1.5**2)

    theta_G, covariance_GG = posterior(answers(6, known), 1.5)
    assert theta_G.tolist() == pytest.approx(minimize(loss, [0.0] * 6, tol=1e-10).x.tolist(), abs=1e-4)
    hessian = torch.func.hessian(
        lambda t: (
            sum(torch.nn.functional.softplus(t[j] - t[i]) + (1 - w) * (t[i] - t[j]) for (i, j), w in known.items())
            + (t**2).sum() / 2 / 1.5**2
        )
    )(theta_G)
    torch.testing.assert_close(covariance_GG, torch.linalg.inv(hessian))
    assert theta_G[5] == 0 and covariance_GG[5, 5] == pytest.approx(1.5**2)


def test_without_answers_nobody_is_better() -> None:
    theta_G, covariance_GG = posterior(answers(4, {}), 2.0)
    assert theta_G.tolist() == [0.0] * 4
    assert surely_better(theta_G, covariance_GG).flatten().tolist() == [0.5] * 16


def test_order_is_transitive_and_the_answers_decide_how_surely() -> None:
    one = surely_better(*posterior(answers(3, {(0, 1): 1.0, (1, 2): 1.0}), 1.5))
    assert one[0, 2] > one[0, 1] > 0.6 and one[0, 1] == pytest.approx(one[1, 2])
    torch.testing.assert_close(one + one.T, torch.ones(3, 3).double())
    tied = surely_better(*posterior(answers(3, {(0, 1): 0.5, (1, 2): 1.0}), 1.5))
    assert tied[0, 1] < one[0, 1]


def test_the_expected_change_is_what_a_new_posterior_would_say() -> None:
    """One Newton step against the whole fit, for an answer that hardly moves it; and against pairs of no interest."""
    known = {(0, 1): 1.0, (1, 2): 1.0, (2, 3): 1.0}
    before = posterior(answers(4, known), 0.3)  # a strong prior: the step is nearly exact
    pair = torch.tensor([[0, 3]])

    def advantages(theta: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
        return 2 * (2 * surely_better(theta, covariance) - 1).sum(-1) / 3

    changes = [
        (advantages(*posterior(answers(4, {**known, (0, 3): win}), 0.3)) - advantages(*before)).abs().sum()
        for win in (1.0, 0.0)
    ]
    margin, variance = (before[0][0] - before[0][3]).item(), 2 * 0.3**2
    p = 1 / (1 + math.exp(-margin / math.sqrt(1 + math.pi * variance / 8)))
    expected = p * changes[0] + (1 - p) * changes[1]
    assert expected_change(*before, pair).item() == pytest.approx(expected.item(), rel=0.03)


def test_what_is_implied_already_is_asked_last() -> None:
    """In a chain of answers nothing is surer than how its ends compare."""
    state = posterior(answers(5, {(n, n + 1): 1.0 for n in range(4)}), 3.0)
    changes = expected_change(*state, torch.tensor([[0, 4], [0, 2], [0, 3], [1, 3], [1, 4], [2, 4]]))
    assert changes[0] < 0.95 * changes[1:].min()
    known = expected_change(*posterior(answers(5, {(0, 1): 1.0}), 3.0), torch.tensor([[0, 1], [2, 3]]))
    assert known[0] < known[1]


# --- the source ------------------------------------------------------------------------------------------------------


class Asked(FunctionComparator):
    """Longer is better; keeps what it was asked, round by round."""

    def __init__(self, function: Any = longer, **options: Any) -> None:
        super().__init__(function, name="judge", **options)
        self.rounds: list[list[tuple[str, str]]] = []

    def compare(self, prompts: Any, firsts: Sequence[str], seconds: Sequence[str]) -> Any:
        self.rounds.append([(str(a), str(b)) for a, b in zip(firsts, seconds, strict=True)])
        return super().compare(prompts, firsts, seconds)


GROUP = ["a" * n for n in (3, 7, 1, 8, 5, 2, 6, 4)]
RANKS = ordinal(torch.tensor([[float(len(text)) for text in GROUP]]))[0]


def wins(source: BudgetedComparisons, groups: Sequence[Sequence[str]]) -> torch.Tensor:
    matrices = score_groups([source], [prompt("p", n) for n in range(len(groups))], groups).wins_PGGK
    assert matrices is not None
    return matrices[..., 0]


def test_the_whole_budget_gives_the_whole_matrix() -> None:
    judge = Asked()
    found = wins(BudgetedComparisons(judge, 28), [GROUP])
    assert sum(map(len, judge.rounds)) == 28
    torch.testing.assert_close(ordinal_from_wins(found)[0], RANKS)


def test_a_budget_holds_for_each_group_and_rounds_are_shared() -> None:
    judge = Asked()
    source = BudgetedComparisons(judge, 10)
    found = wins(source, [GROUP, [*GROUP[:7], "b"]])
    assert [len(asked) for asked in judge.rounds] == [8, 8, 4] and source.counters() == {"asked_pairs": 20}
    for asked in judge.rounds:
        for p in (0, 1):  # in a round nobody is asked about twice
            texts = [text for pair in asked[p * len(asked) // 2 : (p + 1) * len(asked) // 2] for text in pair]
            assert len(texts) == len(set(texts))
    assert not found.isnan().any() and valid_from_wins(found).all()
    one = Asked()
    wins(BudgetedComparisons(one, 3, per_round=1), [GROUP])
    assert [len(asked) for asked in one.rounds] == [1, 1, 1]


def test_it_finds_more_of_the_order_than_a_round_robin_of_as_many() -> None:
    """A judge without noise; 40 orders."""
    errors: dict[str, float] = {"budget": 0.0, "round": 0.0}
    for seed in range(40):
        order = torch.randperm(8, generator=torch.Generator().manual_seed(seed)) + 1
        group = ["a" * int(n) for n in order]
        ranks = ordinal(order[None].double())[0]
        for name, source in (
            ("budget", BudgetedComparisons(FunctionComparator(longer), 12)),
            ("round", FunctionComparator(longer, num_opponents=3)),
        ):
            matrices = score_groups([source], [prompt("p")], [group]).wins_PGGK
            assert matrices is not None
            errors[name] += (ordinal_from_wins(matrices[..., 0])[0] - ranks).abs().mean().item() / 40
    assert errors["budget"] < 0.8 * errors["round"]


def test_it_stops_when_the_order_is_settled() -> None:
    judge = Asked()
    wins(BudgetedComparisons(judge, 28, settled=0.6), [GROUP])
    spent = sum(map(len, judge.rounds))
    assert 8 <= spent < 28
    everything = Asked()
    wins(BudgetedComparisons(everything, 28, settled=100.0), [GROUP])
    assert everything.rounds == []


def test_copies_of_a_text_are_asked_about_once_and_tie() -> None:
    judge = Asked()
    found = wins(BudgetedComparisons(judge, 9), [["aa", "b", "aa", "cccc"]])[0]
    assert sum(map(len, judge.rounds)) == 3
    assert found[0].tolist() == [0.5, 1.0, 0.5, 0.0] and found[2].tolist() == [0.5, 1.0, 0.5, 0.0]
    assert wins(BudgetedComparisons(Asked(), 9), [["a", "a"]])[0].tolist() == [[0.5, 0.5], [0.5, 0.5]]


def silent_on_b(first: list[str], second: list[str]) -> list[float | None]:
    return [None if "b" in a + b else win for a, b, win in zip(first, second, longer(first, second), strict=True)]


def test_an_abstention_is_not_asked_again_and_nobody_is_ranked_without_an_answer() -> None:
    judge = Asked(silent_on_b)
    found = wins(BudgetedComparisons(judge, 28), [["a", "aa", "b", "aaa"]])
    assert sum(map(len, judge.rounds)) == 6
    assert valid_from_wins(found)[0].tolist() == [True, True, False, True]
    assert ordinal_from_wins(found)[0].tolist() == [-2, 0, 0, 2]


def first_wins(first: list[str], second: list[str]) -> list[float]:
    return [1.0] * len(first)


def test_both_orders_are_one_pair_of_the_budget() -> None:
    judge = Asked(first_wins, both_orders=True)
    found = wins(BudgetedComparisons(judge, 2), [["a", "b", "c"]])
    assert sum(map(len, judge.rounds)) == 4 and found.flatten().tolist() == pytest.approx([0.5] * 9)


def test_the_order_of_completions_does_not_matter_where_all_is_asked() -> None:
    back = wins(BudgetedComparisons(Asked(), 28), [GROUP[::-1]])[0].flip(0, 1)
    torch.testing.assert_close(back, wins(BudgetedComparisons(Asked(), 28), [GROUP])[0])


def test_what_cannot_act_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="num_opponents=3 of the comparator has no effect"):
        BudgetedComparisons(FunctionComparator(longer, num_opponents=3), 12)
    with pytest.raises(ValueError, match="RankingOracle orders whole groups"):
        BudgetedComparisons(RankingOracle(lambda completions: [0]), 12)  # type: ignore[arg-type]
    for options in ({"budget": 0}, {"settled": -1.0}, {"per_round": 0}, {"spread": 0.0}):
        with pytest.raises(ValueError, match=rf"{next(iter(options))}={next(iter(options.values()))}\b"):
            BudgetedComparisons(Asked(), **{"budget": 12, **options})
    source = BudgetedComparisons(Asked(), 12)
    monkeypatch.setattr(source, "models", lambda: [torch.nn.Linear(1, 1)])
    monkeypatch.setattr("gopo_lightning.rewards.budgeted.is_sharded", lambda model: True)
    with pytest.raises(SourceConfigError, match="its model is sharded.*replicate"):
        source([prompt("p")], [["a", "b"]])


def test_a_run_on_a_budget_trains_and_logs_what_it_asked(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    source = BudgetedComparisons(FunctionComparator("tests.test_pairwise.longer"), 3)
    fit(make_module(tiny_policy, rewards=[source]), prompts_file, tmp_path)
    asked = scalars(tmp_path, "reward/longer/asked_pairs")
    assert 4 <= asked[0] <= 12 and asked[0] < asked[1] <= 24
    assert scalars(tmp_path, "val/win_rate")[0] == 0.5
    assert all(value > 0 for value in scalars(tmp_path, "train/grad_norm"))


# --- the benchmark ---------------------------------------------------------------------------------------------------


def test_the_benchmark_compares_both_on_the_same_answers(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    rows = benchmark(["--groups", "4", "--size", "4", "--noise", "inf", "1.0", "--output", str(tmp_path / "rows.json")])
    assert [(row["k"], row["pairs"]) for row in rows] == [(k, n) for k in (math.inf, 1.0) for n in (2, 4, 6)]
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    assert capsys.readouterr().out.count("\n| inf | ") == 3
    for row in rows:
        means = [row[name]["mean"] for name in ("budgeted", "round_robin", "difference")]
        assert means[0] - means[1] == pytest.approx(means[2])
        if row["pairs"] == 6:  # all of them: the judge's own answers, by either way
            assert means[2] == 0 and (means[0] == 0) == math.isinf(row["k"])
        else:
            assert means[0] > 0 and means[1] > 0
    truth_PG, tables_PGG = draw(200, 4, 1.0, 0)
    torch.testing.assert_close(tables_PGG + tables_PGG.mT, 1 - torch.eye(4, dtype=torch.float64).expand(200, 4, 4))
    right = (tables_PGG.sum(-1) - 1.5) * truth_PG  # better ones win more, and not always
    assert 0.5 < (right > 0).double().mean() < 0.95
