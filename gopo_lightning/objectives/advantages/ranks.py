"""Ordinal advantages: of rewards, of comparisons, and calibrated between ranks and magnitudes.

Departures from the paper (arXiv 2602.03876) and the authors' code: ties share their mean rank by default (the paper
gives no rule, the authors' code breaks ties as argsort happens to: ``ties="arbitrary"`` here); NaN (there a completion
without a score has a reward of 0), comparison matrices and the calibrated advantage are ours.
"""

import typing
from collections.abc import Hashable, Iterable
from typing import Literal

import torch
from torch import Tensor

from gopo_lightning.objectives.advantages.groups import check_groups, scaled, valid
from gopo_lightning.objectives.named import check_choice

Ties = Literal["average", "arbitrary"]


def valid_from_wins(wins_PGG: Tensor) -> Tensor:
    """bool [P, G]: the completions that were compared with at least one other, see ``ordinal_from_wins``."""
    return _asked(wins_PGG).any(-1)


def net_wins(rewards_PG: Tensor) -> Tensor:
    """(wins_i - losses_i) / (G_valid - 1) in float64, half the ordinal advantage; any leading dimensions, any G.

    0 for NaN and where nothing can be compared.
    """
    return _margin(rewards_PG).double() / (valid(rewards_PG).sum(-1, keepdim=True) - 1).clamp(min=1)


def ordinal(rewards_PG: Tensor, *, ties: Ties = "average") -> Tensor:
    """A_i = 2 (wins_i - losses_i) / (G_valid - 1): the rank within the group, from +2 (best) to -2 (worst).

    GOPO, arXiv 2602.03876: ``A_i = 2 - (rank_i - 1) 4 / (G - 1)``, written through comparisons
    (wins_i = #{j: r_i > r_j}, losses_i = #{j: r_i < r_j}), which says the same without ties.

    Args:
        rewards_PG: any real dtype; compared as they come, never rounded.
        ties: ``average``: equal rewards share one advantage. ``arbitrary``: a double argsort as in the
            authors' code, the earlier completion ranks higher (theirs, not being stable, may order them
            otherwise); noise at full strength, for reproducing that code only.

    >>> ordinal(torch.tensor([[1.0, 1.0, 0.0, 0.0]]))
    tensor([[ 1.3333,  1.3333, -1.3333, -1.3333]])
    """
    check_groups(rewards_PG)
    check_choice("ties", ties, typing.get_args(Ties))
    valid_PG = valid(rewards_PG)
    num_valid_P1 = valid_PG.sum(-1, keepdim=True)
    if ties == "average":
        margin_PG = _margin(rewards_PG)
    else:
        key_PG = rewards_PG if rewards_PG.is_floating_point() else rewards_PG.double()
        best_first_PG = torch.argsort(-key_PG, dim=-1, stable=True)  # NaN sorts last
        margin_PG = num_valid_P1 - 1 - 2 * torch.argsort(best_first_PG, dim=-1)
    return scaled(2 * margin_PG, num_valid_P1 - 1, valid_PG)


def ordinal_by_label(rewards_N: Tensor, labels_N: Iterable[Hashable]) -> Tensor:
    """float32 advantages_N: ``ordinal`` among the completions with the same label.

    Groups may stand in any order and have any sizes; a completion that is alone gets 0.

    >>> ordinal_by_label(torch.tensor([3.0, 1.0, 2.0, 7.0]), ["a", "a", "a", "b"])
    tensor([ 2., -2.,  0.,  0.])
    """
    columns: dict[Hashable, int] = {}
    sizes: list[int] = []
    places = []
    for label in labels_N:
        p = columns.setdefault(label, len(columns))
        sizes += [0] if p == len(sizes) else []
        places.append((p, sizes[p]))
        sizes[p] += 1
    if len(places) != len(rewards_N):
        raise ValueError(f"{len(rewards_N)} rewards have {len(places)} labels; each completion has one.")
    rewards_PG = torch.full((len(sizes), max(sizes, default=0)), torch.nan, dtype=torch.float64)
    p_N, g_N = torch.tensor(places, dtype=torch.int64).view(-1, 2).unbind(-1)
    rewards_PG[p_N, g_N] = rewards_N.detach().cpu().double()
    return (2 * net_wins(rewards_PG))[p_N, g_N].float().to(rewards_N.device)


