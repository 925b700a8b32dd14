"""PairObjective: values by hand, the first-step theorem, what its loss must not depend on, and other people's code."""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gopo_lightning.objectives import PairObjective, advantages
from gopo_lightning.objectives.links import dcg_lambda
from gopo_lightning.types import Experience
from tests.groups import (
    CURRENT,
    OLD,
    REWARDS,
    descent,
    group,
    loss_of,
    permuted,
    random_groups,
    value,
    with_own_tokens,
)
from tests.rollouts import experience_of

NAN = math.nan
METHODS: dict[str, dict[str, Any]] = {
    "dpo": {},
    "ipo": {"link": "square"},
    "slic": {"link": "hinge"},
    "dno_prct": {"anchor": "old"},
    "dno": {"anchor": "old", "target": "win_share"},
    "inpo": {"anchor": "iterate", "link": "square", "beta": 0.5, "reference_share": 0.4},
    "rebel": {"anchor": "old", "link": "regression", "beta": 1.0},
    "copg": {"link": "regression", "reduction": "completions"},
    "p3o_joint": {"anchor": "old", "link": "p3o_joint"},
    "p3o_separate": {"anchor": "old", "link": "p3o_separate"},
    "lipo": {"weight": "dcg_lambda", "reduction": "groups"},
}
ORDINAL = ("dpo", "ipo", "slic", "dno_prct", "inpo")
RLOO = ("rebel", "copg", "p3o_joint", "p3o_separate")


def named(name: str, **options: Any) -> PairObjective:
    return PairObjective(**(METHODS[name] | options))


# Values by hand; see the module docstring of objectives/pairs.py for the formulas


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (METHODS["dno_prct"] | {"beta": 0.1}, 0.680753),
        (METHODS["dno"] | {"beta": 0.1}, 0.689287),
        (METHODS["rebel"], 0.893333),
        (METHODS["copg"] | {"beta": 0.1}, 2.6793),
        (METHODS["inpo"] | {"anchor": "old"}, 0.466067),
        (METHODS["p3o_separate"], 0.008621),
        (METHODS["lipo"] | {"beta": 1.0}, 0.361125),
        (METHODS["lipo"] | {"beta": 0.05}, 0.581144),
        (METHODS["lipo"] | {"beta": 0.05, "reduction": "pairs"}, 0.387430),
    ],
)
def test_all_pairs_of_a_group(options: dict[str, Any], expected: float) -> None:
    assert value(PairObjective(**options), group()) == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"beta": 0.05}, 0.673347),  # RSO, sigmoid
        ({"beta": 0.05, "link": "hinge"}, 0.96),
        (METHODS["dno_prct"] | {"beta": 0.1}, 0.673347),
        (METHODS["rebel"], 2.56),
        (METHODS["rebel"] | {"skip_tokens": 1}, 3.61),  # REFUEL: from the second token on
        (METHODS["inpo"] | {"anchor": "old", "beta": 0.005, "reference_share": 1 / 3}, 9893.617778),
        (METHODS["p3o_separate"], 0.017523),
        (METHODS["p3o_joint"], -0.182322),
    ],
)
def test_the_pair_of_the_best_and_the_worst(options: dict[str, Any], expected: float) -> None:
    """Completions 1 and 3 of four, whose log-ratios differ by .8 (reference) and .4 (old)."""
    only = PairObjective(**(options | {"pairs": "best_worst"}))
    assert value(only, group()) == pytest.approx(expected, rel=1e-6, abs=5e-7)


def test_the_joint_clip_reads_every_pair_from_its_better_completion() -> None:
    """Clipped at log 1.2 whichever comes first; a clip that reads pairs in the order of completions gives −.092013."""
    d, terms = [0.2, -0.1, -0.2, 0.2], []
    for i, j in itertools.combinations(range(4), 2):
        better, worse = (i, j) if REWARDS[i] > REWARDS[j] else (j, i)
        product = min(max(math.exp(d[i] + d[j]), 0.8), 1.2)
        terms.append(product * abs(REWARDS[i] - REWARDS[j]) * min(d[better] - d[worse], math.log(1.2)) / 2)
    assert value(named("p3o_joint"), group()) == pytest.approx(-sum(terms) / 6, rel=1e-6)


