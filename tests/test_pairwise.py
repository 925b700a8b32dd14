"""Comparisons: round-robins, matrices, oracles, and what a run does with them."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from gopo_lightning.objectives.advantages import ordinal, ordinal_from_wins, preferences, valid_from_wins
from gopo_lightning.rewards import (
    FunctionComparator,
    FunctionReward,
    LocalJudge,
    PairwiseSource,
    RankingOracle,
    RewardModelComparator,
    against_reference,
    combine,
    score_groups,
)
from gopo_lightning.rewards.metrics import rank_correlation, wins_metrics
from gopo_lightning.rewards.pairwise import Groups, PairComparator, check_wins, round_robin
from gopo_lightning.rewards.scoring import win_share
from gopo_lightning.types import Prompt
from tests.conftest import byte_tokenizer
from tests.runs import make_data, make_module, make_trainer
from tests.test_module import fit, scalars
from tests.test_rewards import prompt

NAN = math.nan


def longer(first: list[str], second: list[str]) -> list[float]:
    """The longer text wins."""
    return [0.5 * (1 + (len(a) > len(b)) - (len(a) < len(b))) for a, b in zip(first, second, strict=True)]


def longest_first(completions: list[str]) -> list[list[int]]:
    """An order with ties; texts without letters are not ranked."""
    lengths = sorted({len(c) for c in completions if any(map(str.isalpha, c))}, reverse=True)
    return [[i for i, c in enumerate(completions) if len(c) == n and any(map(str.isalpha, c))] for n in lengths]


# --- round-robin -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("G", "k"), [(8, 3), (8, 7), (2, 1), (6, 1), (7, 6), (7, 3), (3, 1)])
def test_everybody_meets_k_others_once(G: int, k: int) -> None:
    pairs = round_robin(G, k)
    assert len(set(pairs)) == len(pairs) and all(i < j for i, j in pairs)
    met = [sum(i in pair for pair in pairs) for i in range(G)]
    assert set(met) <= ({k} if G % 2 == 0 else {k, k - 1})


@pytest.mark.parametrize("G", [2, 3, 7, 8])
def test_all_pairs_are_all_pairs(G: int) -> None:
    assert round_robin(G, None) == [(i, j) for i in range(G) for j in range(i + 1, G)]


# --- comparators -----------------------------------------------------------------------------------------------------


def test_a_comparator_gives_the_copeland_advantage() -> None:
    group = ["a", "bbbb", "ccc", "dd"]
    wins_PGG = FunctionComparator(longer)([prompt("p")], [group])
    lengths = torch.tensor([[1.0, 4.0, 3.0, 2.0]])
    assert torch.equal(ordinal_from_wins(wins_PGG), ordinal(lengths))
    torch.testing.assert_close(win_share(wins_PGG), torch.tensor([[0.0, 1.0, 2 / 3, 1 / 3]], dtype=torch.float64))
    sparse = FunctionComparator(longer, num_opponents=1)([prompt("p")], [group])  # (0, 3) and (1, 2)
    assert ordinal_from_wins(sparse).tolist() == [[-2.0, 2.0, -2.0, 2.0]]


class Asked:
    """Always prefers what it sees first, and remembers what it saw."""

    def __init__(self) -> None:
        self.pairs: list[tuple[str, str]] = []

    def __call__(self, prompts: list[str], first: list[str], second: list[str]) -> list[float]:
        self.pairs += zip(first, second, strict=True)
        return [1.0] * len(first)


def test_both_orders_cancel_a_preference_for_the_first_and_measure_it() -> None:
    wins_PGG = FunctionComparator(Asked(), both_orders=True)([prompt("p")], [["a", "b", "c"]])
    assert ordinal_from_wins(wins_PGG).tolist() == [[0.0, 0.0, 0.0]]
    metrics = wins_metrics(wins_PGG, "j")
    assert metrics["reward/j/first_bias"] == 1 and metrics["reward/j/tie_fraction"] == 1


def test_the_order_is_random_over_pairs_but_fixed_for_a_pair() -> None:
    asked, again = Asked(), Asked()
    group = [chr(97 + i) for i in range(16)]
    FunctionComparator(asked)([prompt("p")], [group])
    FunctionComparator(again)([prompt("p")], [group[::-1]])  # the same pairs, from the other side
    assert set(asked.pairs) == set(again.pairs) and len(asked.pairs) == 120
    assert 40 < sum(a < b for a, b in asked.pairs) < 80
    other = Asked()
    FunctionComparator(other, seed=1)([prompt("p")], [group])
    assert set(other.pairs) != set(asked.pairs)


def test_equal_texts_tie_unasked_and_equal_questions_are_asked_once() -> None:
    asked = Asked()
    wins_PGG = FunctionComparator(asked)([prompt("p")], [["a", "a", "b"]])
    assert len(asked.pairs) == 1
    assert wins_PGG[0, 0, 1] == 0.5
    assert torch.equal(wins_PGG[0, 0, 2].nan_to_num(7), wins_PGG[0, 1, 2].nan_to_num(7))


def test_the_same_texts_under_another_prompt_are_another_question() -> None:
    def named(prompts: list[str], first: list[str], second: list[str]) -> list[float]:
        return [float(text == wanted) for wanted, text in zip(prompts, first, strict=True)]

    wins_PGG = FunctionComparator(named)([prompt("a"), prompt("b")], [["a", "b"], ["a", "b"]])
    assert ordinal_from_wins(wins_PGG).tolist() == [[2.0, -2.0], [-2.0, 2.0]]


def test_abstentions_leave_the_comparison() -> None:
    def silent_about_a(first: list[str], second: list[str]) -> list[float | None]:
        return [None if "a" in pair else 1.0 * (pair[0] > pair[1]) for pair in zip(first, second, strict=True)]

    wins_PGG = FunctionComparator(silent_about_a)([prompt("p")], [["a", "b", "c"]])
    assert valid_from_wins(wins_PGG).tolist() == [[False, True, True]]
    assert win_share(wins_PGG)[0].isnan().tolist() == [True, False, False]
    assert ordinal_from_wins(wins_PGG).tolist() == [[0.0, -2.0, 2.0]]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda first, second: [1.5] * len(first), r"'bad' raised ValueError: answered 1.5; an answer is the prob"),
        (lambda first, second: [0.5], r"'bad' raised ValueError: returned scores of shape \(1,\)"),
        (lambda first, second: 1 / 0, r"'bad' raised ZeroDivisionError"),
    ],
)
def test_a_bad_answer_stops_the_run_and_names_the_source(answer: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        score_groups([FunctionComparator(answer, name="bad")], [prompt("p")], [["a", "b", "c"]])


def test_more_opponents_than_completions_are_refused() -> None:
    with pytest.raises(ValueError, match="num_opponents=0: a completion meets at least 1"):
        FunctionComparator(longer, num_opponents=0)
    with pytest.raises(ValueError, match="num_opponents=3, but a completion of a group of 3 has only 2"):
        FunctionComparator(longer, num_opponents=3)([prompt("p")], [["a", "b", "c"]])


# --- matrices --------------------------------------------------------------------------------------------------------


class Given(PairwiseSource):
    """Returns what it was made with."""

    name = "given"

    def __init__(self, wins: Any) -> None:
        self.wins = wins

    def __call__(self, prompts: Sequence[Prompt], groups: Sequence[Sequence[str]]) -> Any:
        return self.wins


@pytest.mark.parametrize(
    ("wins", "message"),
    [
        (torch.zeros(2, 2), r"returned \(2, 2\) for 1 groups of 2; return a tensor of \(1, 2, 2\)"),
        ([[0.0]], "returned list"),
        (torch.tensor([[[NAN, 1.2], [NAN, NAN]]]), r"returned the comparison 1.2"),
        (torch.tensor([[[NAN, 0.9], [0.3, NAN]]]), r"W\[0,1\]=0.9 and W\[1,0\]=0.3 in group 0; they must sum to 1"),
    ],
)
def test_malformed_matrices_are_refused(wins: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=r"pairwise source 'given' raised ValueError: .*" + message):
        score_groups([Given(wins)], [prompt("p")], [["a", "b"]])


def test_sums_are_checked_only_where_asked_and_within_tolerance() -> None:
    wins_PGG = torch.tensor([[[7.0, 0.9], [0.1001, 7.0]]])  # the diagonal is not read
    assert torch.equal(check_wins(wins_PGG, 1, 2, tolerance=1e-3), wins_PGG)
    check_wins(torch.tensor([[[NAN, 0.9], [NAN, NAN]]]), 1, 2, tolerance=1e-3)
    check_wins(torch.tensor([[[NAN, 1.0], [1.0, NAN]]]), 1, 2, tolerance=None)


def test_cycles_and_ties_by_hand() -> None:
    """Rock, paper, scissors is one cyclic triad of one; a fourth that loses to all adds three without a cycle."""
    rock_PGG = torch.tensor([[[NAN, 0.0, 1.0, 1.0], [1.0, NAN, 0.0, 1.0], [0.0, 1.0, NAN, 1.0], [0.0, 0.0, 0.0, NAN]]])
    metrics = wins_metrics(rock_PGG, "s")
    assert metrics["reward/s/cyclic_triad_fraction"] == 1 / 4
    assert metrics["reward/s/tie_fraction"] == 0 and metrics["reward/s/compared_fraction"] == 1
    assert metrics["reward/s/first_bias"] == 0
    sparse_PGG = torch.tensor([[[NAN, 0.5, NAN], [NAN, NAN, 0.8], [NAN, NAN, NAN]]])
    metrics = wins_metrics(sparse_PGG, "s")
    assert metrics["reward/s/tie_fraction"] == 0.5
    assert metrics["reward/s/compared_fraction"].item() == pytest.approx(2 / 3)
    assert metrics["reward/s/cyclic_triad_fraction"] == 0 and metrics["reward/s/first_bias"].isnan()


def test_rank_correlation_agrees_with_scipy() -> None:
    from scipy.stats import kendalltau

    generator = torch.Generator().manual_seed(0)
    a_PG, b_PG = (torch.randint(0, 5, (20, 8), generator=generator).float() for _ in range(2))
    a_PG[3, 2] = b_PG[4, 1] = NAN
    for a_G, b_G, tau in zip(a_PG, b_PG, rank_correlation(a_PG, b_PG), strict=True):
        both = ~(a_G.isnan() | b_G.isnan())
        assert tau.item() == pytest.approx(kendalltau(a_G[both], b_G[both]).statistic, abs=1e-12)
    assert rank_correlation(torch.ones(1, 3), torch.arange(3.0)[None]).isnan()


def test_a_scalar_reward_becomes_comparisons() -> None:
    """Lengths 1, 2, 4 win with σ of their differences; drawn verdicts do so as often, and stay the same."""

    def lengths(completions: list[str]) -> list[float | None]:
        return [None if c == "none" else float(len(c)) for c in completions]

    scalar = FunctionReward(lengths, name="n")
    group = [["a", "bb", "cccc", "none"]]
    wins_PGG = preferences(RewardModelComparator(scalar)([prompt("p")], group))[0]
    expected = torch.tensor([-1.0, -3.0, -2.0]).sigmoid()
    torch.testing.assert_close(wins_PGG[[0, 0, 1], [1, 2, 2]].float(), expected)
    assert wins_PGG[3].isnan().all()
    rows = [prompt("p", i) for i in range(2000)]
    drawn = RewardModelComparator(scalar, hard=True)
    answers = drawn.compare(rows, ["bb"] * 2000, ["a"] * 2000)
    assert set(answers.tolist()) == {0.0, 1.0} and answers.mean().item() == pytest.approx(0.7311, abs=0.03)
    assert torch.equal(drawn.compare(rows, ["bb"] * 2000, ["a"] * 2000), answers)
    assert drawn.compare([prompt("p")], ["none"], ["a"]).isnan()


# --- oracle ----------------------------------------------------------------------------------------------------------


def test_an_order_with_ties_becomes_ranks() -> None:
    oracle = RankingOracle(longest_first)
    wins_PGG = oracle([prompt("p")], [["aa", "b", "cc", "1"]])
    assert ordinal_from_wins(wins_PGG).tolist() == [[1.0, -2.0, 1.0, 0.0]]
    assert valid_from_wins(wins_PGG).tolist() == [[True, True, True, False]]
    flat = RankingOracle(lambda prompt, completions, answer: [answer, 0], name="o")
    assert flat([prompt("p", answer=2)], [["a", "b", "c"]])[0, 2, 0] == 1


@pytest.mark.parametrize(
    ("order", "message"), [([3], "ranked 3; an order"), ([True], "ranked True"), ([0, [1, 0]], "completion 0 twice")]
)
def test_an_impossible_order_is_refused(order: list[Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        score_groups([RankingOracle(lambda completions: order, name="o")], [prompt("p")], [["a", "b", "c"]])


def test_an_oracle_sees_each_text_once_and_its_copies_tie() -> None:
    seen: list[list[str]] = []

    def by_length(completions: list[str], letter: str) -> list[int]:
        seen.append(completions)
        return sorted(range(len(completions)), key=lambda n: -len(completions[n]))

    oracle = RankingOracle(by_length)
    wins_PGG = oracle([prompt("p", letter="x")] * 2, [["b", "aa", "b", "aa"], ["c"] * 4])
    assert seen == [["b", "aa"]]
    off = torch.tensor([[0.5, 0.0, 0.5, 0.0], [1.0, 0.5, 1.0, 0.5]] * 2)
    assert torch.equal(wins_PGG, torch.stack([off, torch.full((4, 4), 0.5)]).double())
    with pytest.raises(RuntimeError, match=r"returned int; an order is a list.*\[2, \[0, 1\]\]"):
        score_groups([RankingOracle(lambda completions: 3, name="o")], [prompt("p")], [["a", "b"]])


class ByPosition(PairwiseSource):
    """Prefers what comes first, whatever it says."""

    name = "position"

    def __call__(self, prompts: Sequence[Prompt], groups: Groups) -> torch.Tensor:
        G = len(groups[0])
        return (torch.full((G, G), 0.9).triu(1) + torch.full((G, G), 0.1).tril(-1)).expand(len(groups), G, G)


@pytest.mark.parametrize("source", [ByPosition(), RankingOracle(longest_first)])
def test_copies_tie_and_an_unchanged_policy_draws(source: Any) -> None:
    texts = [["aa", "b", "aa", "d"], ["c", "c", "c", "1"]]
    wins_PGGK = score_groups([source], [prompt("p", n) for n in range(2)], texts).wins_PGGK
    assert wins_PGGK is not None
    assert wins_PGGK[0, 0, 2] == wins_PGGK[1, 0, 1] == wins_PGGK[1, 2, 1] == 0.5
    assert torch.equal(wins_PGGK[0, 0, [1, 3]], wins_PGGK[0, 2, [1, 3]])  # and fare alike with the others
    assert standing([source], "weighted_sum", texts, texts).win_rate_P.tolist() == [0.5, 0.5]


# --- against the reference -------------------------------------------------------------------------------------------


def standing(sources: list[Any], name: str, groups: list[list[str]], references: list[list[str]]) -> Any:
    prompts = [prompt("p", i) for i in range(len(groups))]
    scores = [score_groups(sources, prompts, texts, compare=False).rewards_PGK for texts in (groups, references)]
    function = combine.get_combination(name, num_sources=len(sources))
    return against_reference(sources, function, prompts, groups, scores[0], references, scores[1])


def test_a_pairwise_source_compares_with_the_reference() -> None:
    result = standing([FunctionComparator(longer)], "weighted_sum", [["aaa", "b"]], [["cc", "dd"]])
    assert result.rewards_PG.tolist() == [[1.0, 0.0]] and result.win_rate_P.tolist() == [0.5]
    oracle = standing([RankingOracle(longest_first)], "weighted_sum", [["aaa", "b"]], [["cc", "d"]])
    assert oracle.rewards_PG.tolist() == [[1.0, 0.25]] and oracle.win_rate_P.tolist() == [0.625]


def test_an_unchanged_policy_draws_even_with_a_biased_judge() -> None:
    texts = [["a", "b", "c"]]
    assert standing([FunctionComparator(Asked())], "weighted_sum", texts, texts).win_rate_P.tolist() == [0.5]


def test_beside_another_source_a_reference_has_its_share_of_wins_too() -> None:
    """Every completion beats every reference with 0.9: shares 0.9 and 0.1, not 0.9 and 0.9."""
    nothing = FunctionReward(lambda completions: [0.0] * len(completions), name="nothing")
    surely = FunctionComparator(lambda first, second: [0.1 + 0.8 * x for x in longer(first, second)], name="surely")
    result = standing([nothing, surely], "weighted_sum", [["aaa", "bbb"]], [["c"]])
    torch.testing.assert_close(result.rewards_PG, torch.tensor([[0.9, 0.9]], dtype=torch.float64))
    assert result.win_rate_P.tolist() == [1.0]


def test_ranks_are_taken_over_completions_and_references_together() -> None:
    """Within its own group Borda could never tell that every completion beats every reference."""
    sources = [FunctionReward(lambda completions: list(map(len, completions)), name="n"), FunctionComparator(longer)]
    for name in ("borda", "lexicographic", "z_score"):
        result = standing(sources, name, [["aaa", "bbbb"]], [["c", "dd"]])
        assert result.win_rate_P.tolist() == [1.0], name
        assert result.rewards_PG.min() > 0, name
    assert result.rewards_PGK.tolist() == [[[3.0, 1.0], [4.0, 1.0]]]


# --- local judge -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Absolute positions: padding on the left would shift them."""
    folder, tokenizer = tmp_path_factory.mktemp("gpt2"), byte_tokenizer()
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=1024,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.2,
        eos_token_id=257,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def judge(gpt2: Path) -> LocalJudge:
    source = LocalJudge(str(gpt2), dtype="float32", micro_batch_size=3, max_length=700, template="plain")
    source.setup(torch.device("cpu"))
    return source


