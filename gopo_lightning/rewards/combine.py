"""Several reward sources → one reward: rewards_PGK → rewards_PG. Shape legend: `types.py`.

All compute in float64 and return it: rewards are not rounded before they are ranked. `weighted_sum` adds magnitudes,
so every source needs the right scale. `borda` and `lexicographic` read the order within each source only: no source's
scale matters. `z_score` is the baseline between them. All but `weighted_sum` depend on the group, so their values
compare completions of one call only.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gopo_lightning.objectives import advantages
from gopo_lightning.objectives.named import Kind, Named


def weighted_sum(rewards_PGK: Tensor, *, weights: Sequence[float] | None = None) -> Tensor:
    """Σ_k w_k · r_k.

    A source of weight 0 is left out, whatever it returned. A NaN of any other source makes the sum NaN: the
    completion has no valid score. So does +inf of one source added to -inf of another.

    Args:
        rewards_PGK: one column a source; any leading dimensions.
        weights: K finite numbers; 1 each by default.

    Raises:
        ValueError: the number of weights is not K, a weight is not finite, or all are 0.
    """
    w_K = _weights(weights, rewards_PGK)
    return torch.where(w_K == 0, 0.0, rewards_PGK.double() * w_K).sum(-1)


def borda(rewards_PGK: Tensor, *, weights: Sequence[float] | None = None) -> Tensor:
    """Σ_k w_k · A_k / Σ_k |w_k| over the sources that scored the completion, A_k the ordinal advantage in source k.

    Borda's count with average ranks: free of every scale, between −2 and 2. A source that gives a completion NaN
    abstains for it: it is neither ranked by that source nor counted in the denominator. NaN in every source of
    weight ≠ 0 is NaN. A source that scores a completion and no other of its group says 0.

    Args:
        rewards_PGK: NaN where a source gave none.
        weights: K finite numbers; 1 each by default.

    >>> borda(torch.tensor([[[1.0, 30.0], [2.0, 20.0], [3.0, 10.0]]]))
    tensor([[0., 0., 0.]], dtype=torch.float64)
    """
    share_PGK = advantages.net_wins(rewards_PGK.movedim(-1, -2)).movedim(-2, -1)
    return _abstaining_mean(2 * share_PGK, ~rewards_PGK.isnan(), _weights(weights, rewards_PGK))


def z_score(rewards_PGK: Tensor, *, weights: Sequence[float] | None = None) -> Tensor:
    """Σ_k w_k · z_k / Σ_k |w_k|, z_k = (r_k − mean) / (std + 1e-4) within the group, unbiased std.

    Each source is normalised by itself before the sum, as in GDPO (arXiv 2601.05242). NaN as in `borda`.

    Args:
        rewards_PGK: NaN where a source gave none.
        weights: K finite numbers; 1 each by default.

    Raises:
        ValueError: an infinite reward, which has no magnitude to average.
    """
    alone = rewards_PGK.shape[-2] < 2  # a group of one has no spread
    columns = [r_PG.double() * 0 if alone else advantages.standardised(r_PG) for r_PG in rewards_PGK.unbind(-1)]
    scores_PGK = torch.stack(columns, -1)
    return _abstaining_mean(scores_PGK, ~rewards_PGK.isnan(), _weights(weights, rewards_PGK))


def lexicographic(rewards_PGK: Tensor, *, tolerances: Sequence[float] | None = None) -> Tensor:
    """(wins − losses) / (G_valid − 1), where the first source that tells two completions apart decides between them.

    The second source only breaks ties of the first, the third those of both, in the order of `rewards`. A source
    that gives either completion NaN abstains for that pair. NaN in every source is NaN.

    Args:
        rewards_PGK: one column a source, the most important first.
        tolerances: K numbers ≥ 0: rewards of source k that differ by no more than its tolerance are ties. 0 each by
            default. With tolerances or NaN the comparisons may form cycles; counting wins settles them.

    Raises:
        ValueError: the number of tolerances is not K, or one is negative or not finite.
    """
    K = rewards_PGK.shape[-1]
    limits = [0.0] * K if tolerances is None else list(tolerances)
    if len(limits) != K or not all(0 <= t < float("inf") for t in limits):
        raise ValueError(
            f"tolerances={tolerances} for {K} reward sources; give each source one finite number of at least 0."
        )
    outcome_PGG = torch.zeros(*rewards_PGK.shape[:-1], rewards_PGK.shape[-2], dtype=torch.int64)
    outcome_PGG = outcome_PGG.to(rewards_PGK.device)
    for r_PG, limit in zip(rewards_PGK.unbind(-1), limits, strict=True):
        mine_PG1, other_P1G = r_PG.unsqueeze(-1), r_PG.unsqueeze(-2)
        near_PGG = (mine_PG1 - other_P1G).abs() <= limit  # inf − inf is NaN, hence not near, and not ordered below
        order_PGG = (mine_PG1 > other_P1G).long() - (mine_PG1 < other_P1G).long()  # NaN compares False
        outcome_PGG = torch.where(outcome_PGG == 0, order_PGG.masked_fill(near_PGG, 0), outcome_PGG)
    valid_PG = ~rewards_PGK.isnan().all(-1)
    share_PG = outcome_PGG.sum(-1).double() / (valid_PG.sum(-1, keepdim=True) - 1).clamp(min=1)
    return share_PG.masked_fill(~valid_PG, float("nan"))


def _weights(weights: Sequence[float] | None, rewards_PGK: Tensor) -> Tensor:
    """w_K, float64 on the rewards' device; ValueError unless they are K finite numbers, not all 0."""
    K = rewards_PGK.shape[-1]
    w_K = torch.tensor([1.0] * K if weights is None else weights, dtype=torch.float64)
    if w_K.shape != (K,):
        raise ValueError(f"weights={weights} for {K} reward sources; give one weight per source.")
    if not w_K.isfinite().all() or not w_K.any():
        raise ValueError(f"weights={weights}: weights must be finite and not all 0. Give at least one source a weight.")
    return w_K.to(rewards_PGK.device)


def _abstaining_mean(values_PGK: Tensor, voted_PGK: Tensor, w_K: Tensor) -> Tensor:
    """Σ w·v / Σ |w| over the sources that voted; NaN where none of weight ≠ 0 did."""
    w_PGK = torch.where(voted_PGK, w_K, 0.0)
    total_PG = w_PGK.abs().sum(-1)
    mean_PG = (w_PGK * torch.where(voted_PGK, values_PGK, 0.0)).sum(-1) / total_PG
    return advantages.without_noise(mean_PG).masked_fill(total_PG == 0, float("nan"))


KIND = Kind(
    noun="combination",
    argument="rewards_PGK",
    axes="prompts, completions, sources",
    known={"weighted_sum": weighted_sum, "borda": borda, "lexicographic": lexicographic, "z_score": z_score},
)


def get_combination(name: str, *, num_sources: int, **options: Any) -> Named:
    """The combination ``name`` with ``options`` bound: rewards_PGK → rewards_PG.

    It is tried on one group of ``num_sources`` sources at once, so that bad options stop the run before it
    starts.

    Args:
        name: `weighted_sum`, `borda`, `lexicographic`, `z_score`, or the dotted path of a function of rewards_PGK.
        num_sources: K.
        options: keyword arguments of the function.

    Raises:
        ValueError: unknown name or option, options that do not fit K, or a result of the wrong shape.
    """
    combination = KIND.bind(name, options)
    combination(torch.zeros(1, 2, num_sources, dtype=torch.float64))
    return combination
