"""Prompts → `Rollout`: samples completions from a policy and scores them. Knows no module and no Trainer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from gopo_lightning.distributed.collectives import all_or_none
from gopo_lightning.distributed.gathering import Gather, gathered
from gopo_lightning.distributed.offloading import on_device
from gopo_lightning.policy.model import evaluating, float32_default, warn_of_endless_turns
from gopo_lightning.rewards import (
    EarlyQuestions,
    GroupScores,
    HoldsModels,
    RewardSource,
    Source,
    learning,
    score_groups,
)
from gopo_lightning.rewards.learning import LearnsFromRollouts
from gopo_lightning.rewards.pairwise import Groups
from gopo_lightning.rollout.engines.base import HasSampler, HasState, RolloutEngine, SamplingConfig, TellsOfGroups
from gopo_lightning.rollout.engines.streams import stream_seeds
from gopo_lightning.rollout.phases import Phases
from gopo_lightning.types import Completions, Prompt, PromptBatch, Rollout

EVALUATION_STEP = -1
"""Keys the random streams of validation, test and predict: the same at every step, so that curves compare policies."""


@dataclass(frozen=True)
class Actor:
    """A policy that is ready to sample."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: Sequence[int]
    device: torch.device
    """Where the policy and the reward models compute."""
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    """The precision in which it samples."""
    gather: Gather = "full"
    """How sharded weights are gathered meanwhile."""


