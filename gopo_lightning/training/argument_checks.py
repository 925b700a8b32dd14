"""Refuses groups of arguments of which something would have to be ignored."""

import math
import re
from collections.abc import Sequence
from typing import Any

from gopo_lightning.objectives.base import Needed, Objective
from gopo_lightning.rewards import RecordedReward, RewardSource, Source
from gopo_lightning.rollout import PrefixScores, Transform, TransformersEngine
from gopo_lightning.rollout.engines.base import SamplesAhead
from gopo_lightning.training.config import (
    ObjectiveConfig,
    RecordedTerm,
    RewardConfig,
    RolloutConfig,
    UpdateConfig,
    name_and_options,
)


def check_arguments(
    rollout: RolloutConfig, rewards: RewardConfig, objective: ObjectiveConfig, update: UpdateConfig
) -> None:
    """ValueError for what does not fit, in a group or between them."""
    check_groups(rollout, rewards, update)
    check_loss(objective, rewards.sources)
    check_rule(update, objective, rewards)
    check_lag(rollout, objective)


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


def check_lag(rollout: RolloutConfig, objective: ObjectiveConfig) -> None:
    """ValueError where nothing can be sampled ahead, or nothing would correct for older weights."""
    if rollout.lag not in (0, 1):
        raise ValueError(f"rollout.lag={rollout.lag} must be 0, which samples in time, or 1, one step ahead.")
    if not rollout.lag:
        return
    engine: object = rollout.engine or TransformersEngine()
    if not isinstance(engine, SamplesAhead):
        raise ValueError(
            f"rollout.lag=1 samples while the policy is trained, and {type(engine).__name__} samples where it is "
            "trained. Set lag to 0, or use VLLMServerEngine."
        )
    if rollout.refill is not None:
        raise ValueError(
            f"rollout.lag=1 samples the next step's prompts before it is known which rollout.refill={rollout.refill} "
            "takes. Leave either out."
        )
    if not objective.loss.reads_sampler:
        raise ValueError(
            f"rollout.lag=1 trains on completions of older weights, for which {type(objective.loss).__name__} as it is "
            "set does not correct. Use ClippedSurrogate with sampler_correction_cap: 2.0, or set lag to 0."
        )


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
