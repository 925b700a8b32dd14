"""Which pairs of a group are compared, and how much each counts. Pure.

Shape legend: see `types.py`. A pair (i, j) of a group can be compared where both completions are valid (they have a
reward, a weight and unmasked tokens), their tokens differ (else no log-ratio does), and it is known which is better.
What follows is symmetric in i and j, so the order of completions within a group does not matter.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gopo_lightning.objectives.advantages import without_noise
from gopo_lightning.objectives.base import Objective
from gopo_lightning.types import Experience

PairSelection = Literal["all", "best_worst", "adjacent", "random"]


@dataclass(frozen=True)
class GroupObjective(Objective):
    """An objective that compares whole completions of a group, by their rewards or by a pairwise source.

    It reads the comparisons of a pairwise source where the ordinal advantage does (`rewards.reads_wins`), else the
    rewards. It reads no advantages.
    """

    mask_truncated: bool = False
    """Leave completions cut off by max_new_tokens out of the loss, with all their pairs."""

    reads_advantages = False

    def mask(self, experience: Experience) -> Tensor:
        """Also without completions that were cut off, under ``mask_truncated``."""
        mask_NT = super().mask(experience)
        return mask_NT & ~experience.completions.truncated_N[:, None] if self.mask_truncated else mask_NT


class Standing(NamedTuple):
    """How the completions of P groups compare. All on the device of the rewards."""

    valid_PG: Tensor
    """bool: may be compared."""
    prefers_PGG: Tensor
    """float64 in [0, 1]: how surely i is better than j, ½ for a tie; NaN where that is unknown."""
    share_PG: Tensor
    """float64: the mean of ``prefers_PGG`` over the others that are valid; 0 where there are none."""
    rewards_PG: Tensor
    """float64; 0 where not valid."""
    weights_PG: Tensor
    """float64; how much a completion counts, 0 where not valid."""

    @property
    def gaps_PGG(self) -> Tensor:
        """float64 r_i − r_j; 0 between equal infinities."""
        return (self.rewards_PG.unsqueeze(-1) - self.rewards_PG.unsqueeze(-2)).nan_to_num(
            0.0, posinf=torch.inf, neginf=-torch.inf
        )

    def finite_gaps_PGG(self, reader: str) -> Tensor:
        """The same; ValueError in the name of its ``reader`` where a reward is infinite."""
        infinite_P = self.rewards_PG.isinf().any(-1)
        if bool(infinite_P.any()):
            raise ValueError(
                f"the rewards of prompt {int(infinite_P.nonzero()[0])} of the minibatch hold an infinity, and {reader} "
                "reads differences of rewards. Clip the reward, return NaN for 'no valid score', or use an objective "
                "that reads the order alone, such as PairObjective with link: logistic."
            )
        return self.gaps_PGG


def standing(experience: Experience, mask_NT: Tensor) -> Standing:
    """Of the groups of ``experience``, as far as ``mask_NT`` leaves them tokens."""
    rewards_PG = experience.rewards_PG.double()
    has_tokens_PG = mask_NT.any(-1).view_as(rewards_PG).to(rewards_PG.device)
    valid_PG = has_tokens_PG & ~rewards_PG.isnan()
    prefers_PGG = experience.preferences_PGG
    if prefers_PGG is None:
        mine_PG1, other_P1G = rewards_PG.unsqueeze(-1), rewards_PG.unsqueeze(-2)
        prefers_PGG = ((mine_PG1 > other_P1G).double() + (mine_PG1 >= other_P1G).double()) / 2
    both_PGG = valid_PG.unsqueeze(-1) & valid_PG.unsqueeze(-2)
    both_PGG = both_PGG & ~torch.eye(both_PGG.shape[-1], dtype=torch.bool, device=both_PGG.device)
    prefers_PGG = prefers_PGG.masked_fill(~both_PGG, torch.nan)
    weights_PG = experience.weights_N.view_as(rewards_PG).to(rewards_PG.device).double()
    return Standing(
        valid_PG,
        prefers_PGG,
        without_noise(prefers_PGG.nanmean(-1).nan_to_num(0.0)),
        rewards_PG.masked_fill(~valid_PG, 0.0),
        weights_PG.masked_fill(~valid_PG, 0.0),
    )


def same_tokens(experience: Experience) -> Tensor:
    """bool [P, G, G]: two completions of a group are the same tokens."""
    completions = experience.completions
    tokens_NT = completions.tokens_NT.masked_fill(~completions.mask_NT, -1)
    number_PG = torch.unique(tokens_NT, dim=0, return_inverse=True)[1].view(-1, experience.group_size)
    return number_PG.unsqueeze(-1) == number_PG.unsqueeze(-2)


def selected(
    standing: Standing,
    usable_PGG: Tensor,
    selection: PairSelection,
    *,
    num_random: int | None = None,
    draws_PGG: Tensor | None = None,
) -> Tensor:
    """float64 [P, G, G], symmetric: how much each pair of ``usable_PGG`` (bool, symmetric) counts, 0 where not at all.

    ``all``: 1 each. ``best_worst``: the completions that win most against those that win least. ``adjacent``: each
    against the next better one. Of the last two, completions that stand equally share the pair: with 2 best and 3 worst
    each of the 6 pairs counts 1/6. ``random``: ``num_random`` pairs of a group, or all where there are fewer, 1 each;
    a completion may be in several.
    """
    if selection == "all":
        return usable_PGG.double()
    if selection == "random":
        assert num_random is not None
        if draws_PGG is None:
            raise ValueError("pairs: random needs draws_PGG, which the experience lacks. Give them.")
        return usable_PGG * _smallest(torch.minimum(draws_PGG, draws_PGG.mT), usable_PGG, num_random)
    share_PG = standing.share_PG
    mine_PG1, other_P1G = share_PG.unsqueeze(-1), share_PG.unsqueeze(-2)
    if selection == "best_worst":
        best_PG1 = share_PG.masked_fill(~standing.valid_PG, -torch.inf).amax(-1, keepdim=True).unsqueeze(-1)
        worst_PG1 = share_PG.masked_fill(~standing.valid_PG, torch.inf).amin(-1, keepdim=True).unsqueeze(-1)
        chosen_PGG = (mine_PG1 == best_PG1) & (other_P1G == worst_PG1) & (best_PG1 > worst_PG1)
    else:
        below_PGG = (mine_PG1 > other_P1G) & standing.valid_PG.unsqueeze(-1) & standing.valid_PG.unsqueeze(-2)
        between_PGG = (below_PGG.double() @ below_PGG.double()) > 0  # some k with i above k above j
        chosen_PGG = below_PGG & ~between_PGG
    equals_PGG = (mine_PG1 == other_P1G) & standing.valid_PG.unsqueeze(-1) & standing.valid_PG.unsqueeze(-2)
    equals_PG = equals_PGG.sum(-1).double().clamp(min=1)
    chosen_PGG = chosen_PGG | chosen_PGG.mT
    return (chosen_PGG & usable_PGG) / (equals_PG.unsqueeze(-1) * equals_PG.unsqueeze(-2))


def _smallest(keys_PGG: Tensor, usable_PGG: Tensor, number: int) -> Tensor:
    """bool [P, G, G], symmetric: the ``number`` usable pairs of each group with the smallest keys."""
    G = keys_PGG.shape[-1]
    first, second = torch.triu_indices(G, G, offset=1, device=keys_PGG.device)
    keys_PM = keys_PGG[:, first, second].masked_fill(~usable_PGG[:, first, second], torch.inf)
    chosen_PM = keys_PM.argsort(-1).argsort(-1) < number
    chosen_PGG = torch.zeros_like(usable_PGG)
    chosen_PGG[:, first, second] = chosen_PM
    return chosen_PGG | chosen_PGG.mT