@pytest.mark.parametrize("link", ["p3o_joint", "p3o_separate"])
def test_within_the_clip_the_gradient_is_that_of_theorem_1(link: str) -> None:
    """Σ_j (r_i − r_j) ρ_i ρ_j / 2 over the pairs, off-policy."""
    changes = torch.tensor([0.05, -0.03, 0.02, 0.04], dtype=torch.float64)
    logprobs_NT = OLD.clone()
    logprobs_NT[torch.arange(4), torch.tensor([2, 1, 2, 0])] += changes
    expected = torch.tensor([[0.309359, -0.044598, -0.393985, 0.129224]], dtype=torch.float64)
    torch.testing.assert_close(descent(named(link), group(), logprobs_NT), expected, rtol=0, atol=5e-7)


def test_a_tie_is_half_each_way() -> None:
    """INPO at h = .3, η = .5: ½ (.3 − 1)² + ½ (−.3 − 1)² = h² + 1; skipped, there is nothing."""
    current = torch.tensor([[-1.0], [-1.3]], dtype=torch.float64)
    tie = with_own_tokens(experience_of([[1.0, 1.0]], reference_logprobs_NT=torch.full_like(current, -1.0)))
    ipo = PairObjective(link="square", beta=0.5)
    assert value(ipo, tie, current) == pytest.approx(1.09)
    assert value(replace(ipo, ties="skip"), tie, current) == 0.0
    assert ipo.active(tie).tolist() == [True] and replace(ipo, ties="skip").active(tie).tolist() == [False]


def test_copg_of_two_is_ipo() -> None:
    """Rewards ±¼ and log-ratios .5, −.3: β² (.8 − 1/(2β))² at β = .1 is .1764."""
    current = torch.tensor([[-0.5], [-1.3]], dtype=torch.float64)
    pair = with_own_tokens(experience_of([[0.25, -0.25]], reference_logprobs_NT=torch.full_like(current, -1.0)))
    assert value(named("copg"), pair, current) == pytest.approx(0.1764)
    assert value(named("ipo"), pair, current) == pytest.approx(0.1764 / 0.01)


# The first-step theorem


def at_anchor(logprobs_NT: Tensor, experience: Experience) -> Experience:
    """Every anchor is the current policy."""
    return replace(
        experience,
        old_logprobs_NT=None,
        reference_logprobs_NT=logprobs_NT,
        iterate_logprobs_NT=logprobs_NT,
    )


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0).item()


@pytest.mark.parametrize("name", [*ORDINAL, *RLOO])
@pytest.mark.parametrize("seed", range(3))
def test_at_the_anchor_the_gradient_is_an_advantage(name: str, seed: int) -> None:
    logprobs_NT, experience = random_groups(seed)
    experience = at_anchor(logprobs_NT, experience)
    advantage = advantages.ordinal if name in ORDINAL else advantages.rloo
    other = advantages.rloo if name in ORDINAL else advantages.ordinal
    down_PG = descent(named(name), experience, logprobs_NT)
    assert cosine(down_PG, advantage(experience.rewards_PG)) == pytest.approx(1, abs=1e-6)
    assert cosine(down_PG, other(experience.rewards_PG)) < 0.999


@pytest.mark.parametrize(
    ("name", "beta", "expected"),
    [
        ("dpo", 0.1, [0.025, -0.008333, -0.025, 0.008333]),
        ("inpo", 0.5, [1.0, -0.333333, -1.0, 0.333333]),
        ("rebel", 1.0, [1.166667, -0.166667, -1.5, 0.5]),
        ("p3o_joint", 0.1, [0.291667, -0.041667, -0.375, 0.125]),
        ("p3o_separate", 0.1, [0.291667, -0.041667, -0.375, 0.125]),
    ],
)
def test_the_constants_of_the_theorem(name: str, beta: float, expected: list[float]) -> None:
    down_PG = descent(named(name, beta=beta), at_anchor(CURRENT, group()))
    assert down_PG.flatten().tolist() == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_of_copg_is_rloo_of_the_regularised_reward_at_any_policy(seed: int) -> None:
    logprobs_NT, experience = random_groups(seed)
    mask_NT = experience.completions.mask_NT
    d_PG = ((logprobs_NT - experience.reference_logprobs_NT) * mask_NT).sum(-1).view_as(experience.rewards_PG)
    expected = 2 * 0.1 * advantages.rloo(experience.rewards_PG - 0.1 * d_PG).double() / 3  # the mean over three groups
    torch.testing.assert_close(descent(named("copg"), experience, logprobs_NT), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("name", "beta"), [("dpo", 0.1), ("ipo", 0.1), ("slic", 0.5)])
