"""Duels: worked by hand, turned round, interrupted, on odd data, counted against the truth; and the command."""

import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gopo_lightning.commands.duel import main
from gopo_lightning.data.json_lines import read_jsonl, write_jsonl
from gopo_lightning.evaluation.duel import DuelResult, duels
from gopo_lightning.evaluation.duels.asking import Asker, Orders
from gopo_lightning.evaluation.duels.digests import config_identity, judge_identity
from gopo_lightning.evaluation.duels.policies import Sampling, _contents, by_step, find_policy
from gopo_lightning.evaluation.duels.predictions import common, read_predictions
from gopo_lightning.evaluation.duels.written import shown
from gopo_lightning.rewards import (
    FunctionComparator,
    FunctionReward,
    RankingOracle,
    RewardModelComparator,
    Source,
    SourceConfigError,
)
from gopo_lightning.rewards.verdict_cache import VerdictCache
from gopo_lightning.types import Completion, Prompt

pytestmark = pytest.mark.filterwarnings("ignore:a duel on .* prompts")
Texts = Sequence[Sequence[str]]


def length(completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


def longer(first: list[str], second: list[str]) -> list[float]:
    return [0.5 if len(a) == len(b) else float(len(a) > len(b)) for a, b in zip(first, second, strict=True)]


def first_of_equals(first: list[str], second: list[str]) -> list[float]:
    """Decides by the position what it cannot tell apart."""
    return [float(len(a) >= len(b)) for a, b in zip(first, second, strict=True)]


def by_length(completions: list[str]) -> list[int]:
    return sorted(range(len(completions)), key=lambda n: -len(completions[n]))


def letters(completions: list[str], letter: list[str]) -> list[float]:
    """Reads a column of the dataset."""
    return [float(text.count(x)) for text, x in zip(completions, letter, strict=True)]


def duel(a: Texts, b: Texts, source: Source, orders: Orders = "both", **options: Any) -> DuelResult:
    prompts = [Prompt(n, (), f"prompt {n}") for n in range(len(a))]
    groups = [list(pair) for pair in zip(a, b, strict=True)]
    asker = Asker(source, options.pop("cache", None), orders=orders)
    return duels(prompts, groups, asker, draws=200, **options)[0][0, 1]


# --- by hand ---------------------------------------------------------------------------------------------------------

A = [["aaa", "a"], ["bb", "bb"], ["", "c"]]
B = [["xx", "x"], ["bb", "y"], ["zzz"]]
SHARES = {0: (1 + 1 + 0 + 0.5) / 4, 1: (0.5 + 1 + 0.5 + 1) / 4, 2: 0.0}
"""By length; the second group of B has one text of A, the third a single completion."""


@pytest.mark.parametrize(
    "source",
    [
        FunctionReward(length),
        FunctionComparator(longer),
        FunctionComparator(first_of_equals),
        RankingOracle(by_length),
    ],
    ids=["scores", "comparisons", "prefers the first", "an order"],
)
def test_shares_by_hand(source: Source) -> None:
    found = duel(A, B, source)
    if isinstance(source, RankingOracle):  # it knows no ties here
        assert found.shares[2] == 0 and found.num_pairs == 10
        return
    assert found.shares == SHARES
    assert found.win_rate.mean == pytest.approx(sum(SHARES.values()) / 3) and found.win_rate.n == 3
    assert (found.num_pairs, found.num_ties, found.num_abstained) == (10, 3, 0)


def test_a_preferred_position_is_seen_and_averaged_out() -> None:
    """Of 10 pairs 2 are of equal texts, and 1 of the others has equal lengths: there W_xy + W_yx − 1 is 1, else 0.
    Asked in one order, that pair has a winner."""
    found = duel(A, B, FunctionComparator(first_of_equals))
    assert found.first_bias == pytest.approx(1 / 8)
    assert math.isnan(duel(A, B, FunctionReward(length)).first_bias)
    one = duel(A, B, FunctionComparator(first_of_equals), orders="one")
    assert math.isnan(one.first_bias) and one.num_ties == 2


def test_a_comparator_whose_order_does_not_matter_is_asked_once() -> None:
    class Counted(RewardModelComparator):
        asked = 0

        def compare(self, prompts: Sequence[Prompt], firsts: Sequence[str], seconds: Sequence[str]) -> torch.Tensor:
            self.asked += len(firsts)
            return super().compare(prompts, firsts, seconds)

    source = Counted(FunctionReward(length))
    found = duel([["aaa"]], [["x"]], source)
    assert found.shares[0] == pytest.approx(1 / (1 + math.exp(-2)), abs=1e-9) and source.asked == 1


def test_infinite_scores_are_ranks_and_nan_leaves() -> None:
    scores = {"low": -math.inf, "high": math.inf, "none": math.nan, "mid": 0.0, "low too": -math.inf}
    source = FunctionReward(lambda completions: [scores[text] for text in completions], name="table")
    found = duel([["low", "high"], ["none"], ["mid", "none"]], [["mid", "low too"], ["mid"], ["low"]], source)
    assert found.shares == {0: (0 + 0.5 + 1 + 1) / 4, 2: 1.0}
    assert (found.num_unanswered, found.num_abstained, found.win_rate.n) == (1, 2, 2)


def test_a_judge_that_answers_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="judge 'mute' abstained on all 1 pairs of 1 prompts"):
        duel([["a"]], [["b"]], FunctionReward(lambda completions: [None] * len(completions), name="mute"))


