"""The use lab finds what it looks for: its rows cover the options, and each check fails on what it is there for."""

import json
import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from tests.use import commands, invariants, options, policies
from tests.use.reading import curves, differences, json_problems


def test_any_two_values_of_two_options_meet_if_they_may() -> None:
    found = options.rows(5)
    assert found == options.rows(5) and found != options.rows(6)
    assert all(options.valid(row) for row in found)
    met = set().union(*(options.pairs(row) for row in found))
    for (one, values), (other, others) in combinations(options.OPTIONS.items(), 2):
        for value in values:
            for second in others:
                may = options.valid({one: value, other: second})
                assert may == (frozenset([(one, value), (other, second)]) in met), (one, value, other, second)


def test_a_pretrained_policy_is_trained_whole_and_by_an_adapter() -> None:
    rows = options.real_rows(options.rows(5))
    assert [(row["policy"], row["lora"]) for row in rows] == [(policies.REAL, False), (policies.REAL, True)]


def test_completions_end_by_themselves_sooner_or_later() -> None:
    model = policies.build("llama")
    tokens_NT = torch.randint(32, 127, (64, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ends_NT = model(tokens_NT).logits.softmax(-1)[..., model.config.eos_token_id]
    assert ends_NT.mean() == pytest.approx(policies.END, rel=0.5)
    assert ends_NT.min() < 0.01 and ends_NT.max() > 0.5


@pytest.mark.parametrize("cold", [False, True])
def test_a_command_answers(cold: bool, tmp_path: Path) -> None:
    helped = commands.run(["--help"], tmp_path, cold=cold)
    assert helped.code == 0 and "fit" in helped.text and helped.line == "python -m gopo_lightning --help"


def test_the_words_are_those_of_the_last_command(tmp_path: Path) -> None:
    helped = commands.run(["--help"], tmp_path, cold=True)
    wrong = commands.run(["fit", "--config", "absent.yaml"], tmp_path, cold=True)
    assert wrong.code == 2 and "absent.yaml" in wrong.last_words and helped.text not in wrong.text


@pytest.mark.parametrize(
    ("printed", "words"),
    [
        ("step 1\n\nerror: old names:\n  a is now b\n", "error: old names:\n  a is now b"),
        ("error: one\nrank 1: error: other\n", "rank 1: error: other"),
        ("Traceback …\nKeyError: 1\n\nreport it\n\n", "report it"),
        ("", ""),
    ],
)
def test_the_last_words_are_the_last_error(printed: str, words: str) -> None:
    ended = commands.Ended((), 2, printed, 0.0)
    assert ended.last_words == words and ended.is_refused == ("error" in words)


def test_what_is_no_refusal() -> None:
    good = commands.Ended((), 2, "error: a", 0.0)
    bad = [
        replace(good, code=1),
        replace(good, text="error: a" + "\n b" * 10),
        replace(good, text="Traceback\nerror: a"),
    ]
    assert good.is_refused and not any(ended.is_refused for ended in bad)


def test_a_command_without_end_is_killed(tmp_path: Path) -> None:
    assert commands.run(["fit", "--help"], tmp_path, cold=True, limit_seconds=0.1).code is None


@pytest.mark.parametrize(("spread", "steps"), [([0.5, 0.1], [0, 2, 4]), ([0.5, 0.0], [0, 2]), ([0.0, 0.5], [0])])
def test_ranks_are_compared_up_to_a_rollout_that_ties(spread: list[float], steps: list[int]) -> None:
    curves = {"reward/within_group_std": dict(zip([2, 4], spread, strict=True))}
    assert invariants.steps_with_a_gradient(curves, [0, 2, 4]) == steps


def test_curves_are_read_from_either_logger(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path / "events")) as writer:
        writer.add_scalar("train/loss", 0.5, 3)
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "metrics.csv").write_text("step,train/loss,val/reward\n3,0.5,\n3,,nan\n")
    assert curves(tmp_path / "events") == {"train/loss": {3: 0.5}}
    table = curves(tmp_path / "table")
    assert table["train/loss"] == {3: 0.5} and math.isnan(table["val/reward"][3])


@pytest.mark.parametrize(
    ("mine", "other", "tolerance", "count"),
    [
        ({"a": 1.0, "b": math.nan}, {"a": 1.0, "b": math.nan}, 0.0, 0),
        ({"a": 1.0}, {"a": 1.0 + 1e-15}, 0.0, 1),
        ({"a": 1.0}, {"a": 1.00005}, 1e-4, 0),
        ({"a": 100.0}, {"a": 100.005}, 1e-4, 0),
        ({"a": 1.0}, {"a": math.nan}, 1e-4, 1),
        ({"a": math.inf}, {"a": math.inf}, 0.0, 0),
        ({"a": 1.0}, {"b": 1.0}, 1.0, 2),
        ({"a": torch.zeros(2)}, {"a": torch.zeros(3)}, 1.0, 1),
        ({"a": torch.zeros(2)}, {"a": torch.tensor([0.0, 1e-9])}, 0.0, 1),
    ],
)
def test_differences(mine: dict, other: dict, tolerance: float, count: int) -> None:
    assert len(differences(mine, other, tolerance)) == count


def test_what_is_no_json_is_found_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "good.jsonl").write_text(json.dumps({"a": "\u2028"}, ensure_ascii=False) + "\n")
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{"a": -Infinity}\n')
    (tmp_path / "torn.json").write_text('{"a": ')
    found = json_problems(tmp_path)
    assert len(found) == 2 and found[0].startswith("bad.jsonl, line 2") and found[1].startswith("torn.json")


def test_values_that_are_missing_or_not_finite_are_found() -> None:
    values = {"train/loss": {2: 0.0, 4: math.nan, 6: 0.0, 8: 0.0}, "reward/a/std": {2: math.nan}}
    assert invariants.finite(values, infinite_rewards=False) == ["train/loss is nan at step 4"]
    assert invariants.finite({"val/reward": {0: math.inf}}, infinite_rewards=True) == []
    found = invariants.logged(values, rollouts=4, updates=2)
    assert [line.split()[0] for line in found] == ["reward/mean", "val/win_rate"]


def test_the_untrained_policy_wins_exactly_half() -> None:
    assert invariants.untrained_ties({"val/win_rate": {0: 0.5, 2: 0.7}}) == []
    assert len(invariants.untrained_ties({"val/win_rate": {0: 0.50001}})) == 1


def test_times_and_shares_of_ranks_may_differ() -> None:
    mine = {"seconds/train": {1: 1.0}, "train/padding_fraction": {1: 0.1}, "train/loss": {1: 1.0}}
    other = {"seconds/train": {1: 2.0}, "train/padding_fraction": {1: 0.2}, "train/loss": {1: 1.00001}}
    assert invariants.same_curves(mine, other, [1], "ranks", tolerance=1e-4) == []
    assert len(invariants.same_curves(mine, other, [1], "a rerun")) == 2


def test_the_users_files_are_watched(tmp_path: Path) -> None:
    planted = invariants.plant(tmp_path)
    assert len(planted) == 4 and invariants.untouched(planted) == []
    (tmp_path / "thesis" / "chapter1.txt").unlink()
    (tmp_path / "runs" / "chapter1.txt").write_text("new")
    (tmp_path / "policy.writing-12").mkdir()
    assert [line.split(":")[0] for line in invariants.untouched(planted)] == ["deleted", "changed"]
    assert invariants.no_leftovers(tmp_path) == ["left behind: policy.writing-12"]
