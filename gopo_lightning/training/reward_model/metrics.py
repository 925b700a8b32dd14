"""How well scores agree with held-out judgements. Every tag is defined in docs/metrics.md."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.functional import spearman_corrcoef
from torchmetrics.utilities import dim_zero_cat

from gopo_lightning.data.comparison_batches import Comparisons

_NUM_BINS = 10
_ROWS_AT_A_TIME = 1024
"""Bounds the memory of Kendall's tau."""


def agreement(differences_Q: Tensor, preferences_Q: Tensor) -> Tensor:
    """Share of Q pairs whose preferred text has the higher score; equal scores count half, ties (½) are left out."""
    decided_Q = preferences_Q != 0.5
    return 0.5 * (1 + (differences_Q * (preferences_Q - 0.5)).sign())[decided_Q].mean()


def calibration_error(differences_Q: Tensor, preferences_Q: Tensor) -> Tensor:
    """Σ over 10 bins of confidence between ½ and 1 of (pairs in the bin / Q) · |mean confidence − mean agreement|.

    The confidence is σ(|s_i − s_j|), the agreement the preference of people for the text that has the higher score.
    """
    confidence_Q = differences_Q.abs().sigmoid()
    agreed_Q = torch.where(differences_Q >= 0, preferences_Q, 1 - preferences_Q)
    bin_Q = ((confidence_Q - 0.5) * 2 * _NUM_BINS).long().clamp(0, _NUM_BINS - 1)
    gap_B = torch.zeros(_NUM_BINS, dtype=torch.float64, device=bin_Q.device)
    gap_B.index_add_(0, bin_Q, (confidence_Q - agreed_Q).double())
    return gap_B.abs().sum() / len(bin_Q)


def kendall(scores_N: Tensor, ratings_N: Tensor) -> Tensor:
    """Kendall's tau-b: Σ sign(s_i − s_j) · sign(r_i − r_j) / √(pairs untied in s · pairs untied in r)."""
    sums = torch.zeros(3, dtype=torch.float64, device=scores_N.device)
    for rows in torch.arange(len(scores_N), device=scores_N.device).split(_ROWS_AT_A_TIME):
        s, r = (x[rows, None].sub(x[None, :]).sign().double() for x in (scores_N, ratings_N))
        sums += torch.stack([(s * r).sum(), s.abs().sum(), r.abs().sum()])
    return sums[0] / (sums[1] * sums[2]).sqrt()


class ComparisonMetrics(Metric):
    """Accuracy, log-loss, calibration, rank correlations and length bias over everything since the last reset.

    Over all ranks, whatever the batches. Where texts are rated one by one, all pairs of them count; where they come as
    pairs or lists, the pairs that were compared.

    Args:
        gap_bounds: edges between the gaps of ratings for which accuracy is given separately, ascending, above 0.
    """

    full_state_update = False
    all_pairs: Tensor
    _STATES = ("scores", "ratings", "lengths", "differences", "preferences", "gaps")

    def __init__(self, gap_bounds: Sequence[float] = ()) -> None:
        super().__init__()
        self.gap_bounds = tuple(gap_bounds)
        if list(self.gap_bounds) != sorted(set(self.gap_bounds)) or any(bound <= 0 for bound in self.gap_bounds):
            raise ValueError(f"gap_bounds={list(gap_bounds)}: they must ascend and be above 0. Use [0.5, 1, 2].")
        for state in self._STATES:
            self.add_state(state, default=[], dist_reduce_fx="cat")
        self.add_state("all_pairs", default=torch.tensor(1), dist_reduce_fx="min")

    def update(self, scores_N: Tensor, lengths_N: Tensor, batch: Comparisons) -> None:
        """Add N texts and their comparisons, without those that are padding."""
        real = slice(len(scores_N) - batch.num_padding)
        scores_N = scores_N[real]
        ratings_N = batch.ratings_N if batch.ratings_N is not None else torch.full((len(batch),), torch.nan)
        ratings_N, wins_NN = ratings_N[real].to(scores_N.device), batch.wins_NN[real, real].to(scores_N.device)
        asked_NN = ~wins_NN.isnan()
        i_Q, j_Q = (asked_NN & ~(asked_NN & asked_NN.mT).tril()).nonzero().unbind(-1)  # each pair once
        values = {
            "scores": scores_N,
            "ratings": ratings_N,
            "lengths": lengths_N[real].float(),
            "differences": scores_N[i_Q] - scores_N[j_Q],
            "preferences": wins_NN[i_Q, j_Q],
            "gaps": (ratings_N[i_Q] - ratings_N[j_Q]).abs(),
        }
        for state, value in values.items():
            getattr(self, state).append(value)
        if batch.group_sizes is not None:
            self.all_pairs = torch.zeros_like(self.all_pairs)

    def compute(self) -> dict[str, Tensor]:
        """Name → value; ratings give more of them."""
        data = self._data()
        rated = not bool(data["ratings"].isnan().any())
        values = {
            "loss": F.binary_cross_entropy_with_logits(data["differences"], data["preferences"]),
            "calibration_error": calibration_error(data["differences"], data["preferences"]),
            "length_bias": spearman_corrcoef(data["scores"], data["lengths"]),
        }
        if not rated:
            values["pair_accuracy_all"] = agreement(data["differences"], data["preferences"])
        else:
            edges = (0.0, *self.gap_bounds, math.inf)
            values["pair_accuracy"] = _accuracy(data, 1.0, math.inf)
            values["pair_accuracy_all"] = _accuracy(data, 0.0, math.inf)
            for low, high in pairwise(edges) if self.gap_bounds else ():
                values[f"pair_accuracy_gap_{low:g}-{high:g}"] = _accuracy(data, low, high)
            values["spearman"] = spearman_corrcoef(data["scores"], data["ratings"])
            values["kendall"] = kendall(data["scores"], data["ratings"])
        return {name: value.float() for name, value in values.items()}

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Differences of scores, and preferences of people, of the Q pairs that `compute` counts; a collective."""
        with self.sync_context():
            data = self._data()
        return data["differences"], data["preferences"]

    def _data(self) -> dict[str, Tensor]:
        """The states, of texts that are rated one by one with all of their pairs."""
        data = {state: dim_zero_cat(getattr(self, state)) for state in self._STATES}
        if bool(self.all_pairs) and not bool(data["ratings"].isnan().any()):
            data |= _all_pairs(data["scores"], data["ratings"])
        return data


def _all_pairs(scores_N: Tensor, ratings_N: Tensor) -> dict[str, Tensor]:
    """Every pair of differently rated texts once, in whichever batches and on whichever ranks they were."""
    i_Q, j_Q = torch.triu_indices(len(ratings_N), len(ratings_N), 1, device=ratings_N.device)
    rated_Q = ratings_N[i_Q] - ratings_N[j_Q]
    known_Q = rated_Q != 0  # no ties
    return {
        "differences": (scores_N[i_Q] - scores_N[j_Q])[known_Q],
        "preferences": (rated_Q[known_Q] > 0).to(scores_N.dtype),
        "gaps": rated_Q[known_Q].abs(),
    }


def _accuracy(data: dict[str, Tensor], low: float, high: float) -> Tensor:
    """Over the pairs with ratings more than ``low`` and at most ``high`` apart."""
    within_Q = (data["gaps"] > low) & (data["gaps"] <= high)
    return agreement(data["differences"][within_Q], data["preferences"][within_Q])
