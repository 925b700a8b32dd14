"""What a run says of itself at its start: where it writes, how large a step is, and soon how long it will take."""

import shlex
import sys
from time import perf_counter
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tqdm import tqdm

from gopo_lightning._compat import batches_begun
from gopo_lightning.distributed.run_folder import run_folder
from gopo_lightning.training.callbacks.throughput import describe_peak_memory
from gopo_lightning.training.config import RolloutConfig
from gopo_lightning.training.schedules import num_updates


def say(trainer: Trainer, text: str) -> None:
    """Print ``text`` at once, on rank 0, above whatever progress bar there is."""
    if trainer.is_global_zero:
        tqdm.write(text)
        sys.stdout.flush()


def duration(seconds: float) -> str:
    """Two units at most.

    >>> [duration(seconds) for seconds in (0.4, 45, 600, 8040, 100_000)]
    ['0.4 s', '45 s', '10 min', '2 h 14 min', '1 d 4 h']
    """
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if hours < 24:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"


def describe_step(rollout: RolloutConfig, prompts_per_step: int | None, updates: int) -> str:
    """How much one rollout samples, over all ranks.

    Args:
        rollout: G and the most tokens of a completion.
        prompts_per_step: P; None if the data do not say.
        updates: optimiser steps of one rollout.
    """
    G, most = rollout.num_completions, rollout.sampling.max_new_tokens
    head = "Each step" if updates == 1 else f"Each rollout, for {updates} steps"
    if prompts_per_step is None:
        return f"{head}: {G} completions a prompt, of at most {most:,} tokens"
    total = prompts_per_step * G * most
    return f"{head}: {prompts_per_step} prompts × {G} completions of at most {most:,} tokens, {total:,} in all"


def describe_parameters(module: LightningModule) -> str:
    """How many there are, and how many of them are trained."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in module.parameters()]
    total, trained = sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)
    share = "all" if trained == total else f"{trained / max(total, 1):.2%} of {total:,}"
    return f"Trainable parameters: {trained:,} ({share})"


class RunStart(Callback):
    """Says at the start of `fit` where the run writes and how large it is; after two batches, when it will end.

    The estimate takes the second batch for all that follow (the first one warms up), and the last validation for all
    others. It looks at rank 0's clock alone, and waits for nothing.

    Args:
        rollout: how completions are sampled; None where there are none.
    """

    def __init__(self, rollout: RolloutConfig | None = None) -> None:
        self.rollout = rollout
        self._num_batches = 0
        self._began = self._validation_began = 0.0
        self._validation_seconds: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the validation of step 0. A collective."""
        self._num_batches, folder = 0, run_folder(trainer)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]  # it writes nothing
            begun = f", from step {trainer.global_step} on" if trainer.global_step else ""
            say(trainer, f"Run folder: {folder}{begun}")
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    say(trainer, f"Curves and samples: tensorboard --logdir {shlex.quote(str(logger.root_dir))}")
        if self.rollout is not None:
            prompts_per_step = getattr(getattr(trainer, "datamodule", None), "prompts_per_step", None)
            say(trainer, describe_step(self.rollout, prompts_per_step, _updates(pl_module)))
        say(trainer, describe_parameters(pl_module))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._began = perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Estimate once."""
        self._num_batches += 1
        if self._num_batches == 2 and trainer.is_global_zero:
            left = self._describe_rest(trainer, _updates(pl_module), perf_counter() - self._began)
            say(trainer, f"{left}{describe_peak_memory(pl_module.device)}")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_began = perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_seconds = perf_counter() - self._validation_began

    def _describe_rest(self, trainer: Trainer, updates: int, batch_seconds: float) -> str:
        """Empty where nothing is left, or where nobody knows how much."""
        total = num_updates(trainer, updates)
        batches = 0 if total is None else -(-(total - trainer.global_step) // updates)
        if batches <= 0:
            return ""
        seconds, what = (
            batches * batch_seconds,
            f"{_count(batches * updates, 'step')} of {duration(batch_seconds / updates)}",
        )
        if validations := _validations_left(trainer, batches):
            each = self._validation_seconds
            seconds += validations * (each or 0.0)
            what += f", {_count(validations, 'validation')}" + (
                " not counted" if each is None else f" of {duration(each)}"
            )
        return f"About {duration(seconds)} left: {what}. "


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _updates(module: LightningModule) -> int:
    """Optimiser steps of one batch."""
    return int(getattr(module, "updates_per_batch", 1))


def _validations_left(trainer: Trainer, batches: int) -> int:
    """Those within the next ``batches``, if they are counted across epochs, as by `trainer_defaults`."""
    interval, done = trainer.val_check_batch, batches_begun(trainer)
    if not trainer.enable_validation or trainer.check_val_every_n_epoch is not None or not isinstance(interval, int):
        return 0
    return (done + batches) // interval - (done - 1) // interval  # that of this batch is still to come
