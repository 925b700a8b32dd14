"""What validation and test measure: rewards, and the win rate against the policy of step 0, on any number of ranks."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, cast

from lightning.pytorch import Trainer
from torch import Tensor, nn
from torchmetrics import MeanMetric

from gopo_lightning.distributed.collectives import all_or_none, gather_objects
from gopo_lightning.distributed.run_folder import run_folder
from gopo_lightning.rewards import against_reference
from gopo_lightning.rollout.collector import EVALUATION_STEP, Actor, Collector
from gopo_lightning.training.placement import Reference
from gopo_lightning.training.reference_completions import ReferenceCompletions
from gopo_lightning.types import Completions, PromptBatch, Rollout

NAMES = ("reward", "win_rate", "length_mean", "truncated_fraction")


class Validation:
    """Rollouts on held-out prompts, beside what the reference said to them, which is sampled once and then stored.

    Args:
        collector: samples and scores.
        num_completions: of one prompt.
        reference: the policy of step 0.
    """

    def __init__(self, collector: Collector, num_completions: int, reference: Reference) -> None:
        self.collector, self.num_completions, self.reference = collector, num_completions, reference
        self.stored = ReferenceCompletions()

    def rollout(self, actor: Actor, prompts: PromptBatch, *, compare: bool = True) -> Rollout:
        """Without a comparison with the reference; ``compare`` as in `Collector.collect`."""
        return self.collector.collect(actor, prompts, self.num_completions, step=EVALUATION_STEP, compare=compare)

    def batch(self, actor: Actor, prompts: PromptBatch, trainer: Trainer, *, is_initial: bool) -> dict[str, Any]:
        """``rollout``, with rewards beside those of the reference, ``win_rate_P`` and ``win_rate_PK``.

        Args:
            actor: the policy.
            prompts: P prompts.
            trainer: places the reference, if it has to be loaded.
            is_initial: the policy is the reference itself, so what it says is stored.
        """
        rollout = self.rollout(actor, prompts, compare=False)
        if not all(gather_objects(self.stored.knows(prompts))):
            if is_initial:
                self.stored.add(prompts, rollout.completions)
                self.stored.add_scores(prompts, rollout.rewards_PGK, rollout.rewards_PG)
            else:
                self.stored.add(prompts, self._sample_reference(actor, prompts, trainer))
        if not all(gather_objects(self.stored.has_scores(prompts))):
            groups = self.stored.of(prompts)
            scores = self.collector.score(prompts.prompts, groups, actor.device, compare=False, evaluates=True)
            self.stored.add_scores(prompts, scores.rewards_PGK, self.collector.combined(scores.rewards_PGK))
        with self.collector.phases("reward", actor.device), self.collector.scoring(actor.device, evaluates=True):
            standing = against_reference(
                self.collector.sources,
                self.collector.combine,
                prompts.prompts,
                rollout.completions.groups(self.num_completions),
                rollout.rewards_PGK,
                self.stored.of(prompts),
                self.stored.scores_of(prompts).to(rollout.rewards_PGK.device),
                timeout_seconds=self.collector.timeout_seconds,
            )
        rollout = replace(rollout, rewards_PGK=standing.rewards_PGK, rewards_PG=standing.rewards_PG)
        return {"rollout": rollout, "win_rate_P": standing.win_rate_P, "win_rate_PK": standing.win_rate_PK}

    def end(self, trainer: Trainer, name: str) -> None:
        """Free the reference, and give every rank and the file ``name`` what was added. A collective."""
        self.reference.release()
        folder = run_folder(trainer)  # a broadcast: on all ranks
        writes = trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]
        self.stored.share(folder / name if writes else None)

    def _sample_reference(self, actor: Actor, prompts: PromptBatch, trainer: Trainer) -> Completions:
        """Completions of the step-0 policy after training has begun: loaded for this validation only."""
        with ExitStack() as stack:
            with all_or_none("loading the reference"):
                self.reference.load(trainer, keep=False)
                model = stack.enter_context(self.reference.of(cast(Any, actor.model)))
            return self.collector.sample(replace(actor, model=model), prompts, self.num_completions, EVALUATION_STEP)


class EvaluationMetrics(nn.ModuleDict):
    """Means over all prompts or completions; a NaN (no valid score) does not count."""

    def __init__(self, sources: Sequence[str]) -> None:
        self.sources = tuple(sources)
        self.names = (*NAMES, *(f"{source}/{name}" for source in sources for name in ("reward", "win_rate")))
        super().__init__({_key(name): MeanMetric(nan_strategy="ignore") for name in self.names})

    def update_batch(self, batch: dict[str, Any]) -> None:
        """Adds a batch; rows that only fill up the last batch of a rank are left out.

        Args:
            batch: ``rollout``, ``win_rate_P`` and ``win_rate_PK`` (against the reference, of the combined reward and
                of each source) and ``is_padding`` (bool [P]).
        """
        rollout: Rollout = batch["rollout"]
        keep_P = ~batch["is_padding"].to(rollout.rewards_PG.device)
        keep_N = keep_P.repeat_interleave(rollout.group_size)
        if not keep_P.any():
            return
        values = {
            "reward": rollout.rewards_PG[keep_P],
            "win_rate": batch["win_rate_P"][keep_P],
            "length_mean": rollout.completions.lengths_N[keep_N].float(),
            "truncated_fraction": rollout.completions.truncated_N[keep_N].float(),
        }
        for k, source in enumerate(self.sources):
            values[f"{source}/reward"] = rollout.rewards_PGK[keep_P][..., k]
            values[f"{source}/win_rate"] = batch["win_rate_PK"][keep_P][..., k]
        for name, value in values.items():
            cast(MeanMetric, self[_key(name)]).update(value)

    def pop(self, stage: str) -> dict[str, Tensor]:  # type: ignore[override]
        """``<stage>/<name>`` → value over all ranks; starts anew. A collective."""
        values = {f"{stage}/{name}": cast(MeanMetric, self[_key(name)]).compute() for name in self.names}
        for name in self.names:
            cast(MeanMetric, self[_key(name)]).reset()
        return values


def _key(name: str) -> str:
    """``name`` as torch allows a submodule to be called: without dots, and not like a method of the dictionary.

    No two names share a key.
    """
    return "mean of " + name.replace("%", "%25").replace(".", "%2E")