def test_once_the_policy_has_left_the_reference_dpo_is_no_longer_gopo(name: str, beta: float) -> None:
    """By 5 nats. A hinge stays it while every |m| < 1/β."""
    logprobs_NT, experience = random_groups(0, ties=False)
    spread_NT = 5 * torch.randn(len(logprobs_NT), 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    first_NT = torch.zeros_like(logprobs_NT).index_fill(1, torch.tensor([0]), 1.0)
    moved = replace(at_anchor(logprobs_NT, experience), reference_logprobs_NT=logprobs_NT + spread_NT * first_NT)
    down_PG = descent(named(name, beta=beta), moved, logprobs_NT)
    assert cosine(down_PG, advantages.ordinal(experience.rewards_PG)) < 0.999


def test_the_theorem_needs_groups_of_equally_many_valid_completions_and_all_pairs() -> None:
    logprobs_NT, experience = random_groups(0, ties=False)
    experience = at_anchor(logprobs_NT, experience)
    rewards_PG = experience.rewards_PG.clone()
    rewards_PG[0, :3] = NAN
    ragged = replace(experience, rewards_PG=rewards_PG)
    assert cosine(descent(named("dpo"), ragged, logprobs_NT), advantages.ordinal(rewards_PG)) < 0.999
    for pairs in ({"pairs": "best_worst"}, {"pairs": "random", "num_random_pairs": 3}):
        down_PG = descent(named("dpo", **pairs), experience, logprobs_NT)
        assert cosine(down_PG, advantages.ordinal(experience.rewards_PG)) < 0.999


# What the loss must not depend on


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "options",
    [{}, {"pairs": "best_worst"}, {"pairs": "adjacent"}, {"pairs": "random", "num_random_pairs": 4}, {"ties": "skip"}],
    ids=str,
)
def test_the_order_of_completions_changes_nothing(name: str, options: dict[str, Any]) -> None:
    logprobs_NT, experience = random_groups(3)
    rows_N, other = permuted(experience, torch.tensor([3, 0, 4, 2, 1]))
    down_PG = descent(named(name, **options), experience, logprobs_NT)
    again_PG = descent(named(name, **options), other, logprobs_NT[rows_N])
    torch.testing.assert_close(again_PG.flatten(), down_PG.flatten()[rows_N], rtol=1e-9, atol=1e-12)
    assert down_PG.abs().sum() > 0


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("reduction", ["pairs", "groups", "completions"])
def test_micro_batches_add_up(name: str, reduction: str) -> None:
    """Also one that only keeps ranks in step, whose mask is empty."""
    logprobs_NT, experience = random_groups(4)
    rewards_PG = experience.rewards_PG.clone()
    rewards_PG[0, 2], rewards_PG[1, :4] = NAN, NAN
    weights_PG = torch.ones(3, 5)
    weights_PG[2, 1], weights_PG[0, 0] = 0.5, 0.0
    experience = replace(experience, rewards_PG=rewards_PG, weights_PG=weights_PG)
    objective = named(name, reduction=reduction)
    whole = loss_of(objective, experience, logprobs_NT)
    assert objective.active(experience).tolist() == [True, False, True]

    parts = [experience.select(torch.tensor([p])) for p in range(3)]
    logprobs = [logprobs_NT[5 * p : 5 * p + 5, : parts[p].completions.mask_NT.shape[1]] for p in range(3)]
    total = sum(objective.denominator(part, objective.mask(part)) for part in parts)
    losses = [loss_of(objective, part, lp_NT, total) for part, lp_NT in zip(parts, logprobs, strict=True)]
    assert sum(loss.value for loss in losses).item() == pytest.approx(whole.value.item(), rel=1e-9)
    for key, mean in whole.metrics.items():
        assert sum(loss.metrics[key].sum for loss in losses).item() == pytest.approx(mean.sum.item(), rel=1e-9), key
        assert sum(loss.metrics[key].count for loss in losses).item() == mean.count.item(), key
    idle = objective(logprobs[0], parts[0], torch.zeros_like(parts[0].completions.mask_NT), total)
    assert idle.value == 0 and all(mean.count == 0 for mean in idle.metrics.values())


