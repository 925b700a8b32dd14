"""The learning rate at each update of a run. Updates are optimiser steps; a rollout may make several."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType, get_scheduler

from gopo_lightning._compat import set_last_lr, set_up_training_data

WarmupStart = Literal["first_step", "zero"]
Factor = Callable[[int], float]
"""Number of an update, from 0 → what the learning rate is multiplied by."""

REFUSED = {
    "reduce_lr_on_plateau": "it waits for a metric that gets no better, and rewards have no such one at each update",
    "greedy": "it follows a loss that falls, and a policy loss need not",
}
ENDLESS = ("constant", "constant_with_warmup", "inverse_sqrt")
"""Schedules that do not depend on how long the run is."""


@dataclass(frozen=True)
class Schedule:
    """A schedule of `transformers.get_scheduler`.

    Raises:
        ValueError: there is none of this name, it cannot be used here, or it does not take these options.
    """

    name: str
    warmup_steps: int
    """Updates until the learning rate is whole."""
    warmup_start: WarmupStart = "first_step"
    """first_step: update k = 0, 1, … of the warm-up has (k + 1) / warmup_steps of the learning rate. zero: it has
    k / warmup_steps, so that the first update changes nothing; transformers' rule."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the schedule itself, such as min_lr_rate of cosine_with_min_lr."""

    def __post_init__(self) -> None:
        usable = sorted({kind.value for kind in SchedulerType} - REFUSED.keys())
        if self.name in REFUSED:
            raise ValueError(f"lr_schedule={self.name} cannot be used: {REFUSED[self.name]}. Use one of {usable}.")
        if self.name not in usable:
            raise ValueError(f"lr_schedule={self.name!r} is unknown. Use one of {usable}.")
        if self.warmup_start not in get_args(WarmupStart):
            raise ValueError(
                f"warmup_start={self.warmup_start!r} is unknown. Use {' or '.join(get_args(WarmupStart))}."
            )
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be at least 0.")
        if self.options and self.name.startswith("constant"):
            raise ValueError(f"lr_schedule={self.name} takes no lr_schedule_options, but has {dict(self.options)}.")
        if self.name == "constant" and self.warmup_steps:
            rank_zero_warn(
                f"lr_schedule=constant has no warm-up, so warmup_steps={self.warmup_steps} has no effect. Use "
                "constant_with_warmup, or warmup_steps: 0."
            )
        self.factor(lr=1.0, num_updates=1000)  # what the options are wrong about is said before anything is loaded

    @property
    def settings(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "name": self.name,
            "warmup_steps": self.warmup_steps,
            "warmup_start": self.warmup_start,
            "options": dict(self.options),
        }

    def factor(self, *, lr: float, num_updates: int | None) -> Factor:
        """The schedule over a run of ``num_updates`` (None: not known).

        Args:
            lr: the optimiser's, for schedules whose least learning rate is given in units.
            num_updates: of the whole run.

        Raises:
            ValueError: the schedule depends on a length that is not known.
        """
        if self.name in ENDLESS or "num_stable_steps" in self.options:
            num_updates = None
        elif num_updates is None:
            raise ValueError(
                f"lr_schedule={self.name} depends on how many updates the run makes, which is not known: neither "
                "trainer.max_steps nor trainer.max_epochs is set. Set trainer.max_steps (trainer.max_time may stay), "
                "or use lr_schedule: constant_with_warmup."
            )
        one = torch.optim.SGD([torch.zeros(())], lr=lr)
        try:
            scheduler = get_scheduler(self.name, one, self.warmup_steps, num_updates, dict(self.options))
        except (TypeError, ValueError) as error:
            said = str(error).replace("lr_scheduler_kwargs", "lr_schedule_options")
            given = f"lr_schedule={self.name} with lr_schedule_options={dict(self.options)}"
            raise ValueError(f"{given} cannot be built: {said}. Repair the options.") from error
        (plain,) = scheduler.lr_lambdas
        num_warmup = self.warmup_steps
        if self.warmup_start == "zero" or not num_warmup or plain(0) > 0:
            return lambda update: float(plain(update))
        return lambda update: float(plain(update + 1 if update < num_warmup else update))

    def of(self, optimizer: Optimizer, num_updates: int | None) -> LambdaLR:
        """A scheduler to be stepped after each update; warns of a run that ends within its warm-up."""
        if num_updates is not None and self.warmup_steps and num_updates <= self.warmup_steps:
            rank_zero_warn(
                f"warmup_steps={self.warmup_steps}, but the run ends after {num_updates}: all of it is warm-up, at "
                "lower learning rates than the one that is set. Lower warmup_steps."
            )
        return LambdaLR(optimizer, self.factor(lr=_base_lr(optimizer), num_updates=num_updates))


def num_updates(trainer: Trainer, updates_per_batch: int = 1) -> int | None:
    """Updates of the whole run, by whichever of max_steps and max_epochs ends it first; None if neither is set.

    ``updates_per_batch``: of the batches that Lightning counts; max_steps counts updates already.
    """
    limits = [trainer.max_steps] if trainer.max_steps >= 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        if trainer.train_dataloader is None:
            set_up_training_data(trainer)
        batches = trainer.num_training_batches / trainer.accumulate_grad_batches
        if math.isfinite(batches):
            limits.append(math.ceil(batches) * max(trainer.max_epochs, 1) * updates_per_batch)
    return min(limits, default=None)


def restart_schedule(scheduler: LambdaLR, schedule: Schedule, num_updates: int | None) -> None:
    """Follow ``schedule`` from the present update on; a scheduler that was restored has the learning rate of before."""
    factor = schedule.factor(lr=_base_lr(scheduler.optimizer), num_updates=num_updates)
    scheduler.lr_lambdas = [factor] * len(scheduler.base_lrs)
    lrs = [base * factor(scheduler.last_epoch) for base in scheduler.base_lrs]
    for group, lr in zip(scheduler.optimizer.param_groups, lrs, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
    set_last_lr(scheduler, lrs)


def _base_lr(optimizer: Optimizer) -> float:
    group = optimizer.param_groups[0]
    return float(group.get("initial_lr", group["lr"]))
