"""The groups of `GOPOModule`'s arguments: rollout, rewards, objective, update.

(`PolicyConfig` and `PlacementConfig` stand with what they configure.)

A field that takes a class is given `class_path` and `init_args`, one that takes a function `function` and `init_args`
(jsonargparse keeps `class_path` for classes). A name is enough where there is nothing to set:

    loss: {class_path: gopo_lightning.objectives.ClippedSurrogate, init_args: {kl_coef: 0.05}}
    advantage: {function: ordinal, init_args: {ties: arbitrary}}
    advantage: grpo
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeVar, cast, get_type_hints

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import nn
from torch.optim import Optimizer

from gopo_lightning.data.sources import PromptSource
from gopo_lightning.objectives.base import Objective
from gopo_lightning.objectives.clipped import ClippedSurrogate
from gopo_lightning.policy.prefix_sharing import PrefixSharing
from gopo_lightning.rewards import PairwiseSource, RewardSource
from gopo_lightning.rollout import RolloutEngine, SamplingConfig, Transform
from gopo_lightning.training.schedules import WarmupStart
from gopo_lightning.training.update_rule import UpdateRule

C = TypeVar("C")
Named = str | dict[str, Any]
"""A name or dotted path; or `function`, which is one, with its keyword arguments, `init_args`."""


@dataclass(frozen=True)
class RolloutConfig:
    """How completions are sampled."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Temperature, lengths and stop conditions of the completions."""
    num_completions: int = 8
    """G, completions of one prompt in training; at least 2."""
    eval_num_completions: int = 4
    """Completions of one prompt in validation, test and predict."""
    engine: RolloutEngine | None = None
    """What samples the completions; TransformersEngine when null."""
    refill: int | None = None
    """Most rounds in which further prompts take the place of those whose completions all tie, or have no valid score
    (DAPO's dynamic sampling); null for none."""
    lag: int = 0
    """1: the completions of the next step are sampled elsewhere while this step's are trained on, so from weights that
    are one step older; the loss has to correct for that. 0 samples in time."""


@dataclass(frozen=True)
class RewardConfig:
    """What the completions are worth."""

    sources: Sequence[RewardSource | PairwiseSource]
    """What scores the completions, or compares them with each other; at least one."""
    combine: Named = "weighted_sum"
    """Several sources → one reward: `weighted_sum`; `borda` adds the ranks within each source; `lexicographic` lets a
    source only break the ties of those before it; `z_score` normalises each source within the group, then adds; or the
    dotted path of your own function rewards_PGK → rewards_PG. An argument such as `weights` has one value a source."""
    transforms: Sequence[Transform] = ()
    """What changes the rewards before the advantages, or the weights after them, in this order; in training only."""
    timeout_seconds: float | None = 1200.0
    """Longest time of one source for one batch; beyond it the run ends with an error on all ranks. Null waits for
    ever, and so does a source that asks people (`HumanRanking`), which has a limit of its own."""
    max_invalid_steps: int | None = None
    """So many steps in a row without any valid score of a source end the run; null warns."""


@dataclass(frozen=True)
class RecordedTerm:
    """A loss of recorded groups that is added to that of the rollout."""

    data: PromptSource
    """Prompts with rated answers in their rows, in a format of comparisons; rendered as the data module renders."""
    loss: Objective
    """Log-probs and ratings → the loss."""
    weight: float = 1.0
    """What it is multiplied by."""
    name: str = "recorded"
    """Its metrics are `train/<name>/…`."""
    prompts_per_step: int = 8
    """Prompts of one rollout's updates over all ranks, read in an order of their own."""
    num_completions: int = 2
    """Answers of a prompt, at least 2; of a row with more, so many are drawn at each step."""
    advantage: Named = "ordinal"
    """Ratings → advantages, for a loss that reads them."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised."""

    advantage: Named = "ordinal"
    """`ordinal` (GOPO), `calibrated`, `odrpo`, `grpo`, `dr_grpo`, `rloo`, `batch`, `qae`, `maxrl`, or the dotted path
    of your own function rewards_PG → advantages_PG. Where the only source is pairwise, `ordinal` reads its comparison
    matrices."""
    credit: Named = "broadcast"
    """Advantages of completions → of tokens: `broadcast`, `reward_to_go`, `brpo`, or the dotted path of your own
    function experience → advantages_NT."""
    loss: Objective = field(default_factory=ClippedSurrogate)
    """Log-probs and advantages → the loss: ClippedSurrogate, or your own subclass of `objectives.base.Objective`."""
    iterate_every: int | None = None
    """Keep a copy of the trained weights, taken anew every so many updates, for a loss that reads the iterate."""
    log_entropy: bool = True
    """Log the policy's entropy."""
    log_reference_kl: bool = False
    """Log the KL divergence to the reference although the loss does not read it (one more forward a step)."""
    also: Sequence[RecordedTerm] = ()
    """Losses of recorded groups that are added to this one, each with its data, weight and denominator."""

    def __post_init__(self) -> None:
        also = tuple(as_config(RecordedTerm, each, "objective.also") for each in self.also)
        object.__setattr__(self, "also", also)