@pytest.mark.parametrize("name", RLOO)
def test_what_is_added_to_all_rewards_of_a_prompt_changes_nothing(name: str) -> None:
    logprobs_NT, experience = random_groups(5)
    shifted = replace(experience, rewards_PG=experience.rewards_PG + torch.tensor([[4.0], [-8.0], [0.5]]))
    assert value(named(name), shifted, logprobs_NT) == value(named(name), experience, logprobs_NT)
    doubled = replace(experience, rewards_PG=2 * experience.rewards_PG)
    assert value(named(name), doubled, logprobs_NT) != value(named(name), experience, logprobs_NT)


@pytest.mark.parametrize("name", [*ORDINAL, "dno", "lipo"])
def test_only_the_order_of_rewards_matters(name: str) -> None:
    logprobs_NT, experience = random_groups(6)
    mapped = replace(experience, rewards_PG=experience.rewards_PG.exp() * 1e6)
    assert value(named(name), mapped, logprobs_NT) == value(named(name), experience, logprobs_NT)
    rewards_PG = experience.rewards_PG.clone()
    rewards_PG[0, 0], rewards_PG[1, 1] = math.inf, -math.inf
    assert math.isfinite(value(named(name), replace(experience, rewards_PG=rewards_PG), logprobs_NT))


@pytest.mark.parametrize("name", RLOO)
def test_an_infinite_reward_has_no_difference(name: str) -> None:
    with pytest.raises(ValueError, match="prompt 0 of the minibatch hold an infinity, and PairObjective reads diff"):
        value(named(name), group([math.inf, 1.0, 0.0, 1.5]))


@pytest.mark.parametrize("name", METHODS)
def test_what_is_not_valid_is_as_if_it_were_not_there(name: str) -> None:
    """NaN, a weight of 0, or cut off under mask_truncated; its log-probs may be anything."""
    logprobs_NT, experience = random_groups(7, num_prompts=1)
    kept = torch.tensor([0, 1, 3, 4])
    fewer = replace(
        permuted(experience, kept)[1],
        max_new_tokens=7,
    )
    expected = value(named(name), fewer, logprobs_NT[kept, : fewer.completions.mask_NT.shape[1]])
    spoilt_NT = logprobs_NT.clone()
    spoilt_NT[2] = NAN
    rewards_PG = experience.rewards_PG.clone()
    rewards_PG[0, 2] = NAN
    cut_N = torch.arange(5) == 2
    without = {
        "no reward": replace(experience, rewards_PG=rewards_PG),
        "no weight": replace(experience, weights_PG=(~cut_N)[None].float()),
        "cut off": replace(experience, completions=replace(experience.completions, truncated_N=cut_N)),
    }
    for reason, changed in without.items():
        objective = named(name, mask_truncated=reason == "cut off")
        assert value(objective, changed, spoilt_NT) == pytest.approx(expected, rel=1e-9), reason


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("rewards", [[NAN] * 4, [NAN, 1.0, NAN, NAN]])
def test_a_group_without_a_pair_is_nothing(name: str, rewards: list[float]) -> None:
    empty = group(rewards, iterate_logprobs_NT=OLD)
    assert value(named(name), empty) == 0.0 and not descent(named(name), empty).any()
    assert named(name).active(empty).tolist() == [False]
    assert named(name).denominator(empty, named(name).mask(empty)) == 0


@pytest.mark.parametrize("name", ["dpo", "ipo", "slic", "rebel", "copg", "p3o_joint", "p3o_separate"])
def test_a_tied_group_is_drawn_together_or_left_alone(name: str) -> None:
    tied = group([1.0] * 4)
    options = {"beta": 10.0} if name == "slic" else {}  # within 1/β a hinge is flat
    down_PG = descent(named(name, **options), tied)
    if name.startswith("p3o"):
        assert not down_PG.any()
    else:
        d = torch.tensor([[0.5, -0.2, -0.3, 0.3]] if name != "rebel" else [[0.2, -0.1, -0.2, 0.2]])
        assert (down_PG * (d - d.mean())).sum() < 0
    assert value(named(name, ties="skip"), tied) == 0.0


