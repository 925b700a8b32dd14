"""What an update rule is: it makes optimiser steps of experiences. `update.rule` names one."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from gopo_lightning.objectives.base import Objective
from gopo_lightning.rollout import RolloutEngine
from gopo_lightning.training.forward import PolicyForward
from gopo_lightning.types import Experience


@dataclass(frozen=True)
class Term:
    """One of the losses that are added up."""

    objective: Objective
    weight: float = 1.0
    name: str = ""
    """Its metrics are `train/<name>/…`; of the rollout's own loss `train/…`."""


class Part(NamedTuple):
    """What one update reads of one term."""

    term: Term
    experience: Experience
    groups_P: Tensor
    """int64 row numbers of this rank's groups, maybe none."""


@dataclass(frozen=True)
class UpdateSettings:
    """What a rule is told of the run."""

    forward: PolicyForward
    """Reads log-probs."""
    max_grad_norm: float | None
    """Gradients are scaled down to this L2 norm; None for none."""
    log_entropy: bool
    """Whether to measure the policy's entropy."""
    seed: int


class UpdateRule(ABC):
    """Makes one optimiser step of some groups."""

    reads_loss: ClassVar[bool] = True
    """Whether it reads the losses. To a rule that does not, options of `objective`, and those that split a rollout, are
    an error."""

    def prepare(self, settings: UpdateSettings) -> None:
        """Told once, when the module is made."""
        self._settings = settings

    def check(self, trainer: Trainer) -> None:  # noqa: B027 - most work anywhere
        """ValueError for what it cannot do under ``trainer``."""

    def engine(self, engine: RolloutEngine) -> RolloutEngine:
        """What samples in training where ``engine`` is configured."""
        return engine

    def begin(self, step: int) -> None:  # noqa: B027 - most need nothing
        """Before the rollout of ``step``."""

    @abstractmethod
    def __call__(self, module: LightningModule, policy: nn.Module, parts: Sequence[Part]) -> dict[str, Tensor]:
        """Update ``policy`` by ``parts``, of which the rollout's is the first. A collective.

        Returns its metrics over all ranks, by their tags (`train/<name>`).
        """