def test_a_judge_that_raises_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"judge 'two' raised ValueError: answered 2.0; .*\n.* row 0: 'prompt 0'"):
        duel([["a"]], [["b"]], FunctionComparator(lambda first: [2.0] * len(first), name="two"))


@pytest.mark.filterwarnings("default:a duel on .* prompts")
def test_few_prompts_warn_and_one_has_no_interval() -> None:
    with pytest.warns(UserWarning, match="a duel on 1 prompts: with fewer than 20"):
        found = duel([["aa"]], [["b"]], FunctionReward(length))
    assert found.win_rate.mean == 1 and math.isnan(found.win_rate.low)


def test_endings_tell_equal_texts_apart_where_the_judge_reads_them() -> None:
    def whole(truncated: list[bool]) -> list[float]:
        return [float(not cut) for cut in truncated]

    done, cut = (Completion("same", truncated=t, num_tokens=3) for t in (False, True))
    assert duel([[done]], [[cut]], FunctionReward(whole)).shares == {0: 1.0}
    assert duel([[done]], [[cut]], FunctionReward(length)).shares == {0: 0.5}


# --- turned round ----------------------------------------------------------------------------------------------------


def sway(first: list[str], second: list[str], prompts: list[str]) -> list[float | None]:
    """Some probability that depends on order, texts and prompt; a tenth abstain."""
    answers: list[float | None] = []
    for triple in zip(prompts, first, second, strict=True):
        number = int(hashlib.sha256(repr(triple).encode()).hexdigest()[:12], 16) / 16**12
        answers.append(None if number < 0.1 else number)
    return answers


GROUPS = st.lists(st.text("ab\u2028é", max_size=3), min_size=1, max_size=4)


@given(st.lists(st.tuples(GROUPS, GROUPS), min_size=1, max_size=6), st.sampled_from(["both", "one"]))
@settings(max_examples=80, deadline=None)
def test_b_against_a_is_the_rest_to_the_last_bit(pairs: list[tuple[list[str], list[str]]], orders: Orders) -> None:
    a, b = zip(*pairs, strict=True)
    a, b = [*a, ["tie"]], [*b, ["tie"]]  # so that one pair has an answer
    ab, ba = duel(a, b, FunctionComparator(sway), orders), duel(b, a, FunctionComparator(sway), orders)
    assert ab.win_rate.mean + ba.win_rate.mean == 1.0 and ba.win_rate.mean == 1.0 - ab.win_rate.mean
    assert all(ab.shares[n] + ba.shares[n] == 1.0 for n in ab.shares) and ab.shares.keys() == ba.shares.keys()
    if ab.win_rate.n > 1:
        assert (ba.win_rate.low, ba.win_rate.high) == (1 - ab.win_rate.high, 1 - ab.win_rate.low)
    assert (ab.num_pairs, ab.num_ties, ab.num_abstained) == (ba.num_pairs, ba.num_ties, ba.num_abstained)
    assert ab.first_bias == ba.first_bias or abs(ab.first_bias - ba.first_bias) < 1e-12 or math.isnan(ab.first_bias)


