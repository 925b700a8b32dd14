"""Refuses, before anything is loaded, what the module would otherwise have to ignore."""

import math
import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from gopo_lightning._compat import save_interval
from gopo_lightning.distributed.run_folder import run_folder
from gopo_lightning.objectives.base import Needed, Objective
from gopo_lightning.rewards import RecordedReward, RewardSource, Source
from gopo_lightning.rollout import PrefixScores, Transform
from gopo_lightning.rollout.engines.base import SamplingConfig
from gopo_lightning.rollout.engines.precision import cpu_computes_bfloat16
from gopo_lightning.rollout.refill import HasFurtherPrompts
from gopo_lightning.training.config import (
    ObjectiveConfig,
    RecordedTerm,
    RewardConfig,
    RolloutConfig,
    UpdateConfig,
    name_and_options,
)
from gopo_lightning.training.trainer_defaults import trainer_defaults
from gopo_lightning.types import TensorStruct


def check_positive(**values: int) -> None:
    """ValueError for a count below 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")


def check_above_zero(**limits: float | None) -> None:
    """ValueError for a limit that is not above 0; None is no limit."""
    for name, limit in limits.items():
        if limit is not None and not limit > 0:
            raise ValueError(f"{name}={limit} must be above 0; use null for no limit")


def check_group_size(num_completions: int) -> None:
    """ValueError for a group in which nothing can be ranked."""
    if num_completions < 2:
        raise ValueError(f"num_completions={num_completions}: ranking needs at least 2 completions; use 8")


def check_sources(sources: Sequence[Source]) -> None:
    """At least one, and each with a name of its own, under which it is logged."""
    if not sources:
        raise ValueError("rewards is empty: name at least one reward source")
    names = [source.name for source in sources]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{doubled} names several reward sources, which share their curves then; set `name` of each")


def check_groups(rollout: RolloutConfig, rewards: RewardConfig, update: UpdateConfig) -> None:
    """ValueError for counts and limits that make no sense, and for sources that cannot be told apart."""
    check_positive(
        eval_num_completions=rollout.eval_num_completions,
        num_inner_epochs=update.num_inner_epochs,
        num_minibatches=update.num_minibatches,
        micro_batch_tokens=1 if update.micro_batch_tokens is None else update.micro_batch_tokens,
        refill=1 if rollout.refill is None else rollout.refill,
    )
    check_group_size(rollout.num_completions)
    check_sources(rewards.sources)
    check_above_zero(timeout_seconds=rewards.timeout_seconds, max_grad_norm=update.max_grad_norm)


def check_loss(objective: ObjectiveConfig, sources: Sequence[Source]) -> None:
    """ValueError unless the loss is one, and reads what is configured and what the sources give.

    (In Python a dict of its options, say, may stand in its place.)
    """
    loss: object = objective.loss
    if not isinstance(loss, Objective):
        raise ValueError(
            f"objective.loss={loss!r:.80} is a {type(loss).__name__}; give an Objective, such as ClippedSurrogate(…)"
        )
    name = type(loss).__name__
    for option, default in {"advantage": "ordinal", "credit": "broadcast"}.items():
        named = getattr(objective, option)
        if not loss.reads_advantages and name_and_options(named, f"objective.{option}") != (default, {}):
            raise ValueError(
                f"objective.{option}={named} has no effect: {name} reads rewards or comparisons, and no advantage. "
                f"Remove it or set it to {default}, or use a loss that reads advantages, such as ClippedSurrogate."
            )
    if loss.needs_rewards and not any(isinstance(source, RewardSource) for source in sources):
        raise ValueError(
            f"{name} reads differences of rewards, and {[source.name for source in sources]} only compare completions. "
            "Add a source that scores them, or use a loss that reads comparisons, such as PairObjective with link: "
            "logistic."
        )


def check_prefixes(objective: ObjectiveConfig, transforms: Sequence[Transform]) -> None:
    """ValueError where the credit brpo stands beside what it does not read, or without the scores that it does."""
    credit, options = name_and_options(objective.credit, "objective.credit")
    if credit != "brpo":
        return
    cuts = [transform.num_cuts for transform in transforms if isinstance(transform, PrefixScores)]
    if cuts != [options.get("num_cuts")]:
        raise ValueError(
            f"credit brpo has num_cuts={options.get('num_cuts')}, and the transforms PrefixScores have {cuts}: it "
            "reads the scores of one of them, at the same cuts. Make them equal."
        )
    if name_and_options(objective.advantage, "objective.advantage") != ("ordinal", {}):
        raise ValueError(
            f"objective.advantage={objective.advantage} has no effect: credit brpo makes the advantages of the scores "
            "of prefixes. Set it to ordinal, or use another credit."
        )


def check_rule(update: UpdateConfig, objective: ObjectiveConfig, rewards: RewardConfig) -> None:
    """ValueError for options of what an update rule that reads no loss would pass over.

    (`log_entropy` is on by default, and there is no forward to measure it in.)
    """
    if update.rule is None or update.rule.reads_loss:
        return
    options: dict[str, tuple[str, ...]] = {
        "objective": ("advantage", "credit", "loss", "iterate_every", "log_reference_kl", "also")
    }
    options["update"] = ("num_inner_epochs", "num_minibatches", "micro_batch_tokens", "prefix_sharing")
    name = type(update.rule).__name__
    given: dict[str, tuple[Any, Any]] = {
        "objective": (objective, ObjectiveConfig()),
        "update": (update, UpdateConfig()),
    }
    for group, fields in options.items():
        mine, default = given[group]
        for field in fields:
            if (value := getattr(mine, field)) != getattr(default, field):
                raise ValueError(
                    f"{group}.{field}={value} has no effect: update.rule {name} reads no loss, and a rollout makes one "
                    f"step. Set it to {getattr(default, field)}, or remove the rule."
                )
    if late := [type(each).__name__ for each in rewards.transforms if each.position == "advantages"]:
        raise ValueError(f"rewards.transforms has {late}, which change advantages: update.rule {name} reads none.")


def check_streams(terms: Sequence[RecordedTerm], num_minibatches: int) -> None:
    """ValueError for recorded streams that cannot be told apart or weighed, or that nothing can be made of."""
    names = [term.name for term in terms]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"objective.also has {doubled} several times, which share their curves then; set `name` of each"
        )
    for term in terms:
        place = f"objective.also '{term.name}'"
        check_loss(ObjectiveConfig(advantage=term.advantage, loss=term.loss), [RecordedReward()])
        if not re.fullmatch(r"\w+", term.name):
            raise ValueError(f"{place}: a name is letters, digits and underscores, as its curves are train/<name>/…")
        if not 0 < term.weight < math.inf:
            raise ValueError(f"{place}: weight={term.weight} must be above 0 and finite. Leave it out for none.")
        if term.num_completions < 2:
            raise ValueError(f"{place}: num_completions={term.num_completions} must be at least 2 to be compared.")
        if term.loss.reads_sampler:
            raise ValueError(f"{place}: its loss reads the sampler's log-probs, and nothing was sampled.")
        if term.prompts_per_step % num_minibatches:
            raise ValueError(
                f"{place}: update.num_minibatches={num_minibatches} must divide its prompts_per_step="
                f"{term.prompts_per_step}, so that minibatches are equal. Change either."
            )


def check_iterate(needs: frozenset[Needed], iterate_every: int | None) -> None:
    """The iterate is kept where it is read, and nowhere else."""
    if "iterate" in needs and iterate_every is None:
        raise ValueError(
            "the loss or a transform reads the iterate: set objective.iterate_every, updates from one copy to the next"
        )
    if "iterate" not in needs and iterate_every is not None:
        raise ValueError(
            f"objective.iterate_every={iterate_every}, but nothing reads the iterate. Remove it, or use a loss that "
            "does, such as ClippedSurrogate with kl_anchor: iterate."
        )


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


def check_refill(trainer: Trainer, refill: int | None) -> None:
    """Further prompts come from the data module."""
    if refill is not None and not isinstance(getattr(trainer, "datamodule", None), HasFurtherPrompts):
        raise ValueError(
            f"rollout.refill={refill} reads further prompts in the order of a PromptDataModule, and these prompts come "
            "from a loader of their own. Give the Trainer a PromptDataModule, or set refill to null."
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