def default_optimizer(params: Iterable[nn.Parameter]) -> Optimizer:
    """Of `UpdateConfig`. (As a field's default it could not be written into a run's config.)"""
    return torch.optim.AdamW(params, lr=1e-6, weight_decay=0.0)


@dataclass(frozen=True)
class UpdateConfig:
    """How the policy is updated."""

    optimizer: OptimizerCallable | None = None
    """Built on the policy's trainable parameters; AdamW with lr 1e-6 and weight_decay 0 when null."""
    lr_schedule: str = "constant_with_warmup"
    """A schedule of `transformers.get_scheduler`, such as `constant_with_warmup`, `linear`, `cosine`."""
    warmup_steps: int = 10
    """Optimiser steps over which the learning rate rises to its whole."""
    warmup_start: WarmupStart = "first_step"
    """The warm-up's step k = 0, 1, … has (k + 1) / warmup_steps of the learning rate (`first_step`), or
    k / warmup_steps (`zero`, transformers' rule: the first step changes nothing). A checkpoint keeps its own."""
    lr_schedule_options: dict[str, Any] | None = None
    """Keyword arguments of the schedule, such as `min_lr_rate: 0.1` of `cosine_with_min_lr`."""
    max_grad_norm: float | None = 1.0
    """Gradients are scaled down to this L2 norm; null for none."""
    num_inner_epochs: int = 1
    """Passes over one rollout."""
    num_minibatches: int = 1
    """Optimiser steps in one pass; must divide the data module's prompts_per_step."""
    micro_batch_tokens: int | None = None
    """Most tokens of one forward and backward, in whole groups (a larger one goes alone); null takes a minibatch at
    once. The result does not depend on it, memory does."""
    rule: UpdateRule | None = None
    """What makes an optimiser step of a minibatch; the gradient of the loss (`GradientUpdate`) when null."""
    prefix_sharing: PrefixSharing = "auto"
    """`always` forwards a group's prompt once, `never` with each completion; `auto` shares after comparing both on the
    first step, and else says why not."""


def as_config(kind: type[C], given: Any, option: str) -> C:
    """``given`` as it is, or made of a dict of its fields, nested ones too; of a text or list the first field alone.

    Raises:
        ValueError: a field that ``kind`` does not have.
    """
    if isinstance(given, kind):
        return given
    names = [f.name for f in fields(cast(Any, kind))]
    if not isinstance(given, Mapping):
        return kind(**{names[0]: given})
    if unknown := sorted(set(given) - set(names)):
        raise ValueError(f"{option} has no {unknown}; its fields are {names}. Remove or rename it.")
    hints = get_type_hints(kind)
    nested = {
        name: as_config(hints[name], value, f"{option}.{name}")
        for name, value in given.items()
        if isinstance(value, Mapping) and is_dataclass(hints[name])
    }
    return kind(**{**given, **nested})


def name_and_options(named: Named, option: str) -> tuple[str, dict[str, Any]]:
    """What ``named`` names, and its keyword arguments.

    >>> name_and_options({"function": "ordinal", "init_args": {"ties": "arbitrary"}}, "advantage")
    ('ordinal', {'ties': 'arbitrary'})

    Raises:
        ValueError: neither a name nor `function` with `init_args`.
    """
    if isinstance(named, str):
        return named, {}
    if not isinstance(named.get("function"), str) or set(named) - {"function", "init_args"}:
        raise ValueError(f"{option}={named} must be a name, or function with init_args. Correct it.")
    return named["function"], dict(named.get("init_args") or {})