def test_a_ladder_of_three_agrees_with_its_duels() -> None:
    prompts = [Prompt(n, (), f"p{n}") for n in range(3)]
    C = [["long enough"], ["b"], ["zz"]]
    groups = [list(three) for three in zip(A, B, C, strict=True)]
    results, shares_nKK = duels(prompts, groups, Asker(FunctionComparator(longer)), draws=100)
    assert results[0, 1].shares == SHARES and results[0, 2].shares == duel(A, C, FunctionComparator(longer)).shares
    assert shares_nKK.shape == (3, 3, 3) and (shares_nKK[:, 0, 1] + shares_nKK[:, 1, 0] == 1).all()


# --- how often the interval holds the truth ---------------------------------------------------------------------------


def biased_judge(bias: float, sureness: float) -> FunctionComparator:
    """Reads the quality that stands in the texts; prefers the first by ``bias``, and draws its verdict by a hash."""

    def compare(first: list[str], second: list[str]) -> list[float]:
        answers = []
        for a, b in zip(first, second, strict=True):
            gap = sureness * (float(a.split()[0]) - float(b.split()[0])) + bias
            draw = int(hashlib.sha256(f"{a}|{b}".encode()).hexdigest()[:12], 16) / 16**12
            answers.append(float(draw < 1 / (1 + math.exp(-gap))))
        return answers

    return FunctionComparator(compare)


@pytest.mark.parametrize(("bias", "sureness", "orders"), [(0.0, 1.0, "both"), (1.5, 2.0, "both"), (1.5, 2.0, "one")])
def test_two_samplings_of_one_policy_are_even(bias: float, sureness: float, orders: Orders) -> None:
    """200 repetitions, 30 prompts, 2 completions of each: the 95 % interval holds 0.5 in 91 to 98 of 100."""
    generator, held = np.random.default_rng(3), 0
    for repetition in range(200):
        quality = generator.normal(size=(2, 30, 2)) * generator.gamma(2.0, size=(1, 30, 1))  # prompts spread unequally
        a, b = (
            [[f"{q:.9f} {repetition} {side} {n}" for q in row] for n, row in enumerate(quality[side])]
            for side in range(2)
        )
        found = duel(a, b, biased_judge(bias, sureness), orders, seed=repetition).win_rate
        held += found.low <= 0.5 <= found.high
    assert 0.91 <= held / 200 <= 0.98, held / 200


# --- interrupted, and cached -----------------------------------------------------------------------------------------


class Counting:
    """A judge that counts its questions, and dies after some."""

    def __init__(self, dies_after: int | None = None) -> None:
        self.asked: list[tuple[str, str]] = []
        self.dies_after = dies_after

    def __call__(self, first: list[str], second: list[str]) -> list[float]:
        if self.dies_after is not None and len(self.asked) >= self.dies_after:
            raise KeyboardInterrupt
        self.asked += zip(first, second, strict=True)
        return longer(first, second)


def test_an_interrupted_duel_asks_only_for_the_rest(tmp_path: Path) -> None:
    a, b = ([[f"{side}{n}{'x' * (n % 3 + k)}" for k in range(2)] for n in range(10)] for side in "ab")
    first, then, again = Counting(dies_after=30), Counting(), Counting()
    with pytest.raises(KeyboardInterrupt):
        duel(a, b, FunctionComparator(first, name="c"), cache=VerdictCache(tmp_path), prompts_per_call=2)
    assert len(first.asked) == 32  # two chunks of 2 prompts, 4 pairs, 2 orders
    found = duel(a, b, FunctionComparator(then, name="c"), cache=VerdictCache(tmp_path), prompts_per_call=3)
    assert len(then.asked) == 80 - 32 and not set(then.asked) & set(first.asked)
    whole = duel(a, b, FunctionComparator(longer))
    assert found == whole
    turned = duel(b, a, FunctionComparator(again, name="c"), cache=VerdictCache(tmp_path))
    assert not again.asked and turned.win_rate.mean == 1 - found.win_rate.mean


