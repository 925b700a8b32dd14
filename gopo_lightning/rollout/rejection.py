"""Statistical rejection sampling: which completions look like samples of the optimal policy."""

import math
from collections.abc import Sequence
from typing import TypeVar

import torch

from gopo_lightning.rollout.engines.streams import stream_seeds, uniforms
from gopo_lightning.rollout.transforms import Context, Transform, keeping, rewards_that_count
from gopo_lightning.types import Rollout

R = TypeVar("R", bound=Rollout)


class RejectionSample(Transform):
    """Keeps k of the G completions by rejection, as samples of π_sampler · exp(r / β): RSO (arXiv 2309.06657, alg. 1).

    In rounds over those that are not kept yet, in their order, each is kept with probability exp((r − max r of these) /
    β), until k are. Draws are from streams of their own, keyed by seed, step, prompt and completion.

    Departures: the paper's samples are of the SFT policy, here they are of the policy that is trained. Completions are
    told apart by their number, the authors' code does by their text. One without a valid reward is never kept, nor one
    of weight 0, and fewer than k are kept where fewer are valid.

    Args:
        keep: k, from 2 to G.
        beta: β > 0, in units of the reward; the paper has 0.5.
    """

    def __init__(self, keep: int, beta: float = 0.5) -> None:
        if keep < 2:
            raise ValueError(f"keep={keep} of RejectionSample must be at least 2, as one completion makes no pair.")
        if not 0 < beta < math.inf:
            raise ValueError(f"beta={beta} of RejectionSample must be above 0 and finite. Try 0.5.")
        self.keep, self.beta = keep, beta

    def __call__(self, rollout: R, context: Context) -> R:
        """``weights_PG`` is 0 for what was rejected."""
        P, G = rollout.rewards_PG.shape
        if self.keep > G:
            raise ValueError(
                f"RejectionSample has keep={self.keep} for groups of {G} completions; keep at most so many."
            )
        indices = [prompt.index for prompt in rollout.prompts.prompts]
        seeds = torch.tensor(stream_seeds(~context.seed, context.step, indices, 2 * G)).view(P, 2 * G)
        draws_PGK = uniforms(seeds[:, G:].flatten().tolist(), self.keep).view(P, G, self.keep)  # the others: RankFilter
        kept_PG = torch.zeros(P, G)
        for row, (rewards_G, draws_GK) in enumerate(zip(rewards_that_count(rollout).tolist(), draws_PGK, strict=True)):
            kept_PG[row, accepted(rewards_G, draws_GK.T.tolist(), self.keep, self.beta)] = 1.0
        return keeping(rollout, kept_PG)


def accepted(rewards: Sequence[float], draws: Sequence[Sequence[float]], keep: int, beta: float) -> list[int]:
    """Numbers of the completions that are kept, in the order in which they are; ``draws[round][i]`` in [0, 1).

    >>> accepted([2.0, 1.0, 0.0, 1.5], [[0.3, 0.5, 0.9, 0.4], [0.7, 0.2, 0.6, 0.1]], 2, 0.5)
    [0, 1]
    """
    left, kept = [i for i, reward in enumerate(rewards) if not math.isnan(reward)], list[int]()
    for draws_of_round in draws:
        highest = max((rewards[i] for i in left), default=math.nan)
        for i in list(left):
            is_highest = rewards[i] == highest  # also where both are infinite
            if len(kept) < keep and (is_highest or draws_of_round[i] < math.exp((rewards[i] - highest) / beta)):
                kept.append(i)
                left.remove(i)
    return kept
