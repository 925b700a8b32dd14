"""Fills ``batch["experience"]``: sample, score, rank. Nothing but the batch is written; the module only reads it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from gopo_lightning.distributed.collectives import all_or_none, gather_objects
from gopo_lightning.distributed.gathering import gathered
from gopo_lightning.distributed.run_folder import run_folder
from gopo_lightning.policy.model import evaluating, float32_default, warn_of_endless_turns
from gopo_lightning.rewards import GroupScores, HoldsModels, Source, against_reference, score_groups
from gopo_lightning.rewards.pairwise import Groups
from gopo_lightning.rewards.validity import InvalidSteps
from gopo_lightning.rollout.engines.base import ChecksSampling, RolloutEngine, SamplingConfig
from gopo_lightning.rollout.engines.streams import stream_seeds
from gopo_lightning.training.phases import device_of_rewards, phase
from gopo_lightning.training.placement import on_device, set_up_source
from gopo_lightning.training.reference_completions import ReferenceCompletions
from gopo_lightning.types import Completions, Experience, Prompt, PromptBatch

if TYPE_CHECKING:
    from gopo_lightning.training.gopo_module import GOPOModule

EVALUATION_STEP = -1
"""Keys the random streams of validation, test and predict: the same at every step, so that curves compare policies."""


class RolloutCallback(Callback):
    """Before each batch: G completions of each prompt, their rewards, and in training their advantages.

    Args:
        engine: samples completions.
        rewards: the K reward sources.
        combine: rewards_PGK → rewards_PG.
        advantage: rewards_PG → advantages_PG, or wins_PGG → advantages_PG if ``from_wins``.
        from_wins: the advantage reads the comparison matrices of the only source, a pairwise one.
        sampling: temperature, lengths, stop conditions.
        num_completions: G in training.
        eval_num_completions: G in validation, test and predict.
        seed: of the random streams; a completion's stream is keyed by (seed, step, prompt row, completion index).
        reward_timeout_seconds: longest time of one source for one batch.
        max_invalid_steps: so many training steps in a row without any score of a source end the run.

    What fails on one rank fails on all: each stage that can fail is ``all_or_none``, one after the other and never one
    inside another, so that every rank takes part in equally many collectives.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        rewards: Sequence[Source],
        *,
        combine: Callable[[Tensor], Tensor],
        advantage: Callable[[Tensor], Tensor],
        from_wins: bool = False,
        sampling: SamplingConfig,
        num_completions: int,
        eval_num_completions: int,
        seed: int,
        reward_timeout_seconds: float | None = None,
        max_invalid_steps: int | None = None,
    ) -> None:
        self.engine, self.reward_sources = engine, rewards
        self.combine, self.advantage, self.from_wins = combine, advantage, from_wins
        self.sampling, self.seed = sampling, seed
        self.num_completions, self.eval_num_completions = num_completions, eval_num_completions
        self.reward_timeout_seconds = reward_timeout_seconds
        self.reference = ReferenceCompletions()
        self.invalid = InvalidSteps([source.name for source in rewards], max_invalid_steps)
        self._turns_are_checked = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(self.engine, ChecksSampling):
            cap = cast("GOPOModule", pl_module).loss_config.sampler_correction_cap
            self.engine.check_sampling(self.sampling, logprobs=stage == "fit" and cap is not None)
        for source in self.reward_sources:
            with all_or_none(f"the set-up of reward source '{source.name}'"):
                set_up_source(source, cast("GOPOModule", pl_module).placement, trainer)
        self.reference.begin(self._made_by(cast("GOPOModule", pl_module)))

    def state_dict(self) -> dict[str, Any]:
        return {"reference": self.reference.state_dict(), "invalid": self.invalid.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.reference.load_state_dict(state_dict["reference"])
        self.invalid.load_state_dict(state_dict.get("invalid", {}))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        module = cast("GOPOModule", pl_module)
        experience, seconds = self.roll_out(
            module, module.policy, batch["prompts"], self.num_completions, step=trainer.global_step
        )
        self.invalid.update(trainer.global_step, experience.rewards_PGK)
        module.phase = "train"
        judged = experience.rewards_PG
        if self.from_wins:
            assert experience.wins_PGGK is not None
            judged = experience.wins_PGGK[..., 0]
        with all_or_none("the advantage"):
            advantages_PG = self.advantage(judged).float().to(experience.advantages_PG.device)
        batch["experience"] = replace(experience, advantages_PG=advantages_PG)
        batch["seconds"] = seconds

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        module = cast("GOPOModule", pl_module)
        self._evaluate(module, batch, compare=False)  # with the reference instead, in _stand
        self._stand(module, batch)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._evaluate(cast("GOPOModule", pl_module), batch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._share_reference(trainer, pl_module, "reference_completions.jsonl")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._share_reference(trainer, pl_module, "reference_completions_test.jsonl")

    def roll_out(
        self,
        module: "GOPOModule",
        model: nn.Module,
        prompts: PromptBatch,
        num_completions: int,
        *,
        step: int,
        compare: bool = True,
    ) -> tuple[Experience, dict[str, float]]:
        """Sample from ``model`` and score. Advantages are still 0. Returns the experience and seconds per phase.

        Without ``compare`` pairwise sources are not asked to compare a group with itself, and their columns are NaN.
        """
        completions, seconds = self._sample(module, model, prompts, num_completions, step)
        with phase(module, "reward") as reward:
            scores = self._score(module, prompts.prompts, completions.groups(num_completions), compare)
            device = device_of_rewards(prompts.tokens_PL.device)
            rewards_PGK = scores.rewards_PGK.to(device)
            with all_or_none("combining the rewards"):
                rewards_PG = self.combine(rewards_PGK)
        experience = Experience(
            prompts,
            completions,
            rewards_PGK,
            rewards_PG,
            torch.zeros_like(rewards_PG, dtype=torch.float32, device=prompts.tokens_PL.device),
            wins_PGGK=None if scores.wins_PGGK is None else scores.wins_PGGK.to(device),
        )
        return experience, {"rollout": seconds, "reward": reward[0]}

    @all_or_none("sampling")
    def _sample(
        self, module: "GOPOModule", model: nn.Module, prompts: PromptBatch, num_completions: int, step: int
    ) -> tuple[Completions, float]:
        """Completions of ``model``, and the seconds they took."""
        if prompts.prompts[0].messages is not None and not self._turns_are_checked:
            warn_of_endless_turns(module.tokenizer, module.eos_token_ids)
            self._turns_are_checked = True
        indices = [prompt.index for prompt in prompts.prompts]
        seeds_N = stream_seeds(self.seed, step, indices, num_completions)
        autocast = module.trainer.precision_plugin.forward_context()  # hooks run outside of it
        gather = gathered(model, module.placement.rollout_gather)
        with (
            phase(module, "rollout") as rollout,
            evaluating(model),
            torch.no_grad(),
            gather,
            autocast,
            float32_default(),
        ):
            completions = self.engine.generate(
                model,
                module.tokenizer,
                prompts,
                num_completions,
                self.sampling,
                seeds_N=seeds_N,
                eos_token_ids=module.eos_token_ids,
            )
        if len(completions) != len(seeds_N):
            raise ValueError(
                f"{type(self.engine).__name__} returned {len(completions)} completions for {len(prompts)} prompts × "
                f"{num_completions}; a group needs all of its completions. Repair the engine."
            )
        return completions, rollout[0]

    def _score(self, module: "GOPOModule", prompts: Sequence[Prompt], groups: Groups, compare: bool) -> GroupScores:
        with self._scoring(module):
            return score_groups(
                self.reward_sources, prompts, groups, compare=compare, timeout_seconds=self.reward_timeout_seconds
            )

    def _evaluate(self, module: "GOPOModule", batch: Any, compare: bool = True) -> None:
        batch["experience"], batch["seconds"] = self.roll_out(
            module,
            module.policy,
            batch["prompts"],
            self.eval_num_completions,
            step=EVALUATION_STEP,
            compare=compare,
        )

    def _stand(self, module: "GOPOModule", batch: Any) -> None:
        """Rewards of the batch's experience beside those of the reference, which is sampled once and then stored."""
        prompts: PromptBatch = batch["prompts"]
        experience: Experience = batch["experience"]
        self._know_reference(module, experience)
        start = perf_counter()
        with self._scoring(module):
            standing = against_reference(
                self.reward_sources,
                self.combine,
                prompts.prompts,
                experience.completions.groups(self.eval_num_completions),
                experience.rewards_PGK,
                self.reference.of(prompts),
                self.reference.scores_of(prompts).to(experience.rewards_PGK.device),
                timeout_seconds=self.reward_timeout_seconds,
            )
        batch["seconds"]["reward"] += perf_counter() - start
        batch["experience"] = replace(experience, rewards_PGK=standing.rewards_PGK, rewards_PG=standing.rewards_PG)
        batch["win_rate_P"], batch["win_rate_PK"] = standing.win_rate_P, standing.win_rate_PK

    def _know_reference(self, module: "GOPOModule", experience: Experience) -> None:
        """See to it that the reference's completions of the experience's prompts are there, and scored."""
        prompts = experience.prompts
        if not all(gather_objects(self.reference.knows(prompts))):
            if module.policy_is_initial:
                self.reference.add(prompts, experience.completions)
                self.reference.add_scores(prompts, experience.rewards_PGK, experience.rewards_PG)
            else:
                self.reference.add(prompts, self._sample_reference(module, prompts))
        if not all(gather_objects(self.reference.has_scores(prompts))):
            scores = self._score(module, prompts.prompts, self.reference.of(prompts), compare=False)
            with all_or_none("combining the rewards"):
                rewards_PR = self.combine(scores.rewards_PGK)
            self.reference.add_scores(prompts, scores.rewards_PGK, rewards_PR)

    def _sample_reference(self, module: "GOPOModule", prompts: PromptBatch) -> Completions:
        """Completions of the step-0 policy after training has begun: loaded for this validation only."""
        with ExitStack() as stack:
            with all_or_none("loading the reference"):
                module.reference.load(module.trainer, keep=False)
                model = stack.enter_context(module.reference.of(module.policy))
            return self._sample(module, model, prompts, self.eval_num_completions, EVALUATION_STEP)[0]

    def _made_by(self, module: "GOPOModule") -> dict[str, Any]:
        """All but the prompt that decides what the reference says in an evaluation."""
        policy = module.policy_config
        return {
            "policy": (policy.name, policy.revision, policy.dtype),
            "precision": str(module.trainer.precision),
            "engine": type(self.engine).__name__,
            "sampling": sorted(asdict(self.sampling).items()),
            "num_completions": self.eval_num_completions,
            "seed": self.seed,
        }

    @contextmanager
    def _scoring(self, module: "GOPOModule") -> Iterator[None]:
        """The models of the sources are on the device inside."""
        with ExitStack() as stack:
            with all_or_none("placing the reward models"):
                models = [
                    m for source in self.reward_sources if isinstance(source, HoldsModels) for m in source.models()
                ]
                stack.enter_context(on_device(models, module.device))
            yield

    def _share_reference(self, trainer: Trainer, pl_module: LightningModule, name: str) -> None:
        cast("GOPOModule", pl_module).reference.release()
        folder = run_folder(trainer)  # a broadcast: on all ranks
        writes = trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]
        self.reference.share(folder / name if writes else None)
