"""What changes a rollout between scoring and the update: a transform is a class that is named in YAML.

They are applied in their order, those of ``position = "rewards"`` before the advantages are computed, those of
``"advantages"`` after. Evaluation applies none.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gopo_lightning.objectives.base import Mean, Needed
from gopo_lightning.rewards import Source
from gopo_lightning.rollout.engines.streams import stream_seeds, uniforms
from gopo_lightning.types import Experience, Rollout

R = TypeVar("R", bound=Rollout)
Position = Literal["rewards", "advantages"]


class Context(NamedTuple):
    """When a rollout was made; keys what is random in a transform."""

    seed: int
    step: int


class Setting(NamedTuple):
    """The run that a transform is part of."""

    sources: Sequence[Source]
    """The K reward sources, in the order of ``rewards_PGK``."""
    group_size: int
    """G."""
    max_new_tokens: int
    """Most tokens of a completion."""
    tokenizer: Callable[[], PreTrainedTokenizerBase]
    """The policy's; loaded when it is first asked for."""


class Transform(ABC):
    """Changes the rewards, weights or advantages of a rollout of this rank.

    A group is whole on one rank, so what compares completions of one prompt needs no collective. One that does call a
    collective is called equally often on every rank.
    """

    position: ClassVar[Position] = "rewards"
    """Before the advantages (it gets a `Rollout`) or after them (an `Experience`)."""
    needs: ClassVar[frozenset[Needed]] = frozenset()
    """Frozen log-probs that it reads; they are computed before, once, and not again in the update."""

    def set_up(self, setting: Setting) -> None:  # noqa: B027 - most fit every run
        """Before anything is loaded: ValueError for an option that cannot act in this run."""

    @abstractmethod
    def __call__(self, rollout: R, context: Context) -> R:
        """The changed rollout (`dataclasses.replace`), with the same prompts and completions."""

    def metrics(self) -> Mapping[str, Mean]:
        """What the last call measured; logged as `transform/<name>`, over all ranks."""
        return {}

    def commit(self, experience: Experience) -> None:  # noqa: B027 - most have no state
        """After the updates on ``experience``: learn from it, if there is something to learn.

        What is learned must be the same on all ranks (gather it), as a checkpoint keeps the state of rank 0.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: tensors and plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """What ``state_dict`` gave."""


class KLInReward(Transform):
    """r − β · KL of the policy that sampled to the reference, as in PPO for RLHF (arXiv 2203.02155, eq. 2).

    The KL is the estimator k1, Σ_t (log π_old − log π_ref) over a completion's tokens: in a reward, unlike in a loss,
    it is unbiased. Ranks read the order of the sum, so β weighs nats against the scale of the rewards. The curve
    `reward/mean` shows what is left of a reward after its penalty, the curves of the sources what they gave.

    Args:
        coef: β > 0.
        per: ``completion`` takes β · KL off the completion's reward; ``token`` gives each token its own part, for a
            credit that reads token rewards, such as ``reward_to_go``.
    """

    needs = frozenset({"old", "reference"})

    def __init__(self, coef: float, per: Literal["completion", "token"] = "completion") -> None:
        if not 0 < coef < math.inf:
            raise ValueError(f"coef={coef} of KLInReward must be above 0 and finite. Leave the transform out for none.")
        if per not in ("completion", "token"):
            raise ValueError(f"per={per!r} of KLInReward is unknown; use completion or token.")
        self.coef, self.per = coef, per

    def __call__(self, rollout: R, context: Context) -> R:
        """Rewards, or token rewards, with the penalty."""
        assert rollout.old_logprobs_NT is not None and rollout.reference_logprobs_NT is not None
        kl_NT = (rollout.old_logprobs_NT - rollout.reference_logprobs_NT).double()
        kl_NT = kl_NT.masked_fill(~rollout.completions.mask_NT, 0.0)
        if self.per == "token":
            earned_NT = 0.0 if rollout.token_rewards_NT is None else rollout.token_rewards_NT
            return replace(rollout, token_rewards_NT=(earned_NT - self.coef * kl_NT).float())
        return plus(rollout, -self.coef * kl_NT.sum(-1))


class RankFilter(Transform):
    """Trains on k of the G completions, drawn by their rank: PF-PPO (arXiv 2409.06957, sec. 4).

    Advantages are computed over all G before. The draw is without replacement (the authors' replay buffer draws with
    it), from a stream of its own, keyed by seed, step, prompt and completion. Completions that tie are put in a random
    order; where all tie, nothing is kept. Those without a valid reward, or with weight 0, are not ranked and not kept.

    Args:
        weights: probabilities by rank, the best first: ``bon`` (1, 0, …), ``br`` (best or random: ½, and the other half
            spread evenly), ``bw`` (best or worst: ½, 0, …, ½), or G numbers ≥ 0.
        keep: k ≥ 1 completions; fewer where fewer have a weight above 0.
    """

    position = "advantages"

    def __init__(self, weights: Literal["bon", "br", "bw"] | list[float], keep: int) -> None:
        if isinstance(weights, str) and weights not in ("bon", "br", "bw"):
            raise ValueError(f"weights={weights!r} of RankFilter is unknown; use bon, br, bw or a list of G numbers.")
        if not isinstance(weights, str) and not (all(0 <= w < math.inf for w in weights) and any(weights)):
            raise ValueError(f"weights={weights} of RankFilter must be finite, at least 0, and not all 0.")
        if keep < 1:
            raise ValueError(f"keep={keep} of RankFilter must be at least 1.")
        self.weights, self.keep = weights, keep

    def __call__(self, rollout: R, context: Context) -> R:
        """``weights_PG`` is 0 for what was not drawn."""
        P, G = rollout.rewards_PG.shape
        if self.keep > G or (not isinstance(self.weights, str) and len(self.weights) != G):
            raise ValueError(
                f"RankFilter has weights={self.weights} and keep={self.keep} for groups of {G} completions; give one "
                "weight a rank and keep at most so many."
            )
        indices = [prompt.index for prompt in rollout.prompts.prompts]
        draws_PG2 = uniforms(stream_seeds(~context.seed, context.step, indices, G), 2).view(P, G, 2)
        groups = zip(rewards_that_count(rollout), draws_PG2, strict=True)
        return keeping(rollout, torch.stack([self._kept(rewards_G, draws_G2) for rewards_G, draws_G2 in groups]))

    def _kept(self, rewards_G: Tensor, draws_G2: Tensor) -> Tensor:
        """float32 0 or 1: the k largest of log w + Gumbel noise, which draws without replacement by w."""
        kept_G = torch.zeros_like(rewards_G, dtype=torch.float32)
        valid = [g for g, reward in enumerate(rewards_G.tolist()) if not math.isnan(reward)]
        if len(valid) < 2 or len({rewards_G[g].item() for g in valid}) == 1:
            return kept_G
        best_first = sorted(valid, key=lambda g: (-rewards_G[g].item(), draws_G2[g, 0].item()))
        weights_n = rank_weights(self.weights, len(valid))
        gumbel_n = -(-draws_G2[best_first, 1].clamp(min=2.0**-60).log()).log()
        chosen = (weights_n.log() + gumbel_n).topk(min(self.keep, int((weights_n > 0).sum()))).indices
        kept_G[torch.tensor(best_first)[chosen]] = 1.0
        return kept_G


def rewards_that_count(rollout: Rollout) -> Tensor:
    """rewards_PG on the CPU, NaN also for completions of weight 0."""
    rewards_PG = rollout.rewards_PG.cpu()
    return rewards_PG.masked_fill(rollout.weights_N.view_as(rewards_PG).cpu() == 0, math.nan)


def keeping(rollout: R, kept_PG: Tensor) -> R:
    """``rollout`` with the weights multiplied by ``kept_PG``, float32 0 or 1."""
    weights_PG = kept_PG if rollout.weights_PG is None else kept_PG.to(rollout.weights_PG) * rollout.weights_PG
    return replace(rollout, weights_PG=weights_PG.to(rollout.rewards_PG.device))


def plus(rollout: R, bonus_N: Tensor) -> R:
    """``rollout`` with ``bonus_N`` added to the rewards; one without a valid reward stays without."""
    rewards_PG = rollout.rewards_PG
    return replace(rollout, rewards_PG=rewards_PG + bonus_N.view_as(rewards_PG).to(rewards_PG))


def mean_of(values: Tensor) -> Mean:
    """Of all values."""
    return Mean(values.sum(), torch.tensor(values.numel()))


def rank_weights(weights: Literal["bon", "br", "bw"] | Sequence[float], num_ranked: int) -> Tensor:
    """float64 [n] weights of the ranks 1 … n ≥ 2.

    >>> rank_weights("br", 5).tolist(), rank_weights("bw", 3).tolist()
    ([0.5, 0.125, 0.125, 0.125, 0.125], [0.5, 0.0, 0.5])
    """
    weights_n = torch.zeros(num_ranked, dtype=torch.float64)
    if not isinstance(weights, str):
        return torch.tensor(weights[:num_ranked], dtype=torch.float64)
    weights_n[0] = 1.0 if weights == "bon" else 0.5
    if weights == "br":
        weights_n[1:] = 0.5 / (num_ranked - 1)
    elif weights == "bw":
        weights_n[-1] = 0.5
    return weights_n
