"""The rollout callback: fills each batch before the module reads it, and writes nothing else."""

from collections.abc import Mapping
from typing import Any, Protocol

from lightning.pytorch import Callback, LightningModule, Trainer

from gopo_lightning.types import PromptBatch


class FillsBatches(Protocol):
    """What makes of prompts what a batch gets."""

    def training_batch(self, prompts: PromptBatch, *, step: int) -> dict[str, Any]:
        """``experience`` and the ``seconds`` of each phase."""
        ...

    def validation_batch(self, prompts: PromptBatch) -> dict[str, Any]:
        """``rollout``, ``seconds``, and the win rates against the reference, ``win_rate_P`` and ``win_rate_PK``."""
        ...

    def prediction_batch(self, prompts: PromptBatch) -> dict[str, Any]:
        """``rollout`` and ``seconds``."""
        ...

    def rollout_state(self) -> dict[str, Any]:
        """What a checkpoint keeps of all that. A collective."""
        ...

    def load_rollout_state(self, state: Mapping[str, Any]) -> None:
        """What ``rollout_state`` gave."""
        ...


class RolloutCallback(Callback):
    """Before each batch: completions of its prompts and their rewards, and in training their advantages."""

    def __init__(self, source: FillsBatches) -> None:
        self.source = source

    def state_dict(self) -> dict[str, Any]:
        return self.source.rollout_state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.source.load_rollout_state(state_dict)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        _fill(batch, self.source.training_batch(batch["prompts"], step=trainer.global_step))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        _fill(batch, self.source.validation_batch(batch["prompts"]))

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        _fill(batch, self.source.validation_batch(batch["prompts"]))

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        _fill(batch, self.source.prediction_batch(batch["prompts"]))


def _fill(batch: Any, filling: Mapping[str, Any]) -> None:
    for key, value in filling.items():
        batch[key] = value