def test_the_same_tokens_twice_are_no_pair() -> None:
    """The completion of one token becomes that of another; equal texts of other tokens stay a pair."""
    current = torch.tensor([[-1.0], [-1.5], [-1.5]], dtype=torch.float64)
    experience = experience_of([[2.0, 1.0, 0.0]], reference_logprobs_NT=torch.zeros_like(current))
    tokens_NT = torch.tensor([[5], [7], [7]])
    experience = replace(experience, completions=replace(experience.completions, tokens_NT=tokens_NT))
    dpo = named("dpo", beta=1.0)
    assert value(dpo, experience, current) == pytest.approx(math.log1p(math.exp(-0.5)))
    assert dpo.denominator(experience, dpo.mask(experience)) == 2


def test_comparisons_are_read_where_the_advantage_reads_them() -> None:
    """Soft ones split a pair: .8 · softplus(−βm) + .2 · softplus(βm); what nobody compared is no pair."""
    current = torch.tensor([[-1.0], [-1.5], [-2.0]], dtype=torch.float64)
    p_PGG = torch.tensor([[[NAN, 0.8, NAN], [0.2, NAN, NAN], [NAN, NAN, NAN]]], dtype=torch.float64)
    experience = experience_of([[0.8, 0.2, NAN]], reference_logprobs_NT=torch.zeros_like(current))
    experience = replace(with_own_tokens(experience), preferences_PGG=p_PGG)
    expected = 0.8 * math.log1p(math.exp(-0.5)) + 0.2 * math.log1p(math.exp(0.5))
    assert value(named("dpo", beta=1.0), experience, current) == pytest.approx(expected)


# Which pairs


def weights_of(objective: PairObjective, experience: Experience) -> dict[tuple[int, int], float]:
    _, weights_PGG = objective._weights(experience, objective.mask(experience))
    assert torch.equal(weights_PGG, weights_PGG.mT)
    return {(i, j): weights_PGG[0, i, j].item() for i in range(4) for j in range(i) if weights_PGG[0, i, j] > 0}


def test_pairs_of_a_group_with_ties() -> None:
    """Completions 0 and 1 are the best, 2 and 3 below them."""
    ranked = group([2.0, 2.0, 1.0, 0.0], draws_PGG=torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(0)))
    assert weights_of(PairObjective(pairs="best_worst"), ranked) == {(3, 0): 0.5, (3, 1): 0.5}
    assert weights_of(PairObjective(pairs="adjacent"), ranked) == {(2, 0): 0.5, (2, 1): 0.5, (3, 2): 1.0}
    every = set(itertools.combinations(range(4), 2))
    assert {(j, i) for i, j in weights_of(PairObjective(), ranked)} == every
    assert (1, 0) not in weights_of(PairObjective(ties="skip"), ranked)
    assert weights_of(PairObjective(min_margin=1.5), ranked) == {(3, 0): 1.0, (3, 1): 1.0}
    margins = {(1, 0): 0.0, (2, 0): 1.0, (2, 1): 1.0, (3, 0): 2.0, (3, 1): 2.0, (3, 2): 1.0}
    assert weights_of(PairObjective(weight="margin"), ranked) == {k: v for k, v in margins.items() if v}


def test_random_pairs_are_drawn_among_those_that_count_each_as_often() -> None:
    seen: dict[tuple[int, int], int] = defaultdict(int)
    objective = PairObjective(pairs="random", num_random_pairs=2, ties="skip")
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        draws_PGG = torch.rand(1, 4, 4, generator=generator, dtype=torch.float64)
        drawn = weights_of(objective, group([2.0, 2.0, 1.0, NAN], draws_PGG=draws_PGG))
        assert len(drawn) == 2 and set(drawn.values()) == {1.0}
        for pair in drawn:
            seen[pair] += 1
    assert seen.keys() == {(2, 0), (2, 1)}
    all_of_them = weights_of(replace(objective, num_random_pairs=4), group(draws_PGG=torch.rand(1, 4, 4)))
    assert len(all_of_them) == 4
    counts: dict[tuple[int, int], int] = defaultdict(int)
    for _ in range(600):
        for pair in weights_of(objective, group(draws_PGG=torch.rand(1, 4, 4, generator=generator))):
            counts[pair] += 1
    assert len(counts) == 6 and all(abs(count - 200) < 47 for count in counts.values()), counts  # 4 standard deviations
    with pytest.raises(ValueError, match="needs draws_PGG"):
        value(objective, group())