def test_one_order_is_one_order_whatever_is_known(tmp_path: Path) -> None:
    """Answers that another duel has left in the cache count only in the order that is drawn for this one."""
    a, b = ([[f"{side}{n}{'x' * (n % 3 + k)}" for k in range(2)] for n in range(10)] for side in "ab")
    judge = FunctionComparator(first_of_equals, name="c")
    alone = duel(a, b, judge, orders="one")
    for orders, seed in (("both", 0), ("one", 1)):
        duel(a, b, judge, orders=orders, seed=seed, cache=VerdictCache(tmp_path))
    found = duel(a, b, judge, orders="one", cache=VerdictCache(tmp_path))
    assert found == alone and found != duel(a, b, judge)


def test_what_had_no_answer_is_asked_again(tmp_path: Path) -> None:
    answers: list[float | None] = [None, None, 1.0, 1.0]
    judge = FunctionComparator(lambda first: [answers.pop(0) for _ in first], name="late")
    with pytest.raises(ValueError, match="abstained on all 1 pairs"):
        duel([["a"]], [["b"]], judge, cache=VerdictCache(tmp_path))
    assert duel([["a"]], [["b"]], judge, cache=VerdictCache(tmp_path)).num_pairs == 1 and not answers


def test_the_cache_knows_judges_prompts_and_groups_apart(tmp_path: Path) -> None:
    def ask(identity: str, text: str, source: Source, *groups: Sequence[str], **columns: Any) -> int:
        asker = Asker(source, VerdictCache(tmp_path), identity)
        asker.ask([Prompt(0, (), text, columns=columns)], [groups])
        return asker.asked

    comparator, oracle = FunctionComparator(longer), RankingOracle(by_length)
    assert [ask("j", "p", comparator, ["a"], ["bb"]) for _ in range(2)] == [1, 0]
    assert ask("k", "p", comparator, ["a"], ["bb"]) == 1 and ask("j", "q", comparator, ["a"], ["bb"]) == 1
    assert ask("j", "p", comparator, ["a"], ["bb"], answer=4) == 1
    assert ask("j", "p", comparator, ["a"], ["bb", "c"]) == 1  # one pair is new
    assert [ask("o", "p", oracle, ["a"], ["bb"]) for _ in range(2)] == [1, 0]
    assert ask("o", "p", oracle, ["a"], ["bb", "c"]) == 2  # an order of other texts is another order