class Collector:
    """Samples completions of prompts and has them scored.

    Args:
        engine: samples completions.
        sources: the K reward sources.
        combine: rewards_PGK → rewards_PG.
        sampling: temperature, lengths, stop conditions.
        seed: of the random streams; a completion's stream is keyed by (seed, step, prompt row, completion index).
        phases: is told what is done, and how long it takes.
        timeout_seconds: longest time of one source for one batch.

    What fails on one rank fails on all: each stage that can fail is ``all_or_none``, one after the other, so that every
    rank takes part in equally many collectives. An engine may have such stages of its own: they too end on all ranks.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        sources: Sequence[Source],
        combine: Callable[[Tensor], Tensor],
        sampling: SamplingConfig,
        seed: int,
        phases: Phases,
        timeout_seconds: float | None = None,
    ) -> None:
        self.engine, self.sources, self.combine = engine, sources, combine
        self.sampling, self.seed, self.phases, self.timeout_seconds = sampling, seed, phases, timeout_seconds
        self._turns_are_checked = False

    def collect(
        self, actor: Actor, prompts: PromptBatch, num_completions: int, *, step: int, compare: bool = True
    ) -> Rollout:
        """Sample from ``actor`` and score.

        Args:
            actor: the policy.
            prompts: P prompts.
            num_completions: G.
            step: keys the random streams.
            compare: False: pairwise sources are not asked to compare a group with itself, and their columns are NaN.
        """
        evaluates = step == EVALUATION_STEP
        asked = [source for source in self.sources if compare or isinstance(source, RewardSource)]
        with self._as_first(evaluates), EarlyQuestions(asked, prompts.prompts) as early:
            completions = self.sample(actor, prompts, num_completions, step, early)
            with self.phases("reward", actor.device):
                groups = completions.groups(num_completions)
                scores = self.score(prompts.prompts, groups, actor.device, compare=compare, early=early)
                device = device_of_rewards(prompts.tokens_PL.device)
                rewards_PGK = scores.rewards_PGK.to(device)
                rewards_PG = self.combined(rewards_PGK)
        return Rollout(
            prompts,
            completions,
            rewards_PGK,
            rewards_PG,
            self.sampling.max_new_tokens,
            wins_PGGK=None if scores.wins_PGGK is None else scores.wins_PGGK.to(device),
        )

    def state_dict(self) -> dict[str, Any]:
        """What the next rollouts depend on: of the sources that learn, and of the engine. A collective."""
        state: dict[str, Any] = {"sources": learning.state_of(self.sources)}
        if isinstance(self.engine, HasState):
            state |= {"engine": self.engine.state_dict(), "engine_class": self._engine_class}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What ``state_dict`` gave; that of an engine of another class says nothing to this one."""
        learning.load_state(self.sources, state.get("sources", {}))
        is_own = state.get("engine_class", self._engine_class) == self._engine_class  # older checkpoints do not say
        if isinstance(self.engine, HasState) and "engine" in state and is_own:
            self.engine.load_state_dict(state["engine"])

    @property
    def _engine_class(self) -> str:
        """Of what samples, in whatever it is wrapped."""
        return type(self.engine_at(EVALUATION_STEP)).__name__

    def engine_at(self, step: int) -> RolloutEngine:
        """What gives the completions of a training step, or of an evaluation: those are always the policy's own."""
        evaluates = step == EVALUATION_STEP and isinstance(self.engine, HasSampler)
        return self.engine.sampler if evaluates else self.engine  # type: ignore[attr-defined]

    @all_or_none("sampling")
    def sample(
        self,
        actor: Actor,
        prompts: PromptBatch,
        num_completions: int,
        step: int,
        early: EarlyQuestions | None = None,
    ) -> Completions:
        """Completions of ``actor``, N = P * G; ``early`` is told of groups that have ended, if the engine can."""
        if prompts.prompts[0].messages is not None and not self._turns_are_checked:
            warn_of_endless_turns(actor.tokenizer, actor.eos_token_ids)
            self._turns_are_checked = True
        seeds_N = self.seeds_N(prompts, num_completions, step)
        with (
            self.phases("rollout", actor.device),
            evaluating(actor.model),
            torch.no_grad(),
            gathered(actor.model, actor.gather),
            actor.autocast(),
            float32_default(),
            _told(self.engine_at(step), early),
        ):
            completions = self.engine_at(step).generate(
                actor.model,
                actor.tokenizer,
                prompts,
                num_completions,
                self.sampling,
                seeds_N=seeds_N,
                eos_token_ids=actor.eos_token_ids,
            )
        if len(completions) != len(seeds_N):
            engine = type(self.engine_at(step)).__name__
            raise ValueError(
                f"{engine} returned {len(completions)} completions for {len(prompts)} prompts × "
                f"{num_completions}; a group needs all of its completions. Repair the engine."
            )
        return completions

    def seeds_N(self, prompts: PromptBatch, num_completions: int, step: int) -> list[int]:
        """Of the random streams of a step's completions."""
        return stream_seeds(self.seed, step, [prompt.index for prompt in prompts.prompts], num_completions)

    def score(
        self,
        prompts: Sequence[Prompt],
        groups: Groups,
        device: torch.device,
        *,
        compare: bool,
        evaluates: bool = False,
        early: EarlyQuestions | None = None,
    ) -> GroupScores:
        """Scores of P groups by all sources."""
        with self.scoring(device, evaluates=evaluates):
            return score_groups(
                self.sources, prompts, groups, compare=compare, timeout_seconds=self.timeout_seconds, early=early
            )

    @all_or_none("combining the rewards")
    def combined(self, rewards_PGK: Tensor) -> Tensor:
        """rewards_PG."""
        return self.combine(rewards_PGK)

    @contextmanager
    def scoring(self, device: torch.device, *, evaluates: bool = False) -> Iterator[None]:
        """The models of the sources are on ``device`` inside; in an evaluation, sources that learn are as at first."""
        with self._as_first(evaluates), ExitStack() as stack:
            with all_or_none("placing the reward models"):
                models = [m for source in self.sources if isinstance(source, HoldsModels) for m in source.models()]
                stack.enter_context(on_device(models, device))
            yield

    @contextmanager
    def _as_first(self, evaluates: bool) -> Iterator[None]:
        with ExitStack() as stack:
            for source in self.sources if evaluates else ():
                if isinstance(source, LearnsFromRollouts):
                    stack.enter_context(source.as_first())
            yield


@contextmanager
def _told(engine: RolloutEngine, early: EarlyQuestions | None) -> Iterator[None]:
    """Inside, ``engine`` tells ``early`` of groups that have ended, if it can and somebody wants to know."""
    if early and isinstance(engine, TellsOfGroups):
        engine.on_group = early.add
    try:
        yield
    finally:
        if isinstance(engine, TellsOfGroups):
            engine.on_group = None


def device_of_rewards(device: torch.device) -> torch.device:
    """``device``, or the CPU where it has no float64."""
    return torch.device("cpu") if device.type == "mps" else device