# Identities between methods


def test_methods_that_are_one_another() -> None:
    logprobs_NT, experience = random_groups(8)
    inpo, ipo = named("inpo", reference_share=1.0), named("ipo", beta=0.5)
    assert value(inpo, experience, logprobs_NT) == pytest.approx(value(ipo, experience, logprobs_NT))
    plain = {"link": "square", "beta": 0.5, "anchor": "iterate"}
    assert value(PairObjective(**plain), experience, logprobs_NT) == value(
        named("inpo", reference_share=0.0), experience, logprobs_NT
    )
    assert value(named("rebel", skip_tokens=0), experience, logprobs_NT) == value(
        named("rebel"), experience, logprobs_NT
    )
    off_reference = replace(experience, old_logprobs_NT=experience.reference_logprobs_NT)
    assert value(named("dno_prct"), off_reference, logprobs_NT) == value(named("dpo"), experience, logprobs_NT)


def test_old_log_probs_that_are_missing_are_the_current_ones() -> None:
    assert value(named("dno_prct"), replace(group(), old_logprobs_NT=None)) == pytest.approx(math.log(2))
    with pytest.raises(ValueError, match="needs the reference's log-probs, which are missing"):
        value(named("dpo"), replace(group(), reference_logprobs_NT=None))


@pytest.mark.parametrize(("name", "anchor"), [("rebel", "old"), ("copg", "reference")])
def test_the_minimum_over_a_bandit_is_the_tilted_anchor(name: str, anchor: str) -> None:
    """Five arms as the five completions of a group, whoever drew them: π ∝ π_anchor · exp(r / β)."""
    generator = torch.Generator().manual_seed(2)
    anchor_N = torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(0)
    rewards = torch.randn(5, generator=generator, dtype=torch.float64)
    experience = with_own_tokens(experience_of([rewards.tolist()], **{f"{anchor}_logprobs_NT": anchor_N[:, None]}))
    objective = named(name, beta=0.7)
    logits_N = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits_N], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(objective, experience, logits_N.log_softmax(0)[:, None]).value
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    expected = (anchor_N + rewards / 0.7).softmax(0)
    torch.testing.assert_close(logits_N.softmax(0).detach(), expected, rtol=0, atol=1e-6)


# Loops over Python floats, and other people's code


def pair_loss(link: str, m: float, gap: float, p: float, beta: float) -> float:
    """Of one ordered pair, weighted."""
    losses: dict[str, Callable[[], float]] = {
        "logistic": lambda: p * math.log1p(math.exp(-beta * m)),
        "hinge": lambda: p * max(0.0, 1 - beta * m),
        "square": lambda: p * (m - 1 / (2 * beta)) ** 2,
        "regression": lambda: 0.5 * (beta * m - gap) ** 2,
    }
    return losses[link]()


