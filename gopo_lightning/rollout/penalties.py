"""Penalties for how a completion ends: in a loop, or near the limit."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor

from gopo_lightning.objectives.base import Mean
from gopo_lightning.rollout.transforms import Context, Setting, Transform, mean_of, plus
from gopo_lightning.types import Completions, Rollout

R = TypeVar("R", bound=Rollout)


class RepetitionPenalty(Transform):
    """r − penalty for completions that were cut off in a loop: CAMPO of MiroMind-M1 (arXiv 2507.14683).

    A loop is a run of tokens that ends the completion at least twice in a row; of several the longest run counts, and
    the looped share is that of all its repeats in the completion. Completions that ended by themselves are left as they
    are.

    Departures: the authors' scripts ask for the paper's adaptive penalty, but their trainer takes the constant 0.1;
    both are here. Two equal tokens at the end are a loop, as in their code; ``proportional`` makes little of it.

    Args:
        coef: c > 0, in units of the reward.
        penalty: ``constant`` takes c off, ``proportional`` c times the looped share.
    """

    def __init__(self, coef: float = 0.1, penalty: Literal["constant", "proportional"] = "constant") -> None:
        if not 0 < coef < math.inf:
            raise ValueError(
                f"coef={coef} of RepetitionPenalty must be above 0 and finite. Leave the transform out for none."
            )
        if penalty not in ("constant", "proportional"):
            raise ValueError(f"penalty={penalty!r} of RepetitionPenalty is unknown; use constant or proportional.")
        self.coef, self.penalty = coef, penalty
        self._measured: dict[str, Mean] = {}

    def __call__(self, rollout: R, context: Context) -> R:
        """Rewards with the penalty."""
        share_N = looped_shares(rollout.completions)
        self._measured = {"looped_share": mean_of(share_N)}
        penalty_N = self.coef * (share_N if self.penalty == "proportional" else (share_N > 0).double())
        return plus(rollout, -penalty_N)

    def metrics(self) -> Mapping[str, Mean]:
        """The mean looped share of all completions."""
        return self._measured


class OverlongPenalty(Transform):
    """r + c · p, p from 0 to −1 as the completion nears the limit: DAPO's soft overlong punishment (arXiv 2503.14476,
    eq. 13).

    With L tokens, and the limit L_max of ``max_new_tokens``, p is 0 up to L_max − buffer, (L_max − buffer − L) / buffer
    from there on, and −1 for a completion that was cut off.

    An advantage that reads the order alone, such as ``ordinal``, sees of this only which completions change places: one
    token more in the buffer counts like a hundred. Where rewards differ by more than c the penalty only breaks ties;
    where they differ by less, a long good completion falls behind a short bad one, and at c itself into a tie with it.

    Args:
        buffer_tokens: L_cache, from 1 to ``max_new_tokens``; the paper has 4,096 of 20,480.
        coef: c > 0, in units of the reward; the paper has 1 for rewards of ±1.
    """

    def __init__(self, buffer_tokens: int, coef: float = 1.0) -> None:
        if not 0 < coef < math.inf:
            raise ValueError(
                f"coef={coef} of OverlongPenalty must be above 0 and finite. Leave the transform out for none."
            )
        self.buffer_tokens, self.coef = buffer_tokens, coef
        self._measured: dict[str, Mean] = {}

    def set_up(self, setting: Setting) -> None:
        """ValueError for a buffer longer than a completion."""
        if not 1 <= self.buffer_tokens <= setting.max_new_tokens:
            raise ValueError(
                f"buffer_tokens={self.buffer_tokens} of OverlongPenalty must lie between 1 and "
                f"max_new_tokens={setting.max_new_tokens}. Try {max(setting.max_new_tokens // 5, 1)}."
            )

    def __call__(self, rollout: R, context: Context) -> R:
        """Rewards with the penalty."""
        penalty_N = overlong(rollout.completions, rollout.max_new_tokens, self.buffer_tokens)
        self._measured = {"overlong_penalty": mean_of(penalty_N)}
        return plus(rollout, self.coef * penalty_N)

    def metrics(self) -> Mapping[str, Mean]:
        """The mean of p over all completions."""
        return self._measured


def overlong(completions: Completions, max_new_tokens: int, buffer_tokens: int) -> Tensor:
    """float64 penalty_N in [−1, 0], on the CPU."""
    over_N = completions.lengths_N.cpu().double() - (max_new_tokens - buffer_tokens)
    return (-over_N / buffer_tokens).clamp(-1.0, 0.0).masked_fill(completions.truncated_N.cpu(), -1.0)


def looped_shares(completions: Completions) -> Tensor:
    """float64 share_N on the CPU; 0 for completions that were not cut off."""
    rows = zip(completions.tokens_NT.cpu(), completions.mask_NT.cpu(), completions.truncated_N.tolist(), strict=True)
    shares = [looped_share(tokens_T[mask_T].tolist()) if cut else 0.0 for tokens_T, mask_T, cut in rows]
    return torch.tensor(shares, dtype=torch.float64)


def looped_share(tokens: Sequence[int]) -> float:
    """Share of ``tokens`` in the repeats of the longest run that stands at least twice in a row at their end.

    >>> looped_share([1, 2, 3, 3, 3, 3]), looped_share([9, 1, 2, 1, 2, 1, 2]), looped_share([5, 7, 7, 8])
    (0.6666666666666666, 0.8571428571428571, 0.0)
    """
    backwards = tokens[::-1]
    common = common_prefixes(backwards)
    longest = max((n for n in range(1, len(tokens) // 2 + 1) if common[n] >= n), default=0)
    return 0.0 if longest == 0 else (1 + common[longest] // longest) * longest / len(tokens)


def common_prefixes(tokens: Sequence[int]) -> list[int]:
    """At each n how many tokens from there on are those from the start on (the Z function), in linear time.

    >>> common_prefixes([1, 2, 1, 2, 1, 3])
    [6, 0, 3, 0, 1, 0]
    """
    common = [len(tokens)] + [0] * (len(tokens) - 1)
    start = end = 0  # of the match that reaches furthest
    for n in range(1, len(tokens)):
        length = min(common[n - start], end - n) if n < end else 0
        while n + length < len(tokens) and tokens[length] == tokens[n + length]:
            length += 1
        common[n] = length
        if n + length > end:
            start, end = n, n + length
    return common
