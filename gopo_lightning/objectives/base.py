"""What an objective is: it turns log-probs of a micro-batch into a loss that adds up to that of the whole minibatch.

Shape legend: see `types.py`. An objective is pure: tensors in, tensors out. The caller asks which frozen log-probs it
reads (``needs``), which groups it must forward (``active``), and which tokens count (``mask``); sums ``denominator``
over micro-batches and ranks once; and passes that sum with every micro-batch, so that the losses ADD UP to the same
loss and gradient, however the completions are split.

A new objective is a subclass that is named in YAML by its dotted path:

    class Reinforce(Objective):
        def __call__(self, logprobs_NT, experience, mask_NT, total):
            surrogate_NT = experience.advantages_PG.flatten()[:, None] * logprobs_NT
            return Loss(-surrogate_NT[mask_NT].sum() / torch.where(total > 0, total, 1.0))
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gopo_lightning.types import Experience

Needed = Literal["old", "reference", "iterate"]
"""Log-probs of frozen policies: of the one that sampled, of step 0, of some updates ago."""


@dataclass(frozen=True)
class Mean:
    """A metric as a sum and what it is divided by, both to be added up over micro-batches and ranks."""

    sum: Tensor
    count: Tensor


@dataclass(frozen=True)
class Loss:
    """The loss of one micro-batch, and its metrics."""

    value: Tensor
    """Scalar, with gradient."""
    metrics: Mapping[str, Mean] = field(default_factory=dict)
    """Detached. The same names for every micro-batch; logged as `train/<name>`."""


class Objective(ABC):
    """What is minimised."""

    needs: ClassVar[frozenset[Needed]] = frozenset()
    """Frozen log-probs that it reads of the experience. A property where that depends on its options. "old" is given
    only where it may differ from the current policy's: None there stands for the detached current log-probs."""

    reads_sampler: bool = False
    """Whether it reads the sampler's log-probs, which not every engine gives."""
    reads_advantages: bool = True
    """Whether it reads advantages. To one that reads rewards or comparisons by itself, an advantage or a credit other
    than the defaults is an error."""
    reads_draws: bool = False
    """Whether it draws: then an experience brings ``draws_PGG``."""
    needs_rewards: bool = False
    """Whether it reads magnitudes of rewards, which a pairwise source does not give."""

    def mask(self, experience: Experience) -> Tensor:
        """bool [N, T]: tokens that enter the loss, which are those of completions that have a reward and a weight."""
        return experience.completions.mask_NT & (experience.weights_N > 0)[:, None]

    def active(self, experience: Experience) -> Tensor:
        """bool [P]: groups whose gradient may not be 0; the others are not forwarded."""
        return torch.ones(len(experience), dtype=torch.bool)

    def denominator(self, experience: Experience, mask_NT: Tensor) -> Tensor:
        """float32 scalar: what these completions add to the denominator; by default the weight of their tokens.

        Args:
            experience: groups of a minibatch, maybe none.
            mask_NT: the output of ``mask``.
        """
        return (mask_NT.sum(-1) * experience.weights_N.double()).sum().float()

    @abstractmethod
    def __call__(self, logprobs_NT: Tensor, experience: Experience, mask_NT: Tensor, total: Tensor) -> Loss:
        """The part of the minibatch's loss that a micro-batch makes.

        Args:
            logprobs_NT: of the policy, with gradient; 0 outside the completions' own mask.
            experience: whole groups, with the log-probs that are needed.
            mask_NT: the output of ``mask``; nowhere True in a micro-batch that only keeps this rank in step.
            total: ``denominator`` over all micro-batches and ranks; 0 must give a loss of 0.
        """