@pytest.mark.parametrize("link", ["logistic", "hinge", "square", "regression"])
@pytest.mark.parametrize("length_normalised", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_equals_loops_over_ordered_pairs(link: str, length_normalised: bool, seed: int) -> None:
    logprobs_NT, experience = random_groups(seed)
    objective = PairObjective(link=link, beta=0.3, length_normalised=length_normalised)  # type: ignore[arg-type]
    total = pairs = 0.0
    lengths = experience.completions.lengths_N.tolist()
    for p, rewards in enumerate(experience.rewards_PG.tolist()):
        d = []
        for n in range(5 * p, 5 * p + 5):
            x = sum((logprobs_NT[n, t] - experience.reference_logprobs_NT[n, t]).item() for t in range(lengths[n]))
            d.append(x / lengths[n] if length_normalised else x)
        for i, j in itertools.permutations(range(5), 2):
            better = 0.5 * ((rewards[i] > rewards[j]) + (rewards[i] >= rewards[j]))
            total += pair_loss(link, d[i] - d[j], rewards[i] - rewards[j], better, 0.3)
            pairs += 0.5
    assert value(objective, experience, logprobs_NT) == pytest.approx(total / pairs, rel=1e-6)


def test_the_weights_of_lipo_are_changes_of_dcg() -> None:
    """Sorted by the policy's scores, DCG before and after two swap places."""
    scores, gains = [0.3, -0.2, 1.1, 0.0], [0.75, 0.25, 0.0, 0.5]
    place = {n: k + 1 for k, n in enumerate(sorted(range(4), key=lambda n: -scores[n]))}
    lambdas = dcg_lambda(torch.tensor([scores]), torch.tensor([gains]), torch.ones(1, 4, dtype=torch.bool))[0]

    def dcg(i: int, j: int, at_i: int, at_j: int) -> float:
        return (2 ** gains[i] - 1) / math.log2(1 + at_i) + (2 ** gains[j] - 1) / math.log2(1 + at_j)

    for i, j in itertools.permutations(range(4), 2):
        change = abs(dcg(i, j, place[i], place[j]) - dcg(i, j, place[j], place[i]))
        assert lambdas[i, j].item() == pytest.approx(change, abs=1e-6)


@pytest.mark.parametrize(
    ("beta", "expected", "gradient"),
    [
        (1.0, 0.24075012, None),
        (0.05, 0.3874296, [-0.2402145, 0.08599712, 0.1583952, -0.00417783]),
    ],
)
def test_lipo_equals_rax(beta: float, expected: float, gradient: list[float] | None) -> None:
    """`rax.pairwise_logistic_loss(s, psi, lambdaweight_fn=rax.dcg_lambdaweight)` of rax 0.4.0 with jax 0.5.3, run once
    in an environment of its own: s = β · log-ratios, psi = (.75, .25, 0, .5); and its gradient with respect to s."""
    lipo = named("lipo", beta=beta, reduction="pairs")
    assert value(lipo, group()) == pytest.approx(expected, abs=1e-6)
    if gradient is not None:
        down_PG = descent(lipo, group()) / beta
        assert (-down_PG).flatten().tolist() == pytest.approx(gradient, abs=1e-6)


@pytest.mark.parametrize(
    ("loss_type", "options"),
    [("sigmoid", {}), ("ipo", {"link": "square", "length_normalised": True}), ("hinge", {"link": "hinge"})],
)
def test_equals_trl(loss_type: str, options: dict[str, Any]) -> None:
    """`DPOTrainer._compute_loss` of TRL 1.16 on the same log-probs: two prompts, of each the better and the worse."""
    dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    logprobs_NT, experience = random_groups(9, num_prompts=2, size=2, ties=False)
    better = [0 if a > b else 1 for a, b in experience.rewards_PG.tolist()]
    rows = [2 * p + i for p, i in enumerate(better)] + [2 * p + 1 - i for p, i in enumerate(better)]
    mask_NT, reference_NT = experience.completions.mask_NT, experience.reference_logprobs_NT
    assert reference_NT is not None
    reference_N = (reference_NT * mask_NT).sum(-1)[rows]
    padded = torch.nn.functional.pad(mask_NT[rows], (1, 0)).long()  # a prompt of one token
    per_token = {name: torch.zeros(4, 7) for name in ("entropy", "mean_logits", "is_top1")}
    outputs = SimpleNamespace(log_probs=(logprobs_NT * mask_NT)[rows], **per_token)
    outputs.is_top1 = outputs.is_top1.bool()
    same = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=same,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        use_weighting=False,
        beta=0.2,
        _total_train_tokens=0,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    inputs = {
        "input_ids": torch.ones(4, 8, dtype=torch.int64),
        "attention_mask": torch.ones(4, 8),
        "completion_mask": padded,
        "ref_chosen_logps": reference_N[:2],
        "ref_rejected_logps": reference_N[2:],
    }
    theirs = dpo_trainer.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)
    ours = value(PairObjective(beta=0.2, **options), experience, logprobs_NT)
    assert ours == pytest.approx(theirs.item(), rel=1e-6)


