"""The optimiser of a module, its schedule, and what a resume makes of other settings than those of its checkpoint."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, cast

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from gopo_lightning.distributed.best_checkpoints import keep_best
from gopo_lightning.distributed.run_folder import keep_csv_metrics
from gopo_lightning.training.callbacks.run_record import RunRecord
from gopo_lightning.training.resume import KEY, OnSettingChange, check_checkpoint, plain
from gopo_lightning.training.schedules import Schedule, num_updates, restart_schedule

_IMPLEMENTATION = ("foreach", "fused", "capturable", "differentiable")
"""Options of torch's optimisers that do not change what they compute."""


class OptimisedModule(LightningModule):
    """A module with one optimiser of its trainable parameters, and a schedule over its updates.

    A run that is resumed follows the hyperparameters and the schedule that it is given, not those of its checkpoint
    (which Lightning restores without a word), and says what has changed. Only ``warmup_start`` stays as it was.
    """

    optimizer_callable: Callable[[Iterable[nn.Parameter]], Optimizer]
    schedule: Schedule
    on_setting_change: OnSettingChange
    fixed_settings: ClassVar[tuple[str, ...]] = ("optimizer.class",)
    """Dotted names of the settings that make a run what it is, each with all below it."""
    kind: ClassVar[str]
    """What is trained: `policy` or `reward model`."""
    base_model: tuple[str, str | None]
    """Name and revision of what the training starts from, as configured."""

    _checkpoint_step: int | None = None

    @property
    def logged_step(self) -> int:
        """The x of curves: optimiser steps of `fit`; of an evaluation, those that its checkpoint holds."""
        if self.trainer.state.fn == "fit" or self._checkpoint_step is None:
            return self.trainer.global_step
        return self._checkpoint_step

    @property
    def updates_per_batch(self) -> int:
        """Optimiser steps made of one batch of the data module."""
        return 1

    def run_settings(self) -> dict[str, Any]:
        """What a checkpoint says of the run, in plain values; compared with this run's where it is resumed."""
        return plain({"optimizer": self._optimizer_settings(), "schedule": self.schedule.settings})

    def configure_callbacks(self) -> list[Callback]:
        """Before loggers begin, what they would delete is kept."""
        keep_csv_metrics(self.trainer)
        return [RunRecord()]

    def configure_optimizers(self) -> Any:
        """The configured optimiser, and a schedule that is stepped with it."""
        optimizer = self._optimizer()
        scheduler = self.schedule.of(optimizer, num_updates(self.trainer, self.updates_per_batch))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the settings."""
        checkpoint[KEY] = self.run_settings()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compares the settings and, if the run is to go on, puts the present ones into the checkpoint's state.

        What it knows of the best checkpoints stays known, in another folder too.

        Raises:
            ValueError: a setting has changed that makes it another run, and ``on_setting_change`` is refuse.
        """
        training = self.trainer.state.fn == "fit"
        self._checkpoint_step = int(checkpoint["global_step"])
        keep_best(self.trainer, checkpoint)
        if training:
            self._keep_warmup_start(checkpoint)
        check_checkpoint(
            checkpoint, self.run_settings(), self.fixed_settings, self.on_setting_change, training=training
        )
        states = checkpoint.get("optimizer_states", []), checkpoint.get("lr_schedulers", [])
        for optimizer_state, scheduler_state in zip(*states, strict=True):
            take_over(optimizer_state, scheduler_state, self._as_configured[1])

    def on_train_start(self) -> None:
        """The schedule's learning rate at this update; a restored one is that of before."""
        scheduler = cast(LambdaLR, self.lr_schedulers())
        restart_schedule(scheduler, self.schedule, num_updates(self.trainer, self.updates_per_batch))

    def _optimizer(self) -> Optimizer:
        try:
            return self.optimizer_callable([p for p in self.parameters() if p.requires_grad])
        except (TypeError, ValueError) as error:
            raise ValueError(f"the optimiser refuses its init_args: {error}. Correct them.") from error

    @cached_property
    def _as_configured(self) -> tuple[str, list[dict[str, Any]]]:
        """The optimiser's class, and the hyperparameters of its groups before any schedule."""
        optimizer = self._optimizer()
        groups = [{key: group[key] for key in group if key != "params"} for group in optimizer.param_groups]
        return type(optimizer).__qualname__, groups

    def _optimizer_settings(self) -> dict[str, Any]:
        name, groups = self._as_configured
        settings = [
            {key: float(value) if isinstance(value, Tensor) else value for key, value in group.items()}
            for group in ({key: group[key] for key in group if key not in _IMPLEMENTATION} for group in groups)
        ]
        numbered = {f"group_{i}": group for i, group in enumerate(settings)}
        return {"class": name, **(settings[0] if len(settings) == 1 else numbered)}

    def _keep_warmup_start(self, checkpoint: Mapping[str, Any]) -> None:
        """The rule of the checkpoint; one made before there was a choice has ``zero``."""
        kept = checkpoint.get(KEY, {}).get("schedule", {}).get("warmup_start", "zero")
        if kept == self.schedule.warmup_start:
            return
        if checkpoint["global_step"] < self.schedule.warmup_steps:
            rank_zero_warn(
                f"warmup_start: {kept} stays, as the checkpoint was made with it (not {self.schedule.warmup_start})."
            )
        self.schedule = replace(self.schedule, warmup_start=kept)


def take_over(
    optimizer_state: dict[str, Any], scheduler_state: dict[str, Any], groups: Sequence[Mapping[str, Any]]
) -> None:
    """Put the hyperparameters of ``groups`` into the states of a checkpoint, before these are loaded.

    The learning rate of the present update is left to ``restart``. (Another number of groups is torch's to refuse.)
    """
    for stored, group in zip(optimizer_state["param_groups"], groups, strict=False):
        stored |= {key: value for key, value in group.items() if key != "lr"}
        stored["initial_lr"] = group["lr"]
    scheduler_state["base_lrs"] = [group["lr"] for group in groups]
