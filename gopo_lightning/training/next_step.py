"""What the next training step will ask for, known while this one samples: for `rollout.lag`."""

from typing import Protocol, runtime_checkable

from lightning.pytorch import Trainer

from gopo_lightning.rollout.collector import Collector
from gopo_lightning.rollout.engines.ahead import Upcoming
from gopo_lightning.training.config import RolloutConfig
from gopo_lightning.types import PromptBatch


@runtime_checkable
class LooksAhead(Protocol):
    """A data module that knows the prompts of the next step."""

    @property
    def can_read_further(self) -> bool:
        """Whether it does."""
        ...

    def upcoming_prompts(self) -> PromptBatch:
        """This rank's prompts of the step after the present one."""
        ...


class Steps(Protocol):
    """What of a module says how its steps go on."""

    trainer: Trainer
    collector: Collector
    rollout_config: RolloutConfig

    @property
    def updates_per_batch(self) -> int:
        """Optimiser steps per rollout."""
        ...


def next_step(module: Steps) -> Upcoming:
    """Prompts and seeds of the step after the present one.

    Of the last step too: so a run that is later trained further is the one that never stopped.
    """
    step, source = module.trainer.global_step + module.updates_per_batch, module.trainer.datamodule  # type: ignore[attr-defined]
    prompts = source.upcoming_prompts().to(module.trainer.strategy.root_device)
    return Upcoming(prompts, module.collector.seeds_N(prompts, module.rollout_config.num_completions, step))