# Metrics and settings


def test_metrics_have_counts_of_their_own() -> None:
    """Log-ratios .5, −.2, −.3, .3 of completions ranked 1, 3, 4, 2: every pair is in order."""
    metrics = loss_of(named("dpo"), group()).metrics
    assert metrics["pair_accuracy"].sum == 6 and metrics["pair_accuracy"].count == 6
    assert metrics["pair_margin"].sum.item() == pytest.approx(0.7 + 0.8 + 0.2 + 0.1 + 0.5 + 0.6)
    assert metrics["logprob"].count == 9 and metrics["logprob"].sum.item() == pytest.approx(-6.4)
    assert {"pair_accuracy", "pair_margin", "logprob", "kl"} == metrics.keys()
    tied = loss_of(named("dpo"), group([1.0, 1.0, 1.0, 0.0])).metrics
    assert tied["pair_accuracy"].count == 3 and tied["pair_accuracy"].sum == 1  # .5 and −.2 and −.3 against .3
    first = loss_of(named("dpo"), at_anchor(CURRENT, group())).metrics
    assert first["pair_accuracy"].sum == 3  # equal log-ratios are half right


def test_the_clip_is_counted_where_it_acts() -> None:
    joint = loss_of(named("p3o_joint"), group()).metrics["pair_clip_fraction"]
    assert (joint.sum, joint.count) == (2 * 4, 2 * 6)  # of .3 .4 0 .1 −.3 −.4, those above log 1.2 for the better one
    separate = loss_of(named("p3o_separate", clip=0.1), group()).metrics["pair_clip_fraction"]
    # ratios 1.22 .90 .82 1.22: 1 stops against all, 4 against 2 and 3, 3 against all; 2 is within .9 and 1.1
    assert (separate.sum, separate.count) == (3 + 2 + 3, 12)


@pytest.mark.parametrize("link", ["p3o_joint", "p3o_separate"])
def test_a_ratio_beyond_the_range_of_the_type_does_no_harm_to_a_tie(link: str) -> None:
    far_NT = CURRENT.clone()
    far_NT[0, 0] += 1000
    assert value(named(link), group([1.0, 1.0, NAN, NAN]), far_NT) == 0.0
    assert not descent(named(link), group([1.0, 1.0, NAN, NAN]), far_NT).any()


def test_needs() -> None:
    assert named("dpo").needs == {"reference"}
    assert named("rebel").needs == {"old"}
    assert named("inpo").needs == {"iterate", "reference"}
    assert named("inpo", reference_share=0.0).needs == {"iterate"}
    assert {name for name in METHODS if named(name).needs_rewards} == set(RLOO)
    assert named("dpo", weight="margin").needs_rewards
    assert not PairObjective.reads_advantages


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"link": "sigmoid"}, "link='sigmoid' is unknown; choose one of"),
        ({"anchor": "sft"}, "anchor='sft' is unknown"),
        ({"beta": 0.0}, "beta=0.0 must be above 0"),
        ({"link": "p3o_joint", "beta": 0.2}, "beta=0.2 has no effect with link=p3o_joint"),
        ({"clip": 0.1}, "clip=0.1 has no effect with link=logistic"),
        ({"link": "p3o_joint", "clip": 1.0}, "clip=1.0 must lie between 0 and 1"),
        ({"link": "regression", "target": "win_share"}, "target='win_share' has no effect"),
        ({"link": "regression", "weight": "dcg_lambda"}, "weight='dcg_lambda' has no effect"),
        ({"reference_share": 0.5}, "reference_share=0.5 has no effect with anchor=reference"),
        ({"anchor": "old", "reference_share": 1.5}, "reference_share=1.5 must lie in"),
        ({"pairs": "random"}, "pairs: random needs their number"),
        ({"num_random_pairs": 2}, "nothing else reads it"),
        ({"pairs": "random", "num_random_pairs": 0}, "num_random_pairs=0 must be at least 1"),
        ({"min_margin": -1.0}, "min_margin=-1.0 must be finite and at least 0"),
        ({"skip_tokens": -1}, "skip_tokens=-1 must be at least 0"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PairObjective(**options)
