"""Refuses, before anything is loaded, what the module would otherwise have to ignore."""

import re
from pathlib import PurePath
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from gopo_lightning._compat import save_interval
from gopo_lightning.distributed.run_folder import run_folder
from gopo_lightning.rollout.engines.base import SamplingConfig
from gopo_lightning.rollout.engines.precision import cpu_computes_bfloat16
from gopo_lightning.rollout.refill import HasFurtherPrompts
from gopo_lightning.training.config import RolloutConfig
from gopo_lightning.training.next_step import LooksAhead
from gopo_lightning.training.trainer_defaults import trainer_defaults
from gopo_lightning.types import TensorStruct


def check_trainer(trainer: Trainer, *, updates_per_rollout: int, policy_dtype: str) -> None:
    """What manual optimisation cannot honour; Lightning's own messages do not name the remedy."""
    check_outputs(trainer)
    _check_defaults(trainer)
    if trainer.gradient_clip_val:
        raise ValueError(
            f"trainer.gradient_clip_val={trainer.gradient_clip_val}: the module clips by itself; "
            f"set model.init_args.update.max_grad_norm={trainer.gradient_clip_val} instead"
        )
    if trainer.accumulate_grad_batches != 1:
        raise ValueError(
            f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches}: one batch is one rollout; "
            "set model.init_args.update.micro_batch_tokens to split it"
        )
    if trainer.precision == "16-mixed":
        raise ValueError("trainer.precision=16-mixed: its loss scaling is not supported here; use bf16-mixed")
    if trainer.precision == "bf16-true" or policy_dtype == "bfloat16":
        rank_zero_warn(
            "bfloat16 master weights: at learning rates near 1e-6 almost every update rounds to nothing. "
            "Use policy.dtype: float32 with trainer.precision: bf16-mixed."
        )
    check_precision(trainer)
    _check_intervals(trainer, updates_per_rollout)


def check_precision(trainer: Trainer) -> None:
    """Warn where bfloat16 makes a run slower."""
    if (
        trainer.strategy.root_device.type == "cpu"
        and str(trainer.precision).startswith("bf16")
        and not cpu_computes_bfloat16()
    ):
        rank_zero_warn(
            f"trainer.precision={trainer.precision}: this CPU emulates bfloat16 (x86 needs AVX-512 for it), and matrix "
            "products take several times as long as in float32. Use trainer.precision: 32-true here."
        )


def _check_defaults(trainer: Trainer) -> None:
    """What Lightning's own defaults would do to a run; see `trainer_defaults`. (The data modules check samplers.)"""
    given = {
        "num_sanity_val_steps": (trainer.num_sanity_val_steps, "a full validation runs at step 0 instead"),
        "inference_mode": (trainer.validate_loop.inference_mode, "sharded weights are gathered in place"),
    }
    for name, (value, reason) in given.items():
        if value != trainer_defaults()[name]:
            raise ValueError(
                f"trainer.{name}={value}: {reason}. Set it to {trainer_defaults()[name]}; in Python make the Trainer "
                "with Trainer(**gopo_lightning.trainer_defaults(), …)."
            )


def check_outputs(trainer: Trainer) -> None:
    """Names that are joined to the run's folder stay in it; the folder itself is the user's choice."""
    for logger in trainer.loggers:
        for option in ("name", "version", "sub_dir"):
            check_stays_inside(f"{option} of {type(logger).__name__}", getattr(logger, option, None))
    for callback in trainer.checkpoint_callbacks:
        check_stays_inside(f"filename of {type(callback).__name__}", getattr(callback, "filename", None))


def check_minibatches(trainer: Trainer, num_minibatches: int) -> None:
    """The prompts of one step, over all ranks, must split into equal minibatches."""
    prompts_per_step = getattr(getattr(trainer, "datamodule", None), "prompts_per_step", None)
    if prompts_per_step is not None and prompts_per_step % num_minibatches:
        raise ValueError(
            f"num_minibatches={num_minibatches} must divide data.init_args.prompts_per_step={prompts_per_step}, so "
            "that minibatches are equal. Change either."
        )