def test_the_local_judge_reads_two_logits(judge: LocalJudge, gpt2: Path) -> None:
    """Padded in batches of unequal lengths, against one plain forward a question."""
    firsts, seconds = ["a", "bbbbbbbb", "c", "dd", "e" * 30], ["x", "y", "zzzz", "w", "v"]
    rows = [prompt("say " * i, i) for i in range(5)]
    answers = judge.compare(rows, firsts, seconds)
    model = AutoModelForCausalLM.from_pretrained(gpt2, dtype=torch.float32)
    for i in range(5):
        with torch.no_grad():
            logits = model(torch.tensor([judge.tokens(rows[i], firsts[i], seconds[i])])).logits[0, -1]
        assert answers[i].item() == pytest.approx(logits[[ord("A") - 33, ord("B") - 33]].softmax(0)[0].item(), abs=1e-5)
    assert answers.unique().numel() == 5


def test_the_local_judge_abstains_on_what_it_cannot_read(judge: LocalJudge) -> None:
    answers = judge.compare([prompt("p"), prompt("p")], ["a" * 900, "a"], ["b", "b"])
    assert answers.isnan().tolist() == [True, False]
    assert judge.counters() == {"abstained": 1}


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_on_comparisons_alone(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    sources = [FunctionComparator(longer, num_opponents=2)]
    module = make_module(
        tiny_policy, rewards=sources, micro_batch_tokens=40, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2)
    )
    keep = fit(module, prompts_file, tmp_path, max_steps=4)
    for experience in keep.experiences:
        assert torch.equal(experience.advantages_PG, ordinal_from_wins(experience.wins_PGGK[..., 0]))
        assert experience.advantages_PG.any()
        assert torch.equal(
            experience.select(torch.tensor([2])).wins_PGGK.nan_to_num(7), experience.wins_PGGK[2:3].nan_to_num(7)
        )
    assert scalars(tmp_path, "reward/longer/compared_fraction") == pytest.approx([2 / 3] * 4)
    assert set(scalars(tmp_path, "reward/longer/cyclic_triad_fraction")) == {0.0}
    wins = scalars(tmp_path, "val/win_rate")
    assert wins[0] == 0.5 and scalars(tmp_path, "val/reward") == pytest.approx(wins)
    assert all(a != b for a, b in pairwise(wins[:2]))


