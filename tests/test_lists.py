"""Losses of whole ranked groups: hand-worked values, loops, identities, and what they must not depend on."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from gopo_lightning.objectives import PRO, GroupPreference, Objective, PairObjective, PlackettLuce
from gopo_lightning.objectives.comparison_losses import plackett_luce
from tests.groups import CURRENT, descent, group, loss_of, permuted, random_groups, value, with_own_tokens
from tests.rollouts import experience_of

NAN = math.nan
LISTS: dict[str, Objective] = {"pro": PRO(), "plackett_luce": PlackettLuce(), "gepo": GroupPreference()}


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (PRO(sft_weight=0.0), 3.796118),
        (PRO(), 4.606118),  # .05 · 9 · 1.8 more
        (PlackettLuce(beta=1.0), 2.429258),  # as rax.listmle_loss of rax 0.4.0 says too
    ],
)
def test_a_group_by_hand(objective: Objective, expected: float) -> None:
    assert value(objective, group()) == pytest.approx(expected, abs=1e-6)


def test_gepo_by_hand() -> None:
    """Completions 1 and 4 are the best, with log-ratios .5 and .3; the mean of 2 and 3 is −.25."""
    equals = group([1.0, 0.0, 0.5, 1.0])
    preference = math.log1p(math.exp(-0.1 * (0.4 + 0.25)))
    assert preference == pytest.approx(0.661175, abs=1e-6)
    assert value(GroupPreference(variance_weight=0.0), equals) == pytest.approx(preference)
    assert value(GroupPreference(), equals) == pytest.approx(preference + 0.01)


# Second formulations, as loops


@pytest.mark.parametrize("seed", range(3))
def test_pro_equals_its_authors_loop(seed: int) -> None:
    """Sorted, each against all after it, as in their process_manager.py; without ties."""
    logprobs_NT, experience = random_groups(seed, ties=False)
    total = 0.0
    for p, rewards in enumerate(experience.rewards_PG.tolist()):
        rows = sorted(range(5), key=lambda i: -rewards[i])
        sums = [(logprobs_NT * experience.completions.mask_NT)[5 * p + i].sum().item() for i in range(5)]
        means = [sums[i] / experience.completions.lengths_N[5 * p + i].item() for i in range(5)]
        for place, k in enumerate(rows[:-1]):
            temperatures = {i: rewards[k] - rewards[i] for i in rows[place + 1 :]}
            own = means[k] * max(temperatures.values())
            negatives = sum(math.exp(means[i] * t) for i, t in temperatures.items())
            total += math.log(math.exp(own) + negatives) - own
        total += 0.05 * 4**2 * -sums[rows[0]]
    assert value(PRO(), experience, logprobs_NT) == pytest.approx(total / 3, rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_gepo_equals_a_loop(seed: int) -> None:
    logprobs_NT, experience = random_groups(seed)
    rewards_PG = experience.rewards_PG.clone()
    rewards_PG[1, :3] = rewards_PG[1].max()
    rewards_PG[2] = 1.0
    experience = replace(experience, rewards_PG=rewards_PG)
    assert experience.reference_logprobs_NT is not None
    d_N = ((logprobs_NT - experience.reference_logprobs_NT) * experience.completions.mask_NT).sum(-1).tolist()
    total = 0.0
    for p, rewards in enumerate(rewards_PG.tolist()):
        best = [d_N[5 * p + i] for i in range(5) if rewards[i] == max(rewards)]
        rest = [d_N[5 * p + i] for i in range(5) if rewards[i] < max(rewards)]
        mean = sum(best) / len(best)
        if rest:
            total += math.log1p(math.exp(-0.1 * (mean - sum(rest) / len(rest))))
        total += sum((x - mean) ** 2 for x in best) / len(best)
    assert value(GroupPreference(), experience, logprobs_NT) == pytest.approx(total / 3, rel=1e-6)


@pytest.mark.parametrize("anchor", ["reference", "old", "iterate"])
def test_plackett_luce_is_that_of_reward_models(anchor: Any) -> None:
    logprobs_NT, experience = random_groups(1, ties=False)
    frozen_NT = getattr(experience, f"{anchor}_logprobs_NT")
    scores_N = 0.3 * ((logprobs_NT - frozen_NT) * experience.completions.mask_NT).sum(-1)
    rankings = [[5 * p + int(i) for i in r.argsort(descending=True)] for p, r in enumerate(experience.rewards_PG)]
    expected = plackett_luce(scores_N, rankings).item()
    ours = PlackettLuce(beta=0.3, anchor=anchor)
    assert ours.needs == {anchor}
    assert value(ours, experience, logprobs_NT) == pytest.approx(expected, rel=1e-6)


def test_of_two_plackett_luce_and_gepo_are_dpo_and_pro_has_its_own_temperature() -> None:
    logprobs_NT, experience = random_groups(2, size=2, ties=False)
    expected = value(PairObjective(), experience, logprobs_NT)
    assert value(PlackettLuce(), experience, logprobs_NT) == pytest.approx(expected)
    assert value(GroupPreference(), experience, logprobs_NT) == pytest.approx(expected)
    pair = group([2.0, NAN, 0.0, NAN])  # mean log-probs −.6 and −2.5/3, temperature 2
    assert value(PRO(sft_weight=0.0), pair) == pytest.approx(math.log1p(math.exp(2 * (0.6 - 2.5 / 3))))


def test_pro_with_temperatures_of_one_is_list_mle_of_mean_log_probs() -> None:
    """Rewards of two levels that differ by one: each of the better against itself and all the worse."""
    levels = group([1.0, 0.0, 0.0, 1.0])
    means = [-0.6, -0.65, -2.5 / 3, -0.8]
    worse = math.exp(means[1]) + math.exp(means[2])
    expected = sum(math.log(math.exp(means[k]) + worse) - means[k] for k in (0, 3))
    assert value(PRO(sft_weight=0.0), levels) == pytest.approx(expected)


def test_pro_is_not_invariant_to_the_scale_of_rewards_and_shares_sft_with_no_tie() -> None:
    assert value(PRO(), group([4.0, 2.0, 0.0, 3.0])) != pytest.approx(value(PRO(), group()))
    shifted = group([12.0, 11.0, 10.0, 11.5])
    assert value(PRO(), shifted) == pytest.approx(value(PRO(), group()), rel=1e-9)
    two_best = group([2.0, 1.0, 0.0, 2.0])
    assert value(PRO(sft_weight=5.0), two_best) == value(PRO(sft_weight=0.0), two_best)
    with pytest.raises(ValueError, match="prompt 0 of the minibatch hold an infinity, and PRO reads differences"):
        value(PRO(), group([math.inf, 1.0, 0.0, 1.5]))


# What they must not depend on


@pytest.mark.parametrize("name", LISTS)
def test_the_order_of_completions_changes_nothing(name: str) -> None:
    logprobs_NT, experience = random_groups(3)
    rows_N, other = permuted(experience, torch.tensor([3, 0, 4, 2, 1]))
    down_PG = descent(LISTS[name], experience, logprobs_NT)
    again_PG = descent(LISTS[name], other, logprobs_NT[rows_N])
    torch.testing.assert_close(again_PG.flatten(), down_PG.flatten()[rows_N], rtol=1e-9, atol=1e-12)
    assert down_PG.abs().sum() > 0


@pytest.mark.parametrize("name", LISTS)
def test_micro_batches_add_up(name: str) -> None:
    logprobs_NT, experience = random_groups(4)
    rewards_PG = experience.rewards_PG.clone()
    rewards_PG[0, 2], rewards_PG[1, :4] = NAN, NAN
    experience = replace(experience, rewards_PG=rewards_PG)
    objective = LISTS[name]
    assert objective.active(experience).tolist() == [True, False, True]
    whole = loss_of(objective, experience, logprobs_NT)
    parts = [experience.select(torch.tensor([p])) for p in range(3)]
    logprobs = [logprobs_NT[5 * p : 5 * p + 5, : parts[p].completions.mask_NT.shape[1]] for p in range(3)]
    total = sum(objective.denominator(part, objective.mask(part)) for part in parts)
    assert total == 2
    losses = [loss_of(objective, part, lp_NT, total) for part, lp_NT in zip(parts, logprobs, strict=True)]
    assert sum(loss.value for loss in losses).item() == pytest.approx(whole.value.item(), rel=1e-9)
    for key, mean in whole.metrics.items():
        assert sum(loss.metrics[key].sum for loss in losses).item() == pytest.approx(mean.sum.item(), rel=1e-9), key
        assert sum(loss.metrics[key].count for loss in losses).item() == mean.count.item(), key
    idle = objective(logprobs[0], parts[0], torch.zeros_like(parts[0].completions.mask_NT), torch.tensor(2.0))
    assert idle.value == 0 and all(mean.count == 0 for mean in idle.metrics.values())


@pytest.mark.parametrize("name", LISTS)
def test_what_is_not_valid_is_as_if_it_were_not_there(name: str) -> None:
    logprobs_NT, experience = random_groups(7, num_prompts=1)
    kept, cut_N = torch.tensor([0, 1, 3, 4]), torch.arange(5) == 2
    fewer = permuted(experience, kept)[1]
    expected = value(LISTS[name], fewer, logprobs_NT[kept, : fewer.completions.mask_NT.shape[1]])
    spoilt_NT, rewards_PG = logprobs_NT.clone(), experience.rewards_PG.clone()
    spoilt_NT[2], rewards_PG[0, 2] = NAN, NAN
    without = [
        replace(experience, rewards_PG=rewards_PG),
        replace(experience, weights_PG=(~cut_N)[None].float()),
        replace(experience, completions=replace(experience.completions, truncated_N=cut_N)),
    ]
    for changed in without:
        objective = replace(LISTS[name], mask_truncated=bool(changed.completions.truncated_N.any()))  # type: ignore[type-var]
        assert value(objective, changed, spoilt_NT) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("rewards", [[NAN] * 4, [NAN, 1.0, NAN, NAN], [1.0] * 4])
def test_a_group_without_an_order_is_nothing_but_to_gepo(name: str, rewards: list[float]) -> None:
    """GEPO still holds together completions that are all the best."""
    empty, is_one_class = group(rewards), name == "gepo" and rewards[0] == 1.0
    variance = torch.tensor([0.5, -0.2, -0.3, 0.3]).var(correction=0).item() if is_one_class else 0.0
    assert value(LISTS[name], empty) == pytest.approx(variance, abs=1e-7)
    assert LISTS[name].active(empty).tolist() == [is_one_class]
    assert descent(LISTS[name], empty).any() == is_one_class
    assert not GroupPreference(variance_weight=0.0).active(empty).any()


@pytest.mark.parametrize("name", ["plackett_luce", "gepo"])
def test_only_the_order_of_rewards_matters(name: str) -> None:
    logprobs_NT, experience = random_groups(6)
    mapped = replace(experience, rewards_PG=experience.rewards_PG.exp() * 1e6)
    assert value(LISTS[name], mapped, logprobs_NT) == value(LISTS[name], experience, logprobs_NT)
    rewards_PG = experience.rewards_PG.clone()
    rewards_PG[0, 0] = math.inf
    assert math.isfinite(value(LISTS[name], replace(experience, rewards_PG=rewards_PG), logprobs_NT))


@pytest.mark.parametrize("name", LISTS)
def test_comparisons_alone_are_enough(name: str) -> None:
    """Of a pairwise source, whose rewards are shares of wins: here a cycle of three above a fourth."""
    wins = {(0, 1): 0.9, (1, 2): 0.8, (2, 0): 0.7, (0, 3): 1.0, (1, 3): 1.0, (2, 3): 1.0}
    p_PGG = torch.full((1, 4, 4), NAN, dtype=torch.float64)
    for (i, j), p in wins.items():
        p_PGG[0, i, j], p_PGG[0, j, i] = p, 1 - p
    shares = p_PGG[0].nanmean(-1).tolist()
    judged = replace(group(shares), preferences_PGG=p_PGG)
    scored = group(shares)
    assert value(LISTS[name], judged) == pytest.approx(value(LISTS[name], scored))
    assert not LISTS[name].needs_rewards and not LISTS[name].reads_advantages


def test_a_weight_multiplies_a_completions_own_term() -> None:
    """Of three; the worst has none."""
    current = torch.tensor([[-1.0], [-1.5], [-2.5]], dtype=torch.float64)
    experience = experience_of([[2.0, 1.0, 0.0]], reference_logprobs_NT=torch.zeros_like(current))
    experience = with_own_tokens(replace(experience, weights_PG=torch.tensor([[0.5, 1.0, 1.0]])))
    exps = [math.exp(x) for x in (-1.0, -1.5, -2.5)]
    expected = 0.5 * -math.log(exps[0] / sum(exps)) - math.log(exps[1] / (exps[1] + exps[2]))
    assert value(PlackettLuce(beta=1.0), experience, current) == pytest.approx(expected)


def test_gepo_with_equal_best_is_drawn_together() -> None:
    """The variance pulls the two best to their mean, whatever is added to all log-ratios."""
    two_best = group([1.0, 0.0, 0.5, 1.0])
    down_PG = descent(GroupPreference(), two_best) - descent(GroupPreference(variance_weight=0.0), two_best)
    assert down_PG.flatten().tolist() == pytest.approx([-0.1, 0.0, 0.0, 0.1])
    shifted_NT = CURRENT.clone()
    shifted_NT[torch.arange(4), two_best.completions.lengths_N - 1] += 2.0
    assert value(GroupPreference(), two_best, shifted_NT) == pytest.approx(value(GroupPreference(), two_best))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PRO(sft_weight=-1.0), "sft_weight=-1.0 must be finite and at least 0"),
        (lambda: PlackettLuce(beta=0.0), "beta=0.0 must be above 0"),
        (lambda: PlackettLuce(anchor="sft"), "anchor='sft' is unknown"),  # type: ignore[arg-type]
        (lambda: GroupPreference(beta=math.inf), "beta=inf must be above 0 and finite"),
        (lambda: GroupPreference(variance_weight=-0.1), "variance_weight=-0.1 must be finite"),
    ],
)
def test_bad_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_every_list_objective_says_how_many_pairs_are_in_order() -> None:
    for objective in LISTS.values():
        metrics = loss_of(objective, group()).metrics
        assert {"pair_accuracy", "pair_margin", "logprob", "kl"} == metrics.keys()
        assert metrics["pair_accuracy"].count == 6
    pairs = itertools.combinations([-0.6, -0.8, -0.65, -2.5 / 3], 2)  # of PRO the mean log-probs, the best first
    accuracy = sum(a > b for a, b in pairs)
    assert loss_of(PRO(), group()).metrics["pair_accuracy"].sum == accuracy == 5