def test_a_judge_is_its_config_its_files_and_its_function(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_text("1")

    def identity(**options: Any) -> str:
        return judge_identity(
            {"class_path": "X", "init_args": {"model": str(model), "cache_dir": str(model), **options}}
        )

    before = identity()
    assert identity() == before and identity(function="tests.test_duel.length") != before
    (model / "weights").write_text("2")
    assert identity() != before


def test_samples_are_of_models_and_data_by_content(tmp_path: Path) -> None:
    """Of folders, patterns, and what stands behind `--` too."""
    model, data = tmp_path / "model", tmp_path / "data"
    write(data / "a.jsonl", {"prompt": "a"})
    write(model / "config.json", {})
    overlay = tmp_path / "overlay.yaml"

    def identity(predict: str, *overrides: str) -> str:
        config = {"policy": {"name": str(model)}, "data": {"predict": {"path": predict}}}
        return str(config_identity([config, *Sampling((), overrides, 0, tmp_path).values]))

    overlay.write_text(yaml.safe_dump({"data": {"path": str(data)}}))
    cases = [
        (str(data),),
        (str(data / "*.jsonl"),),
        ("hub/name", "--data.init_args.predict.path", str(data / "a.jsonl")),
        ("hub/name", f"--data.init_args.predict={{path: {data}}}"),
        ("hub/name", f"--config={overlay}"),
    ]
    before = [identity(*case) for case in cases]
    write(data / "a.jsonl", {"prompt": "b"})
    changed = [identity(*case) for case in cases]
    (model / "weights").write_text("2")
    assert all(x != y != z for x, y, z in zip(before, changed, [identity(*case) for case in cases], strict=True))
    assert identity("hub/name", "--trainer.logger.init_args.name=x") == identity("hub/name")


def test_an_exported_adapter_is_sampled_with_its_base(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    write(base / "config.json", {"layers": 1})
    write(adapter / "adapter_config.json", {"base_model_name_or_path": str(base)})
    before = _contents(find_policy(str(adapter)))
    write(base / "config.json", {"layers": 2})
    after = _contents(find_policy(str(adapter)))
    assert before[0] == after[0] and before[1] != after[1]
    write(adapter / "adapter_config.json", {"base_model_name_or_path": "hub/name"})
    assert len(_contents(find_policy(str(adapter)))) == 1


# --- predictions -----------------------------------------------------------------------------------------------------


def row(index: int, *texts: str, **more: Any) -> dict[str, Any]:
    return {"index": index, "prompt": f"prompt {index}", "messages": None, "completions": list(texts), **more}


def write(path: Path, *rows: Any) -> Path:
    write_jsonl(path, rows)
    return path


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(0, "a"), row(0, "b")], r"row 1 \(counted from 0\): the index 0 comes a second time"),
        ([row(0)], r"row 0 .*`completions` must be a list of texts, one at least"),
        ([row(0, "a") | {"index": "0"}], "`index` must be a whole number"),
        ([row(0, "a") | {"index": True}], "`index` must be a whole number"),
        ([row(0, "a") | {"messages": "hi"}], "`messages` must be a list of messages"),
        ([[1]], "a line is list, not an object"),
        ([row(0, "a", rewards=[1.0])], "`rewards` must be an object, for each source a list"),
        ([row(0, "a", rewards={"r": [1.0, 2.0]})], "1 completions have another number of rewards of r"),
        ([row(0, "a", num_tokens=[1, 2], finish_reasons=["stop"])], "1 completions, but 2 num_tokens and 1 finish"),
        ([], "holds no predictions"),
    ],
)
def test_a_malformed_file_is_named_with_its_row(rows: list[Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", *rows)
    with pytest.raises(ValueError, match=message) as error:
        read_predictions(path)
    assert str(path) in str(error.value)


def test_line_separators_and_infinities_come_through(tmp_path: Path) -> None:
    text = "one\u2028two\u2029three\x85four\nfive"
    ends: dict[str, Any] = {"num_tokens": [3, 4], "finish_reasons": ["length", "stop"]}
    path = write(tmp_path / "p.jsonl", row(3, text, "b", rewards={"r": [-math.inf, math.nan]}, **ends))
    found = read_predictions(path)[3]
    assert found.completions == (text, "b") and found.rewards["r"][0] == -math.inf
    first = found.completions[0]
    assert isinstance(first, Completion) and first.truncated and first.num_tokens == 3


def test_prompts_are_paired_by_index_and_must_read_the_same(tmp_path: Path) -> None:
    a = read_predictions(write(tmp_path / "a.jsonl", *(row(n, "a") for n in (0, 2, 5))))
    b = read_predictions(write(tmp_path / "b.jsonl", *(row(n, "b") for n in (5, 2, 9, 7))))
    assert common({"a": a, "b": b}) == ([2, 5], {"a": 1, "b": 2}) and common({"b": b, "a": a})[0] == [2, 5]
    chat = [{"role": "user", "content": "prompt 2"}]
    other = read_predictions(write(tmp_path / "c.jsonl", row(2, "c") | {"messages": chat}))
    with pytest.raises(
        ValueError, match=r"prompt 2 is another one in a \('prompt 2'\) than in c \(a conversation that"
    ):
        common({"a": a, "c": other})
    with pytest.raises(ValueError, match="have no prompt in common"):
        common({"a": a, "d": read_predictions(write(tmp_path / "d.jsonl", row(1, "d")))})


# --- policies --------------------------------------------------------------------------------------------------------


def test_what_a_policy_may_be(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write(run / "step10" / "predictions.jsonl", row(0, "a"))
    for folder, file in (("policy-step-10", "config.json"), ("policy-step-20", "adapter_config.json"), ("policy", "x")):
        (run / folder).mkdir()
        (run / folder / file).touch()
    (run / "checkpoints").mkdir()
    for name in ("step=30.ckpt", "step20.ckpt", "last.ckpt"):
        (run / "checkpoints" / name).touch()
    kinds = {step: (policy.kind, policy.path and policy.path.name) for step, policy in by_step(run).items()}
    assert kinds == {
        10: ("predictions", "predictions.jsonl"),
        20: ("export", "policy-step-20"),
        30: ("checkpoint", "step=30.ckpt"),
    }
    assert find_policy("base").flags == [] and find_policy("packaged:x").kind == "packaged"
    assert find_policy(str(run / "checkpoints/last.ckpt")).flags == [f"--ckpt_path={run}/checkpoints/last.ckpt"]
    (run / "checkpoints" / "step-30.ckpt").touch()
    with pytest.raises(ValueError, match=r"step-30.ckpt and .*step=30.ckpt are both of step 30"):
        by_step(run)


def test_what_is_no_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is nothing at nowhere"):
        find_policy("nowhere")
    (tmp_path / "predictions.rank0.jsonl").touch()
    with pytest.raises(ValueError, match=r"it holds predictions.rank0.jsonl, whose `predict` has not ended"):
        find_policy(str(tmp_path))
    with pytest.raises(ValueError, match="holds no policy of a step"):
        by_step(tmp_path)


# --- the command -----------------------------------------------------------------------------------------------------

LONGER = ["--judge=FunctionComparator", "--judge.function=tests.test_duel.longer"]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """24 prompts; A's texts are longer at two of three."""
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        rows = (
            row(
                n,
                *("x" * (1 + k + (name == "a") * (1 if n % 3 else -1) + 1) + f"{n}" for k in range(2)),
                rewards={"r": [-math.inf if name == "b" else 0.0, 1.0]},
                num_tokens=[3, 4],
                finish_reasons=["stop", "length"],
            )
            for n in range(24)
        )
        write(tmp_path / name / "predictions.jsonl", *rows)
    return str(tmp_path / "a"), str(tmp_path / "b" / "predictions.jsonl")


def result_in(folder: str) -> dict[str, Any]:
    return json.loads(Path(folder, "duel.json").read_text())


def test_the_command_on_files(files: tuple[str, str], capsys: pytest.CaptureFixture) -> None:
    main([*files, *LONGER, "--output=out", "--draws=300"])
    said = capsys.readouterr().out
    assert "win rate of A" in said and "open: the interval holds 0.5" in said and "over 24 prompts" in said
    found = result_in("out")
    (one,) = found["duels"]
    assert one["shares"]["1"] == (1 + 1 + 0.5 + 1) / 4 and one["shares"]["0"] == (0.5 + 0 + 0 + 0) / 4
    assert one["win_rate"]["mean"] == pytest.approx((2 * 0.875 + 0.125) / 3) and one["win_rate"]["n"] == 24
    assert (
        found["versions"]["torch"] == torch.__version__
        and found["judge"]["config"]["init_args"]["both_orders"] is False
    )
    assert [policy["kind"] for policy in found["policies"]] == ["predictions", "predictions"]
    main([*files[::-1], *LONGER, "--output=back", "--draws=300"])
    back = result_in("back")["duels"][0]["win_rate"]
    assert back["mean"] + one["win_rate"]["mean"] == 1 and back["low"] == 1 - one["win_rate"]["high"]


def test_the_command_needs_two_policies_and_a_judge(files: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="1 policies are named: a duel and a curve take 2"):
        main([files[0], *LONGER])
    with pytest.raises(ValueError, match="no judge is named"):
        main([*files])
    with pytest.raises(ValueError, match="two commands"):
        main([*files, *LONGER, "--ladder", "--curve"])
    with pytest.raises(ValueError, match="--draws=5 must be at least 100"):
        main([*files, *LONGER, "--draws=5"])


def test_rewards_that_the_files_hold_may_judge(files: tuple[str, str], tmp_path: Path) -> None:
    """A has 0 and 1, B −∞ and 1: A wins two of four pairs, ties one."""
    main([*files, "--judge", "rewards:r", "--output=out"])
    assert set(result_in("out")["duels"][0]["shares"].values()) == {(1 + 0 + 1 + 0.5) / 4}
    with pytest.raises(SourceConfigError, match=r"has no rewards of a source 's' at prompt 0; it has \['r'\]"):
        main([*files, "--judge=rewards:s"])
    shares = [write(tmp_path / f"{name}.jsonl", row(0, "x", name, rewards={"w": [0.75, 0.25]})) for name in "cd"]
    with pytest.raises(SourceConfigError, match="are shares of wins within each group"):
        main([*map(str, shares), "--judge=rewards:w"])


@pytest.mark.parametrize("name", [None, "vowels", "size"])
def test_a_judge_of_a_config(name: str | None, files: tuple[str, str], tmp_path: Path) -> None:
    reward = "gopo_lightning.rewards.FunctionReward"
    sources = [
        {"class_path": reward, "init_args": {"function": "tests.test_duel.length", "name": "size"}},
        {"class_path": "RewardModelComparator", "init_args": {"reward": {"class_path": reward, "init_args": {
            "function": "tests.test_duel.length"}}, "name": "vowels"}},
    ]  # fmt: skip
    config = tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump({"model": {"init_args": {"rewards": {"sources": sources}}}}))
    if name is None:
        with pytest.raises(ValueError, match=r"--judge_name=None: the config has the sources \['size', 'vowels'\]"):
            main([*files, "--judge", str(config)])
        return
    main([*files, "--judge", str(config), "--judge_name", name, "--output=out"])
    assert result_in("out")["judge"]["name"] == name
    alone = tmp_path / "judge.yaml"
    alone.write_text(yaml.safe_dump(sources[name == "vowels"]))
    main([*files, f"--judge={alone}", "--output=alone"])
    assert result_in("alone")["duels"] == result_in("out")["duels"]


def test_a_judges_config_holds_no_secret_and_names_a_class(files: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds a secret"):
        main([*files, "--judge=LLMJudge", "--judge.model=m", "--judge.base_url=http://me:hunter2@localhost:1/v1"])
    with pytest.raises(ValueError, match="holds a secret"):
        main([*files, *LONGER, "--", "--x.headers.token=hf_0123456789abcdefgh"])
    nothing = tmp_path / "nothing.yaml"
    nothing.write_text("{}")
    with pytest.raises(ValueError, match="holds neither class_path with init_args, nor"):
        main([*files, f"--judge={nothing}"])
    with pytest.raises(ValueError, match="there is no such file"):
        main([*files, "--judge=missing.yaml"])
    nothing.write_text("{a: b: c}")
    with pytest.raises(ValueError, match=r"nothing.yaml cannot be read as YAML"):
        main([*files, f"--judge={nothing}"])


def test_columns_come_from_the_config(files: tuple[str, str], tmp_path: Path) -> None:
    judge = ["--judge=FunctionReward", "--judge.function=tests.test_duel.letters"]
    with pytest.raises(ValueError, match=r"requires the columns \['letter'\].*name the training config by --config"):
        main([*files, *judge])
    data = write(tmp_path / "data.jsonl", *({"prompt": f"prompt {n}", "letter": "x"} for n in range(24)))
    config = tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump({"data": {"init_args": {"predict": {"path": str(data), "limit": 3}}}}))
    main([*files, *judge, f"--config={config}", "--output=out"])
    assert result_in("out")["duels"][0]["shares"]["1"] == 0.875
    other = write(tmp_path / "other.jsonl", *({"prompt": "another", "letter": "x"} for _ in range(24)))
    with pytest.raises(ValueError, match="is 'another', but the predictions' prompt of this index is 'prompt 0'"):
        main([*files, *judge, f"--config={config}", "--", f"--data.init_args.predict.path={other}"])
    for spelling in ([f"--data.init_args.predict.path={data}"], ["--data.init_args.predict.path", str(data)]):
        config.write_text(yaml.safe_dump({"data": {"init_args": {"predict": {"path": str(other), "limit": 3}}}}))
        main([*files, *judge, f"--config={config}", "--output=again", "--", *spelling])
        assert result_in("again")["duels"][0]["shares"] == result_in("out")["duels"][0]["shares"]


def test_every_duel_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though runs call their exports alike."""
    monkeypatch.chdir(tmp_path)
    for n, name in enumerate(("gopo", "grpo", "rloo")):
        write(
            tmp_path / name / "version_0" / "policy" / "predictions.jsonl", *(row(i, "x" * (n + i)) for i in range(3))
        )
    for name in ("grpo", "rloo", "grpo"):
        main(["gopo/version_0/policy", f"{name}/version_0/policy", *LONGER])
    found = [json.loads(path.read_text())["policies"][1]["name"] for path in tmp_path.glob("runs/duel/*/duel.json")]
    assert sorted(found) == ["grpo/version_0/policy", "rloo/version_0/policy"]


def test_a_ladder_and_a_curve(files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a, b = files
    main(["--ladder", a, b, a, *LONGER, "--output=out", "--draws=100"])
    found = result_in("out")
    elo = {player["name"]: player["elo"]["mean"] for player in found["ladder"]}
    assert elo[a] == pytest.approx(elo[f"{a} (2)"]) and elo[a] > elo[b] and len(found["duels"]) == 3
    assert "Elo" in capsys.readouterr().out
    for step in (10, 20):
        write(tmp_path / "run_a" / f"step{step}" / "predictions.jsonl", *read_jsonl(Path(a, "predictions.jsonl")))
        write(tmp_path / "run_b" / f"step{step}" / "predictions.jsonl", *read_jsonl(Path(b)))
    write(tmp_path / "run_b" / "step30" / "predictions.jsonl", row(0, "x"))
    main(["--curve", "run_a", "run_b", *LONGER, "--output=curve", "--draws=100"])
    assert "only one run has them: the steps [30]" in capsys.readouterr().out
    found = result_in("curve")
    assert [point["step"] for point in found["curve"]] == [10, 20]
    assert Path("curve/curve.png").read_bytes().startswith(b"\x89PNG")


def test_names_from_outside_cannot_command_a_terminal() -> None:
    assert shown("a\x1b[2Jb\u202ec\n[bold]d").plain == "a [2Jb c [bold]d"


def test_a_policy_without_completions_needs_a_config(files: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="base has no completions yet. Give --config"):
        main([files[0], "base", *LONGER])


@pytest.mark.slow
def test_policies_are_sampled_once_and_judged(
    tiny_policy: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_config: Callable
) -> None:
    """As a user calls it, in a process of its own: an export against the policy of the config, which is the same."""
    config = make_config(tiny_policy, prompts_file)
    command = [sys.executable, "-m", "gopo_lightning", "duel"]
    options = ["--config", str(config), *LONGER, "--", "--data.init_args.predict.limit=5"]

    def run(*policies: str) -> str:
        done = subprocess.run([*command, *policies, *options], capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.chdir(tmp_path)
    first = run(str(tiny_policy), "base")
    assert first.count("sampling, with seed") == 2 and "over 5 prompts" in first
    again = run("base", str(tiny_policy))
    assert again.count("the completions are there already") == 2 and "sampling" not in again
    one, other = (json.loads(path.read_text())["duels"][0] for path in sorted(tmp_path.glob("runs/duel/*/duel.json")))
    assert one["win_rate"]["mean"] + other["win_rate"]["mean"] == 1
    samples = [list(read_jsonl(path)) for path in tmp_path.glob("runs/duel_cache/samples/*/predictions.jsonl")]
    assert len(samples) == 2 and samples[0] != samples[1]
    itself = run(str(tiny_policy), str(tiny_policy))
    assert itself.count("sampling, with seed") == 1 and itself.count("there already") == 1


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[[Path, Path], Path]:
    def make(policy: Path, prompts: Path) -> Path:
        source = {"path": str(prompts)}
        rewards = [{"class_path": "FunctionReward", "init_args": {"function": "tests.runs.count_vowels"}}]
        module = {
            "policy": {"name": str(policy)},
            "rollout": {"sampling": {"max_new_tokens": 8}, "eval_num_completions": 2},
            "rewards": {"sources": rewards},
        }
        values = {
            "trainer": {"accelerator": "cpu"},
            "model": {"class_path": "gopo_lightning.GOPOModule", "init_args": module},
            "data": {
                "class_path": "gopo_lightning.PromptDataModule",
                "init_args": {"train": source, "predict": source},
            },
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return make