@pytest.mark.parametrize("name", ["borda", "lexicographic", "z_score"])
def test_a_run_on_two_rewards(name: str, tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    sources = [FunctionReward("tests.runs.some_invalid", name="vowels"), RankingOracle(longest_first, name="length")]
    keep = fit(make_module(tiny_policy, rewards=sources, combine=name), prompts_file, tmp_path)
    experience = keep.experiences[0]
    assert torch.equal(experience.advantages_PG, ordinal(experience.rewards_PG))
    assert (experience.rewards_PGK.isnan().any(-1) & ~experience.rewards_PG.isnan()).any()  # one abstained
    for tag in ("reward/vowels/mean", "reward/length/mean", "reward/rank_correlation/vowels-length"):
        assert len(scalars(tmp_path, tag)) == 2
    assert scalars(tmp_path, "val/win_rate")[0] == 0.5
    sources[0] = FunctionReward("tests.runs.count_vowels", name="vowels")  # who abstains for some has unlike weights
    fit(make_module(tiny_policy, rewards=sources, combine=name), prompts_file, tmp_path / "whole", max_steps=1)
    assert scalars(tmp_path / "whole", "val/reward")[0] == pytest.approx(0, abs=1e-6)


def test_options_without_effect_and_shared_names_are_refused(tiny_policy: Path) -> None:
    with pytest.raises(ValueError, match=r"objective.advantage has init_args .*comparisons have no such option"):
        make_module(
            tiny_policy,
            rewards=[FunctionComparator(longer)],
            advantage={"function": "ordinal", "init_args": {"ties": "average"}},
        )
    for options in ({"combine": {"function": "weighted_sum", "init_args": {"weights": [-1]}}}, {"combine": "borda"}):
        with pytest.raises(ValueError, match=r"only source, 'longer', gives .* nothing is to be combined. Remove it"):
            make_module(tiny_policy, rewards=[FunctionComparator(longer)], **options)
    with pytest.raises(ValueError, match=r"\['longer'\] names several reward sources"):
        make_module(tiny_policy, rewards=[FunctionComparator(longer), FunctionComparator(longer)])


def test_a_magnitude_baseline_reads_the_share_of_wins(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    module = make_module(tiny_policy, rewards=[FunctionComparator(longer)], advantage="dr_grpo")
    experience = fit(module, prompts_file, tmp_path, max_steps=1).experiences[0]
    centred = experience.rewards_PG - experience.rewards_PG.nanmean(1, keepdim=True)
    torch.testing.assert_close(experience.advantages_PG, centred.float(), atol=1e-6, rtol=0)


def test_fewer_completions_than_asked_are_refused(
    tiny_policy: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make_module(tiny_policy, rewards=[FunctionComparator(longer)])
    generate = module.collector.engine.generate

    def short(*args: Any, **options: Any) -> Any:
        return generate(*args, **options).select(torch.arange(7))

    monkeypatch.setattr(module.collector.engine, "generate", short)
    with pytest.raises(ValueError, match=r"TransformersEngine returned 7 completions for 4 prompts × 2"):
        fit(module, prompts_file, tmp_path)


def test_win_rates_survive_a_resume(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    """The texts of the reference are in the checkpoint, so that a judge can still compare with them."""
    module = make_module(tiny_policy, rewards=[FunctionComparator(longer)])
    trainer = make_trainer(tmp_path)
    trainer.fit(module, make_data(prompts_file))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    (expected,) = trainer.validate(module, make_data(prompts_file), verbose=False)
    again = make_module(tiny_policy, rewards=[FunctionComparator(longer)])
    (result,) = make_trainer(tmp_path).validate(
        again, make_data(prompts_file), ckpt_path=str(tmp_path / "run.ckpt"), verbose=False
    )
    assert {**result, "step": 2} == expected


def test_a_rank_without_questions_keeps_step_where_a_forward_needs_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its texts are equal, those of another rank may not be, whose forward of a sharded model would wait for ever."""
    asked: list[tuple[str, str]] = []

    class Sharded(PairComparator):
        def setup(self, device: torch.device) -> None: ...

        def models(self) -> list[torch.nn.Module]:
            return [torch.nn.Linear(1, 1)]

        def compare(self, prompts: Sequence[Prompt], firsts: Sequence[str], seconds: Sequence[str]) -> list[float]:
            asked.extend(zip(firsts, seconds, strict=True))
            return [1.0] * len(firsts)

    prompts, equal, unequal = [Prompt(0, (1,), "say")], [["a", "a", "a"]], [["a", "b", "a"]]
    Sharded("judge")(prompts, equal)
    assert asked == []
    monkeypatch.setattr("gopo_lightning.rewards.pairwise.forward_is_collective", lambda model: True)
    wins_PGG = Sharded("judge")(prompts, equal)
    assert asked == [("a", "a")]
    assert wins_PGG[0, 0, 1] == 0.5
    Sharded("judge")(prompts, unequal)
    assert len(asked) == 2  # and nothing more where there is a question
