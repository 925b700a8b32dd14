"""Ordinal advantages against hand-worked numbers, scipy and their invariances; the baselines against NumPy loops."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gopo_lightning.objectives import advantages

NAN, INF = math.nan, math.inf
FLOATS = st.floats(-1e6, 1e6, width=32)
REWARDS = st.one_of(FLOATS, st.integers(-2, 2).map(float), st.just(NAN), st.sampled_from([INF, -INF]))


def groups(elements: st.SearchStrategy[float], max_size: int = 16) -> st.SearchStrategy[Tensor]:
    """[1, G] float32 with 2 <= G <= max_size."""
    rows = st.lists(elements, min_size=2, max_size=max_size)
    return rows.map(lambda row: torch.tensor([row], dtype=torch.float32))


def wins_of(rewards_PG: Tensor) -> Tensor:
    """The comparison matrix that rewards imply; NaN where either score is missing."""
    mine, other = rewards_PG.unsqueeze(-1), rewards_PG.unsqueeze(-2)
    wins = (mine > other).float() + 0.5 * (mine == other)
    return torch.where(mine.isnan() | other.isnan(), NAN, wins)


GOLDEN = [
    ([0.1, 0.9, 0.5, 0.3], [-2, 2, 2 / 3, -2 / 3]),
    ([1, 1, 0, 0], [4 / 3, 4 / 3, -4 / 3, -4 / 3]),
    ([5, 5, 5], [0, 0, 0]),
    ([3, NAN, 1, 1], [2, 0, -1, -1]),
    ([7, 2], [2, -2]),
    ([1e30, -INF, 0, INF], [2 / 3, -2, -2 / 3, 2]),
    ([INF, INF, -INF], [1, 1, -2]),
    ([NAN, 4.0], [0, 0]),
    ([NAN, NAN, NAN], [0, 0, 0]),
]


@pytest.mark.parametrize(("rewards", "expected"), GOLDEN)
def test_ordinal_equals_the_hand_worked_values(rewards: list[float], expected: list[float]) -> None:
    rewards_PG = torch.tensor([rewards])
    torch.testing.assert_close(advantages.ordinal(rewards_PG), torch.tensor([expected], dtype=torch.float32))
    assert advantages.valid(rewards_PG).tolist() == [[not math.isnan(r) for r in rewards]]


@pytest.mark.parametrize(("rewards", "expected"), GOLDEN)
def test_a_comparison_matrix_gives_the_same(rewards: list[float], expected: list[float]) -> None:
    wins_PGG = wins_of(torch.tensor([rewards]))
    actual = advantages.ordinal_from_wins(wins_PGG)
    torch.testing.assert_close(actual, torch.tensor([expected], dtype=torch.float32))


def test_ties_arbitrary_is_the_double_argsort_by_position() -> None:
    rewards_PG = torch.tensor([[1.0, 1.0, 0.0, 0.0], [5.0, 5.0, 5.0, 5.0], [3.0, NAN, 1.0, 1.0]])
    expected = [[2, 2 / 3, -2 / 3, -2], [2, 2 / 3, -2 / 3, -2], [2, 0, 0, -2]]
    torch.testing.assert_close(advantages.ordinal(rewards_PG, ties="arbitrary"), torch.tensor(expected))


@given(groups(REWARDS))
def test_ties_arbitrary_agrees_where_nothing_ties(rewards_PG: Tensor) -> None:
    scores = rewards_PG[~rewards_PG.isnan()]
    if len(scores.unique()) == len(scores):
        arbitrary = advantages.ordinal(rewards_PG, ties="arbitrary")
        assert torch.equal(arbitrary, advantages.ordinal(rewards_PG))


@given(groups(REWARDS.filter(lambda r: not math.isnan(r))))
def test_ordinal_equals_scipy_average_ranks(rewards_PG: Tensor) -> None:
    G = rewards_PG.shape[1]
    rank = scipy.stats.rankdata(-rewards_PG[0].double().numpy(), method="average")
    expected = 2 - (rank - 1) * 4 / (G - 1)
    np.testing.assert_allclose(advantages.ordinal(rewards_PG)[0].numpy(), expected, atol=1e-6)


@given(groups(REWARDS))
def test_ordinal_equals_a_numpy_loop(rewards_PG: Tensor) -> None:
    row = rewards_PG[0].numpy()
    num_valid = int(np.sum(~np.isnan(row)))
    for i, a in enumerate(advantages.ordinal(rewards_PG)[0].tolist()):
        margin = sum(float(row[i] > r) - float(row[i] < r) for r in row)
        assert a == pytest.approx(2 * margin / (num_valid - 1) if num_valid > 1 else 0, abs=1e-6)


@given(groups(REWARDS), st.randoms(use_true_random=False))
def test_permuting_a_group_permutes_its_advantages(rewards_PG: Tensor, random) -> None:
    order = list(range(rewards_PG.shape[1]))
    random.shuffle(order)
    assert torch.equal(advantages.ordinal(rewards_PG[:, order]), advantages.ordinal(rewards_PG)[:, order])


@given(groups(REWARDS), st.sampled_from(["scale", "shift", "cube", "atan", "exp"]))
def test_increasing_maps_leave_it_bit_identical(rewards_PG: Tensor, name: str) -> None:
    maps = {"scale": lambda x: 3 * x, "shift": lambda x: x - 7, "cube": lambda x: x**3}
    maps |= {"atan": torch.atan, "exp": lambda x: torch.exp(x / 1e5)}
    mapped_PG = maps[name](rewards_PG)
    pairs = rewards_PG.mT > rewards_PG  # float32 may merge neighbours: then the map is not injective on them
    if torch.equal(mapped_PG.mT > mapped_PG, pairs):
        for ties in ("average", "arbitrary"):
            before = advantages.ordinal(rewards_PG, ties=ties)
            assert torch.equal(advantages.ordinal(mapped_PG, ties=ties), before)


@given(groups(REWARDS))
def test_groups_sum_to_zero_and_stay_within_two(rewards_PG: Tensor) -> None:
    for ties in ("average", "arbitrary"):
        A = advantages.ordinal(rewards_PG, ties=ties)
        assert A.dtype == torch.float32
        assert abs(A.double().sum().item()) <= 1e-6
        assert A.abs().max().item() <= 2
        assert not A[rewards_PG.isnan()].any()


@given(groups(st.sampled_from([0.0, 1.0, NAN]), max_size=64))
def test_binary_rewards_give_exactly_twice_rloo(rewards_PG: Tensor) -> None:
    assert torch.equal(advantages.ordinal(rewards_PG), 2 * advantages.rloo(rewards_PG))


def test_scale_without_ties() -> None:
    for G, population, grpo in ((8, 1.31, 0.94), (2, 2.0, 0.71)):
        rewards_PG = torch.arange(float(G)).unsqueeze(0)
        assert advantages.ordinal(rewards_PG).std(correction=0).item() == pytest.approx(population, abs=0.005)
        assert advantages.grpo(rewards_PG).std(correction=0).item() == pytest.approx(grpo, abs=0.005)


def test_groups_do_not_mix() -> None:
    rewards_PG = torch.tensor([[1.0, 2.0], [4.0, 3.0]])
    assert advantages.ordinal(rewards_PG).tolist() == [[-2.0, 2.0], [2.0, -2.0]]


def test_float64_and_integers_are_compared_as_they_come() -> None:
    near = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64)
    assert advantages.ordinal(near).tolist() == [[-2.0, 2.0]]
    assert advantages.ordinal(torch.tensor([[2**24, 2**24 + 1]])).tolist() == [[-2.0, 2.0]]


# Comparison matrices


def test_wins_by_hand_with_abstentions_and_soft_votes() -> None:
    wins = [[NAN, 0.8, NAN], [0.4, NAN, NAN], [NAN, 1.0, NAN]]
    # 0-1 asked in both orders: 0.8 - 0.4 = 0.4. 2-1 in one: 1.0 - 0.0 = 1. 0-2 never.
    expected = torch.tensor([[0.8, 2 * (-0.4 - 1) / 2, 2.0]])
    torch.testing.assert_close(advantages.ordinal_from_wins(torch.tensor([wins])), expected)


def test_a_completion_never_asked_is_invalid_and_zero() -> None:
    wins_PGG = torch.tensor([[[0.5, 1.0, NAN], [0.0, 0.5, NAN], [NAN, NAN, 0.5]]])
    assert advantages.ordinal_from_wins(wins_PGG).tolist() == [[2.0, -2.0, 0.0]]
    assert advantages.valid_from_wins(wins_PGG).tolist() == [[True, True, False]]


@given(groups(REWARDS))
def test_wins_of_rewards_agree_with_the_rewards(rewards_PG: Tensor) -> None:
    assert torch.equal(advantages.ordinal_from_wins(wins_of(rewards_PG)), advantages.ordinal(rewards_PG))


def test_wins_are_checked() -> None:
    with pytest.raises(ValueError, match=r"1\.5.*\[0, 1\]"):
        advantages.ordinal_from_wins(torch.tensor([[[0.0, 1.5], [0.0, 0.0]]]))
    with pytest.raises(ValueError, match=r"\[P, G, G\]"):
        advantages.ordinal_from_wins(torch.zeros(1, 2, 3))


# Baselines


def test_baselines_by_hand() -> None:
    rewards_PG = torch.tensor([[1.0, 2.0, 6.0]])
    deviation = math.sqrt((4 + 1 + 9) / 2)  # unbiased
    expected = torch.tensor([[-2.0, -1.0, 3.0]])
    torch.testing.assert_close(advantages.dr_grpo(rewards_PG), expected)
    torch.testing.assert_close(advantages.rloo(rewards_PG), torch.tensor([[-3.0, -1.5, 4.5]]))
    torch.testing.assert_close(advantages.grpo(rewards_PG), expected / (deviation + 1e-4))
    torch.testing.assert_close(advantages.batch(rewards_PG), expected / (deviation + 1e-4))


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "batch"])
def test_baselines_equal_a_numpy_loop(name: str) -> None:
    rewards = np.random.default_rng(0).normal(3, 5, size=(6, 5)).astype(np.float32)
    rewards[0, 1] = rewards[2, :4] = rewards[3, :] = np.nan
    rewards[4] = 0.1
    everything = rewards[~np.isnan(rewards)].astype(np.float64)
    expected = np.zeros_like(rewards)
    for p, row in enumerate(rewards.astype(np.float64)):
        scores = row[~np.isnan(row)]
        if len(scores) < 2:
            continue
        for g, r in enumerate(row):
            if np.isnan(r):
                continue
            scale = {"grpo": scores.std(ddof=1) + 1e-4, "batch": everything.std(ddof=1) + 1e-4}.get(name, 1.0)
            baseline = (scores.sum() - r) / (len(scores) - 1) if name == "rloo" else scores.mean()
            expected[p, g] = (r - baseline) / scale
    actual = advantages.get_advantage(name)(torch.from_numpy(rewards))
    assert actual.dtype == torch.float32
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["ordinal", "grpo", "dr_grpo", "rloo", "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_group_is_exactly_zero(name: str, dtype: torch.dtype) -> None:
    rewards_PG = torch.full((1, 7), 0.1, dtype=dtype)
    rewards_PG[0, 3] = NAN
    both_PG = torch.cat([rewards_PG, torch.arange(7, dtype=dtype).unsqueeze(0)])
    assert not advantages.get_advantage(name)(both_PG)[0].any()


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "batch"])
def test_magnitudes_are_float64_and_refuse_infinity(name: str) -> None:
    huge_PG = torch.tensor([[1e38, 5e37, -1e38]])  # the float32 sum of squares overflows
    assert advantages.get_advantage(name)(huge_PG).isfinite().all()
    offset_PG = torch.tensor([[1e6 + 0.5, 1e6, 1e6 + 1.0]])
    if name in ("dr_grpo", "rloo"):
        assert advantages.get_advantage(name)(offset_PG)[0, 0].item() == 0
    with pytest.raises(ValueError, match=r"prompt 1 .*infinity"):
        advantages.get_advantage(name)(torch.tensor([[0.0, 1.0], [0.0, INF]]))


def test_batch_over_two_ranks_equals_one_process() -> None:
    rewards_PG = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)) * 3 + 10
    rewards_PG[1, 2] = NAN
    shards = [rewards_PG[:1], rewards_PG[1:]]
    recorded: list[list[Tensor]] = [[], []]
    for rank, shard in enumerate(shards):  # first pass: what each rank would contribute to the first sum
        advantages.batch(shard, all_reduce=lambda m, rank=rank: recorded[rank].append(m) or m)
    first = recorded[0][0] + recorded[1][0]
    second: list[Tensor] = []
    for shard in shards:
        replies = iter([first])
        advantages.batch(shard, all_reduce=lambda m, r=replies: next(r, None) if (m.dim()) else second.append(m) or m)
    actual = []
    for shard in shards:
        replies = iter([first, second[0] + second[1]])
        actual.append(advantages.batch(shard, all_reduce=lambda m, r=replies: next(r)))
    assert all(len(moments) == 2 and moments[0].dtype == torch.float64 for moments in recorded)
    torch.testing.assert_close(torch.cat(actual), advantages.batch(rewards_PG))


# Bad input, and choosing by name


@pytest.mark.parametrize("name", ["ordinal", "grpo", "dr_grpo", "rloo", "batch"])
def test_groups_of_one_and_wrong_shapes_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        advantages.get_advantage(name)(torch.zeros(3, 1))
    with pytest.raises(ValueError, match="shape"):
        advantages.get_advantage(name)(torch.zeros(3))


def custom(rewards_PG: Tensor, *, sharpness: float) -> Tensor:
    """An advantage of one's own, named by its dotted path."""
    return rewards_PG * sharpness


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        (lambda r: r.mean(), r"torch.float32 \(\)"),
        (lambda r: r[:1], r"torch.float32 \(1, 3\)"),
        (lambda r: r > 0, r"torch.bool \(2, 3\)"),
        (lambda r: r.tolist(), "list"),
        (lambda r: None, "NoneType"),
    ],
)
def test_an_advantage_of_the_wrong_shape_or_kind_is_refused(
    returned: Callable[[Tensor], Any], got: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.custom", lambda rewards_PG: returned(rewards_PG))
    with pytest.raises(ValueError, match=rf"'{__name__}.custom' returned {got} for .*\(2, 3\).*custom\(rewards_PG"):
        advantages.get_advantage(f"{__name__}.custom")(torch.zeros(2, 3))


@pytest.mark.parametrize("own", [True, False])
def test_an_infinity_raises_on_every_rank_after_both_sums(own: bool) -> None:
    rewards_PG = torch.tensor([[1.0, math.inf if own else 2.0]])
    sums: list[Tensor] = []

    def all_reduce(moments: Tensor) -> Tensor:
        sums.append(moments)
        return moments if own else moments + math.inf

    with pytest.raises(ValueError, match="prompt 0 .* infinity" if own else "another rank hold an infinity"):
        advantages.batch(rewards_PG, all_reduce=all_reduce)
    assert len(sums) == 2


def test_get_resolves_names_paths_and_options() -> None:
    rewards_PG = torch.tensor([[1.0, 1.0, 0.0]])
    assert advantages.get_advantage("ordinal", ties="arbitrary")(rewards_PG).tolist() == [[2.0, 0.0, -2.0]]
    assert advantages.get_advantage(f"{__name__}.custom", sharpness=3.0)(rewards_PG).tolist() == [[3.0, 3.0, 0.0]]
    doubled = advantages.get_advantage("batch", all_reduce=lambda m: 2 * m)(rewards_PG)
    assert not torch.equal(doubled, advantages.batch(rewards_PG))
    advantages.get_advantage("ordinal", all_reduce=lambda m: m)(rewards_PG)  # needs no collective: not an error


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ordinall", {}, r"unknown advantage 'ordinall'.*dr_grpo"),
        ("no.such.module", {}, "cannot be imported"),
        ("gopo_lightning.objectives.advantages.nothing", {}, "cannot be imported"),
        ("math.pi", {}, "is a float, not a function"),
        ("grpo", {"ties": "average"}, r"no option \['ties'\].*none"),
        ("batch", {"ties": "average"}, r"no option \['ties'\]; its options are none"),
        ("ordinal", {"tie": "average"}, r"no option \['tie'\].*ties"),
        ("ordinal", {"ties": "random"}, r"ties='random'.*average"),
        (f"{__name__}.custom", {}, r"needs the options \['sharpness'\]"),
    ],
)
def test_get_refuses_with_a_remedy(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        advantages.get_advantage(name, **options)


@given(st.lists(st.tuples(REWARDS, st.sampled_from("abc")), min_size=1, max_size=12))
def test_by_label(completions: list[tuple[float, str]]) -> None:
    """Each label's own rewards, wherever they stand and however many they are."""
    rewards, labels = zip(*completions, strict=True)
    found = advantages.ordinal_by_label(torch.tensor(rewards), labels).tolist()
    for label in set(labels):
        rows = [n for n, other in enumerate(labels) if other == label]
        group = [rewards[n] for n in rows]
        expected = [0.0] if len(rows) == 1 else advantages.ordinal(torch.tensor([group]))[0].tolist()
        assert [found[n] for n in rows] == expected


def test_labels_are_as_many_as_rewards() -> None:
    with pytest.raises(ValueError, match="2 rewards have 1 labels"):
        advantages.ordinal_by_label(torch.tensor([1.0, 2.0]), ["a"])
    assert advantages.ordinal_by_label(torch.tensor([]), []).shape == (0,)
