"""Pure: losses of reward models on comparisons. Only differences of scores mean anything to the first two."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def bradley_terry(
    scores_N: Tensor, wins_NN: Tensor, margins_NN: Tensor | None = None, num_pairs: Tensor | None = None
) -> Tensor:
    """Mean over the ordered pairs (i, j) of  −W_ij · log σ(s_i − s_j − m_ij) − (1 − W_ij) · log σ(s_j − s_i − m_ji).

    Bradley and Terry (1952): i beats j with probability σ(s_i − s_j). The margin is that of Llama 2 (arXiv
    2307.09288, eq. 2): the winner has to lead by it.

    Args:
        scores_N: the model's scores.
        wins_NN: W_ij in [0, 1], how surely i beats j (½ is a tie); NaN pairs are left out of sum and
            denominator.
        margins_NN: m_ij = −m_ji, above 0 where i is preferred; none by default.
        num_pairs: the denominator; by default the ordered pairs that are asked here. On several ranks their mean over
            ranks, so that the average of the ranks' gradients is that of one process.

    Returns:
        float32 scalar; 0 with zero gradient where no pair is asked.
    """
    difference_NN = scores_N.float()[:, None] - scores_N.float()[None, :]
    asked_NN = ~wins_NN.isnan()
    if margins_NN is not None:
        difference_NN = difference_NN - margins_NN.to(difference_NN)
    wins_NN = wins_NN.nan_to_num(0.5).to(difference_NN.dtype)
    losses_NN = F.binary_cross_entropy_with_logits(difference_NN, wins_NN, reduction="none")
    return (losses_NN * asked_NN).sum() / (asked_NN.sum().clamp(min=1) if num_pairs is None else num_pairs)


def plackett_luce(scores_N: Tensor, rankings: Sequence[Sequence[int]]) -> Tensor:
    """Mean over the lists of −Σ_k log softmax(s_k, …, s_M)_k: the best is chosen first, then the best of the rest.

    Plackett (1975), Luce (1959). A list of two is `bradley_terry`.

    Args:
        scores_N: the model's scores.
        rankings: numbers of texts in each list, the best first; no ties.

    Returns:
        float32 scalar; 0 with zero gradient without a list of at least two.
    """
    losses = [scores_N.float().sum() * 0]
    for ranking in rankings:
        ordered_M = scores_N.float()[torch.tensor(ranking, device=scores_N.device)]
        rest_M = ordered_M.flip(0).logcumsumexp(0).flip(0)  # log Σ exp of this text and those below it
        losses.append((rest_M - ordered_M)[:-1].sum())
    return torch.stack(losses).sum() / max(len(rankings), 1)


def centring(scores_N: Tensor, wins_NN: Tensor, num_pairs: Tensor | None = None) -> Tensor:
    """Mean over the compared pairs of (s_i + s_j)²: keeps scores around 0 (arXiv 2312.09244), which no difference does.

    0 where no pair is asked. ``num_pairs`` as in `bradley_terry`.
    """
    sums_NN = scores_N.float()[:, None] + scores_N.float()[None, :]
    asked_NN = ~wins_NN.isnan()
    return (sums_NN**2 * asked_NN).sum() / (asked_NN.sum().clamp(min=1) if num_pairs is None else num_pairs)