def check_order(trainer: Trainer, rollout: RolloutConfig) -> None:
    """Prompts beside those of the batch come from the data module."""
    source: Any = getattr(trainer, "datamodule", None)
    if rollout.refill is not None:
        option = f"rollout.refill={rollout.refill} reads further prompts", "set refill to null"
        _check_order(source, isinstance(source, HasFurtherPrompts), *option)
    if rollout.lag:
        option = f"rollout.lag={rollout.lag} reads the next step's prompts", "set lag to 0"
        _check_order(source, isinstance(source, LooksAhead), *option)


def _check_order(source: Any, has_one: bool, option: str, remedy: str) -> None:
    if not has_one:
        raise ValueError(
            f"{option} in the order of a PromptDataModule, and these prompts come from a loader of their own. Give the "
            f"Trainer a PromptDataModule, or {remedy}."
        )
    if not source.can_read_further:
        raise ValueError(
            f"{option}, and of a stream the next step's are read ahead. Set data.train.stream_buffer to null, or "
            f"{remedy}."
        )


def check_sampling(sampling: SamplingConfig, *, updates_per_rollout: int) -> None:
    """Greedy sampling cannot train; filtered sampling makes the policy ratio inexact."""
    if sampling.temperature == 0:
        raise ValueError("sampling.temperature=0: greedy completions of a prompt are all equal; train with 1.0")
    if sampling.filters:
        repeats = f", and more so over {updates_per_rollout} updates per rollout" if updates_per_rollout > 1 else ""
        rank_zero_warn(
            f"top_p={sampling.top_p}, top_k={sampling.top_k}, min_p={sampling.min_p} cut tokens away: completions do "
            f"not come from the policy itself, so the policy ratio is inexact{repeats}. Exact values are 1.0, 0 and 0."
        )


def check_finite(trainer: Trainer, experience: TensorStruct, loss: Tensor, grad_norm: Tensor) -> None:
    """ValueError unless loss and gradient norm, the same on all ranks, are finite; the batch is left on disk."""
    if loss.isfinite() and grad_norm.isfinite():
        return
    folder = run_folder(trainer)
    path = folder / f"nonfinite_step{trainer.global_step}_rank{trainer.global_rank}.pt"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(experience.to("cpu"), path)
    raise ValueError(
        f"step {trainer.global_step}: loss {loss.item()} and gradient norm {grad_norm.item()} must be finite. "
        f"The weights are untouched; the batch is in {path}. Look at it, lower the learning rate, or use float32."
    )


def _check_intervals(trainer: Trainer, updates_per_rollout: int) -> None:
    """The Trainer looks at global_step between batches only, and a batch makes K optimiser steps."""
    intervals = {"trainer.max_steps": max(trainer.max_steps, 0)}
    for callback in trainer.checkpoint_callbacks:
        name = f"every_n_train_steps of {type(callback).__name__}"
        intervals[name] = save_interval(callback) if isinstance(callback, ModelCheckpoint) else 0
    for name, interval in intervals.items():
        if interval % updates_per_rollout:
            raise ValueError(
                f"{name}={interval} is no multiple of num_inner_epochs × num_minibatches = {updates_per_rollout}, the "
                f"optimiser steps of one rollout; use {max(interval // updates_per_rollout, 1) * updates_per_rollout}"
            )


def check_stays_inside(option: str, name: str | PurePath | None) -> None:
    """Refuse a name that is joined to the run's folder and would lead out of it.

    Raises:
        ValueError: an absolute path, a drive, or a part that is `..`.
    """
    parts = PurePath(str(name or "").replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or re.match(r"[A-Za-z]:", parts.as_posix()):
        raise ValueError(
            f"{option}={str(name)!r} leads out of the run's folder. It is a name within that folder; choose the folder "
            "itself by the logger's save_dir, or the dirpath of ModelCheckpoint."
        )