def calibrated(rewards_PG: Tensor, *, tau: float) -> Tensor:
    """A_i = 2 Σ_j (2 σ((r_i − r_j) / τ) − 1) / (G_valid − 1) over the valid j ≠ i: wins by how sure they are.

    Our own. σ((r_i − r_j) / τ) is the probability that people prefer i to j, for the τ that fits their choices
    (`objectives/calibration.py`): near-ties count for little, clear wins fully. Equal rewards are ½ and contribute 0,
    equal infinities too; an infinity beats every finite reward fully. ``ordinal`` is the limit τ → 0, ties included,
    and τ · A → ``rloo`` as τ → ∞, with the constant 1: 2 σ(x) − 1 = x / 2 + O(x³).

    Args:
        rewards_PG: computed in float64.
        tau: above 0 and finite, in units of the reward. A fitted one holds for the rewards of the model that it was
            fitted for, and for no others.

    >>> calibrated(torch.tensor([[9.0, 0.0, -1.0]]), tau=1.0)
    tensor([[ 1.9997, -0.5376, -1.4620]])
    """
    check_groups(rewards_PG)
    if isinstance(tau, bool) or not isinstance(tau, float | int) or not 0 < tau < float("inf"):
        raise ValueError(
            f"tau={tau!r} is in units of the reward; it must be a finite number above 0. Set it to the difference of "
            "rewards at which one completion is preferred in 73 % of cases, or use the advantage ordinal (τ → 0)."
        )
    valid_PG = valid(rewards_PG)
    mine_PG1, other_P1G = rewards_PG.double().unsqueeze(-1), rewards_PG.double().unsqueeze(-2)
    margin_PGG = ((mine_PG1 - other_P1G) / tau / 2).tanh().nan_to_num(0.0)  # NaN: no score, or inf − inf, a tie
    return scaled(2 * margin_PGG.sum(-1), valid_PG.sum(-1, keepdim=True) - 1, valid_PG)


def ordinal_from_wins(wins_PGG: Tensor) -> Tensor:
    """A_i = 2 sum_{j asked} (W_ij - W_ji) / #asked_i: the Copeland score of a group without scalar rewards.

    ``W_ij`` in [0, 1] says how surely i beats j (1/2 is a tie, NaN is not asked or abstained); the diagonal
    is not read. A pair answered in one direction only is completed by ``W_ji = 1 - W_ij``; one answered in
    both is averaged over the two, which cancels a judge's preference for a position. A completion compared
    with nobody gets 0 and ``valid_from_wins`` is False there. With unequal #asked a group need not sum to 0.
    Equals ``ordinal`` where W comes from rewards.
    """
    if wins_PGG.dim() != 3 or wins_PGG.shape[1] != wins_PGG.shape[2]:
        raise ValueError(f"wins have shape {tuple(wins_PGG.shape)}; a comparison matrix is [P, G, G]. Reshape it.")
    check_groups(wins_PGG[..., 0])
    asked_PGG = _asked(wins_PGG)
    outside = (wins_PGG < 0) | (wins_PGG > 1)
    if bool((outside & asked_PGG).any()):
        worst = wins_PGG[outside & asked_PGG][0].item()
        raise ValueError(f"a comparison is {worst}; it must lie in [0, 1], or be NaN where nothing was asked.")
    margin_PGG = torch.where(asked_PGG, 2 * preferences(wins_PGG) - 1, 0.0)
    return scaled(2 * margin_PGG.sum(-1), asked_PGG.sum(-1), asked_PGG.any(-1))


def preferences(wins_PGG: Tensor) -> Tensor:
    """float64 [P, G, G], antisymmetric around 1/2: (W_ij + 1 - W_ji) / 2, or what the one answer of a pair implies.

    NaN where nothing was asked and on the diagonal. The mean of row i is its share of wins, (A_i + 2) / 4.
    """
    wins_PGG = wins_PGG.double()
    wins_PGG = torch.where(wins_PGG.isnan(), 1 - wins_PGG.mT, wins_PGG)
    return torch.where(_asked(wins_PGG), (wins_PGG + 1 - wins_PGG.mT) / 2, torch.nan)


def without_noise(values: Tensor) -> Tensor:
    """float64 ``values`` of size around 1, to 2**-40 (1e-12): what differs by the order of its sum only is equal.

    2 - 2/3 and 2/3 + 2/3 differ in the last bit, and completions that tie would be ranked.
    """
    return (values * 2.0**40).round() / 2.0**40


def _margin(rewards_PG: Tensor) -> Tensor:
    """int64 wins_i - losses_i; NaN neither wins nor loses, for it compares False."""
    mine_PG1, other_P1G = rewards_PG.unsqueeze(-1), rewards_PG.unsqueeze(-2)
    return (mine_PG1 > other_P1G).sum(-1) - (mine_PG1 < other_P1G).sum(-1)


def _asked(wins_PGG: Tensor) -> Tensor:
    """bool [P, G, G], symmetric: i and j were compared, in at least one order."""
    answered_PGG = ~wins_PGG.isnan()
    self_GG = torch.eye(wins_PGG.shape[-1], dtype=torch.bool, device=wins_PGG.device)
    return (answered_PGG | answered_PGG.mT) & ~self_GG
