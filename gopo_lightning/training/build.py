"""What the groups of arguments describe, made of them."""

from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from gopo_lightning.objectives import credit
from gopo_lightning.rewards import combine
from gopo_lightning.rollout import TransformersEngine
from gopo_lightning.rollout.collector import Collector
from gopo_lightning.rollout.engines.ahead import AheadEngine, Upcoming
from gopo_lightning.rollout.engines.base import SamplesAhead
from gopo_lightning.rollout.phases import Phases
from gopo_lightning.rollout.refill import Refill
from gopo_lightning.rollout.shaping import Shaping
from gopo_lightning.rollout.transforms import Setting
from gopo_lightning.training.advantage import Advantage
from gopo_lightning.training.argument_checks import check_prefixes
from gopo_lightning.training.config import (
    Named,
    ObjectiveConfig,
    RewardConfig,
    RolloutConfig,
    UpdateConfig,
    name_and_options,
)


def build_collector(
    rollout: RolloutConfig,
    rewards: RewardConfig,
    seed: int,
    phases: Phases,
    upcoming: Callable[[], Upcoming] | None = None,
) -> Collector:
    """Samples and scores; a lag needs ``upcoming``, what the next step asks for."""
    name, options = name_and_options(rewards.combine, "rewards.combine")
    engine = rollout.engine or TransformersEngine()
    if rollout.lag:
        assert isinstance(engine, SamplesAhead) and upcoming is not None
        engine = AheadEngine(engine, upcoming)
    return Collector(
        engine,
        rewards.sources,
        combine.get_combination(name, num_sources=len(rewards.sources), **options),
        rollout.sampling,
        seed,
        phases,
        rewards.timeout_seconds,
    )


def build_refill(rollout: RolloutConfig, collector: Collector, advantage: Advantage) -> Refill:
    """Replaces groups without a signal."""
    return Refill(collector, rollout.refill or 0, from_wins=advantage.from_wins)


def build_advantage(rewards: RewardConfig, objective: ObjectiveConfig) -> Advantage:
    """Rewards or comparisons → advantages."""
    return Advantage(
        *name_and_options(objective.advantage, "objective.advantage"),
        rewards.sources,
        *name_and_options(rewards.combine, "rewards.combine"),
    )


def build_shaping(
    rollout: RolloutConfig,
    rewards: RewardConfig,
    objective: ObjectiveConfig,
    advantage: Advantage,
    tokenizer: Callable[[], PreTrainedTokenizerBase],
) -> Shaping:
    """Transforms, advantage and credit."""
    check_prefixes(objective, rewards.transforms)
    setting = Setting(rewards.sources, rollout.num_completions, rollout.sampling.max_new_tokens, tokenizer)
    for transform in rewards.transforms:
        transform.set_up(setting)
    name, options = name_and_options(objective.credit, "objective.credit")
    return Shaping(
        advantage,
        from_wins=advantage.from_wins,
        transforms=rewards.transforms,
        credit=credit.get_credit(name, **options),
        advantages_are_read=objective.loss.reads_advantages,
        draws_are_read=objective.loss.reads_draws,
    )


def describe_settings(
    rollout: RolloutConfig, rewards: RewardConfig, objective: ObjectiveConfig, update: UpdateConfig
) -> dict[str, Any]:
    """What a checkpoint says of a run: what a resume compares."""
    return {
        "rollout": {
            "num_completions": rollout.num_completions,
            "sampling": asdict(rollout.sampling),
            **({} if rollout.refill is None else {"refill": rollout.refill}),
            **({"lag": rollout.lag} if rollout.lag else {}),
        },
        "rewards": {
            "sources": [source.name for source in rewards.sources],
            "combine": _named(rewards.combine),
            "transforms": [_described(transform) for transform in rewards.transforms],
        },
        "objective": {
            "advantage": _named(objective.advantage),
            "credit": _named(objective.credit),
            "loss": _described(objective.loss),
            "iterate_every": objective.iterate_every,
            **({"also": {term.name: _described(term) for term in objective.also}} if objective.also else {}),
        },
        "update": {
            "num_inner_epochs": update.num_inner_epochs,
            "num_minibatches": update.num_minibatches,
            "max_grad_norm": update.max_grad_norm,
            **({} if update.rule is None else {"rule": _described(update.rule)}),
        },
    }


def _named(named: Named) -> dict[str, Any]:
    """`function`, and `init_args` if there are any."""
    name, options = name_and_options(named, "a function")
    return {"function": name} | ({"init_args": options} if options else {})


def _described(part: Any) -> dict[str, Any]:
    """Class and options of an objective or transform; what begins with an underscore is its state."""
    options = asdict(part) if is_dataclass(part) and not isinstance(part, type) else vars(part)
    return {"class": type(part).__name__, **{k: v for k, v in options.items() if not k.startswith("_")}}
