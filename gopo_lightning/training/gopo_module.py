"""The LightningModule: policy, frozen reference, rewards; optimiser steps and logging. The maths lives elsewhere.

batch["experience"] ──▶ log-probs ──▶ loss ──▶ backward ──▶ optimiser step
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cached_property, partial
from time import perf_counter
from typing import Any, cast

import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gopo_lightning._compat import attached_trainer
from gopo_lightning.distributed.checkpoints import TrainableState, install_atomic_saving
from gopo_lightning.distributed.collectives import all_reduce_sum, gather_objects, rank, world_size
from gopo_lightning.distributed.fsdp import clip_grad_norm, reshard
from gopo_lightning.distributed.strategies import gradient_sync
from gopo_lightning.objectives import advantages
from gopo_lightning.objectives.clipped import LossConfig, denominator, loss_mask, policy_loss
from gopo_lightning.policy.logprobs import TokenLogprobs, completion_logprobs
from gopo_lightning.policy.model import Policy, PolicyConfig, eos_token_ids, evaluating, float32_default, load_tokenizer
from gopo_lightning.policy.prefix_sharing import PrefixSharing, decide_prefix_sharing
from gopo_lightning.rewards import PairwiseSource, RewardSource
from gopo_lightning.rewards.combine import get as combination
from gopo_lightning.rollout import RolloutEngine, SamplingConfig, TransformersEngine
from gopo_lightning.training import checks
from gopo_lightning.training.advantage import Advantage
from gopo_lightning.training.callbacks.lengths import LengthCheck
from gopo_lightning.training.callbacks.predictions import PredictionWriter, prediction_records
from gopo_lightning.training.callbacks.save_on_signal import SaveOnSignal
from gopo_lightning.training.callbacks.validate_first import ValidateFirst
from gopo_lightning.training.curves import rollout_metrics, update_metrics
from gopo_lightning.training.micro_batches import MicroBatch, fill_up, forwarded_tokens, minibatches, split_groups
from gopo_lightning.training.optimisation import OptimisedModule
from gopo_lightning.training.placement import PlacementConfig, Reference, load_placed_policy
from gopo_lightning.training.resume import OnSettingChange, plain
from gopo_lightning.training.rollout_callback import RolloutCallback
from gopo_lightning.training.schedules import Schedule, WarmupStart
from gopo_lightning.training.validation import EvaluationMetrics
from gopo_lightning.types import Experience


class GOPOModule(TrainableState, OptimisedModule):
    """Group Ordinal Policy Optimization (arXiv 2602.03876) and its baselines.

    Args:
        policy: which causal LM to train.
        rewards: what scores the completions, or compares them with each other; at least one.
        sampling: temperature, lengths and stop conditions of the completions.
        placement: where weights are, and when, under strategies that shard.
        loss: clipping, KL penalty and aggregation.
        engine: what samples the completions.
        optimizer: built on the policy's trainable parameters; AdamW by default.
        combine: several sources → one reward: `weighted_sum`; `borda` adds the ranks within each source;
            `lexicographic` lets a source only break the ties of those before it; `z_score` normalises each source
            within the group, then adds; or the dotted path of your own function rewards_PGK → rewards_PG.
        combine_options: keyword arguments of that function, such as `weights: [1, 0.5]`, one per source.
        advantage: `ordinal` (GOPO), `calibrated`, `grpo`, `rloo`, … (docs/rewards.md), or the dotted path of your own
            function rewards_PG → advantages_PG. Where the only source is pairwise, `ordinal` reads its comparisons.
        advantage_options: keyword arguments of that function, such as `ties: arbitrary`.
        num_completions: G, completions of one prompt in training; at least 2.
        eval_num_completions: completions of one prompt in validation, test and predict.
        lr_schedule: a schedule of `transformers.get_scheduler`, such as `constant_with_warmup`, `linear`, `cosine`.
        warmup_steps: optimiser steps over which the learning rate rises to its whole.
        warmup_start: the warm-up's step k = 0, 1, … has (k + 1) / warmup_steps of the learning rate (`first_step`), or
            k / warmup_steps (`zero`, transformers' rule: the first step changes nothing). A checkpoint keeps its own.
        lr_schedule_options: keyword arguments of the schedule, such as `min_lr_rate: 0.1` of `cosine_with_min_lr`.
        max_grad_norm: gradients are scaled down to this L2 norm; null for none.
        micro_batch_tokens: most tokens of one forward and backward, in whole groups (a larger one goes alone);
            null takes a minibatch at once. The result does not depend on it, memory does.
        num_inner_epochs: passes over one rollout.
        num_minibatches: optimiser steps in one pass; must divide the data module's prompts_per_step.
        prefix_sharing: `always` forwards a group's prompt once, `never` with each completion; `auto` shares after
            comparing both on the first step, and else says why not.
        log_entropy: log the policy's entropy.
        log_reference_kl: log the KL divergence to the reference although kl_coef is 0 (one more forward a step).
        reward_timeout_seconds: longest time of one reward source for one batch; beyond it the run ends with an error on
            all ranks. Null waits for ever.
        max_invalid_steps: so many steps in a row without any valid score of a reward source end the run; null warns.
        seed: of the completions' random streams; the value of seed_everything when null.
        on_setting_change: what happens when a run is resumed with another seed, num_completions, advantage, optimiser
            class or policy: `refuse`, or `warn` and go on. Any other setting may change, and acts from the resume on.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        rewards: list[RewardSource | PairwiseSource],
        sampling: SamplingConfig,
        placement: PlacementConfig = PlacementConfig(),  # noqa: B008  (frozen)
        loss: LossConfig = LossConfig(),  # noqa: B008
        engine: RolloutEngine | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-6, weight_decay=0.0),
        combine: str = "weighted_sum",
        combine_options: dict[str, Any] | None = None,
        advantage: str = "ordinal",
        advantage_options: dict[str, Any] | None = None,
        num_completions: int = 8,
        eval_num_completions: int = 4,
        lr_schedule: str = "constant_with_warmup",
        warmup_steps: int = 10,
        warmup_start: WarmupStart = "first_step",
        lr_schedule_options: dict[str, Any] | None = None,
        max_grad_norm: float | None = 1.0,
        micro_batch_tokens: int | None = None,
        num_inner_epochs: int = 1,
        num_minibatches: int = 1,
        prefix_sharing: PrefixSharing = "auto",
        log_entropy: bool = True,
        log_reference_kl: bool = False,
        reward_timeout_seconds: float | None = 1200.0,
        max_invalid_steps: int | None = None,
        seed: int | None = None,
        on_setting_change: OnSettingChange = "refuse",
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        checks.check_positive(
            eval_num_completions=eval_num_completions,
            num_inner_epochs=num_inner_epochs,
            num_minibatches=num_minibatches,
            micro_batch_tokens=1 if micro_batch_tokens is None else micro_batch_tokens,
        )
        checks.check_group_size(num_completions)
        checks.check_sources(rewards)
        checks.check_above_zero(reward_timeout_seconds=reward_timeout_seconds, max_grad_norm=max_grad_norm)
        self.policy_config, self.sampling, self.loss_config, self.placement = policy, sampling, loss, placement
        self.optimizer_callable = optimizer
        self.schedule = Schedule(lr_schedule, warmup_steps, warmup_start, lr_schedule_options or {})
        self.max_grad_norm, self.micro_batch_tokens = max_grad_norm, micro_batch_tokens
        self.num_inner_epochs, self.num_minibatches = num_inner_epochs, num_minibatches
        self.prefix_sharing, self.on_setting_change = prefix_sharing, on_setting_change
        self._shares_prefix: bool | None = None  # decided at the first step
        self.log_entropy, self.log_reference_kl = log_entropy, log_reference_kl
        self.reward_names = [source.name for source in rewards]
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self._settings = {
            "seed": self.seed,
            "num_completions": num_completions,
            "advantage": advantage,
            "advantage_options": advantage_options or {},
            "combine": combine,
            "combine_options": combine_options or {},
            "rewards": self.reward_names,
            "sampling": asdict(sampling),
            "loss": asdict(loss),
            "num_inner_epochs": num_inner_epochs,
            "num_minibatches": num_minibatches,
            "max_grad_norm": max_grad_norm,
        }
        self.phase, self.policy_is_initial = "start", False
        self.advantage = Advantage(advantage, advantage_options, rewards, combine, combine_options)
        self.rollout = RolloutCallback(
            engine or TransformersEngine(),
            rewards,
            combine=combination(combine, num_sources=len(rewards), **(combine_options or {})),
            advantage=self.advantage,
            from_wins=self.advantage.from_wins,
            sampling=sampling,
            num_completions=num_completions,
            eval_num_completions=eval_num_completions,
            seed=self.seed,
            reward_timeout_seconds=reward_timeout_seconds,
            max_invalid_steps=max_invalid_steps,
        )
        self.policy: Policy = cast(Policy, None)  # see configure_model
        self.reference = Reference(policy, placement)  # no module: hidden from state_dict, checkpoints and the strategy
        self.eval_metrics = EvaluationMetrics(self.reward_names)

    # ------------------------------------------------------------------ set-up

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's; the data module renders prompts with it."""
        return load_tokenizer(self.policy_config)

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Token ids that end a completion."""
        return eos_token_ids(self.policy, self.tokenizer)

    @property
    def updates_per_batch(self) -> int:
        """K, optimiser steps per rollout."""
        return self.num_inner_epochs * self.num_minibatches

    @property
    def _reads_reference(self) -> bool:
        return self.loss_config.kl_coef > 0 or self.log_reference_kl

    def configure_callbacks(self) -> list[Callback]:
        checks.check_trainer(
            self.trainer, updates_per_rollout=self.updates_per_batch, policy_dtype=self.policy_config.dtype
        )
        self.placement.check(self.trainer)
        if self.trainer.state.fn == "fit":
            checks.check_sampling(self.sampling, updates_per_rollout=self.updates_per_batch)
        kept = super().configure_callbacks()
        return [*kept, SaveOnSignal(), LengthCheck(), self.rollout, ValidateFirst(), PredictionWriter()]

    def configure_model(self) -> None:
        if cast(Policy | None, self.policy) is None:
            self.policy = load_placed_policy(self.policy_config, self.placement, attached_trainer(self))
            self.reference.remember(self.policy)
            self._settings["policy"] = self.policy_config.describe()  # now: files may change in a run
            self.policy_is_initial = True

    def run_settings(self) -> dict[str, Any]:
        """Also of what is sampled, ranked and minimised."""
        return super().run_settings() | plain(self._settings)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.policy_is_initial = False

    def setup(self, stage: str) -> None:
        install_atomic_saving(self.trainer)
        if stage == "fit":
            checks.check_minibatches(self.trainer, self.num_minibatches)
            self.advantage.set_up()
            if self._reads_reference:
                self.reference.load(self.trainer, keep=True)

    def on_fit_start(self) -> None:
        self.policy.train()

    # ---------------------------------------------------------------- training

    @float32_default()
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        start, experience = perf_counter(), self._with_logprobs(batch["experience"])
        updates = [self._update(experience, groups_P) for groups_P in self._minibatches(experience)]
        metrics = {key: torch.stack([update[key] for update in updates]).mean() for key in updates[0]}
        if (difference := "train/sampler_logprob_diff") in metrics:
            metrics[difference] = updates[0][difference]  # later ones saw other weights
        seconds = {**batch["seconds"], "train": perf_counter() - start}  # the metrics have synchronised the device
        self._log_training(experience, metrics, seconds)

    def _with_logprobs(self, experience: Experience) -> Experience:
        """Adds the log-probs that must be taken before the first update: the old policy's and the reference's."""
        if self._shares_prefix is None:
            self._shares_prefix = decide_prefix_sharing(
                self.prefix_sharing, self.policy, experience, self.sampling.temperature
            )
            reshard(self.policy)
        old = reference = None
        if self.updates_per_batch > 1:
            old = self._frozen_logprobs(self.policy, experience)
        if self._reads_reference:
            with self.reference.of(self.policy) as model:
                reference = self._frozen_logprobs(model, experience)
        return replace(experience, old_logprobs_NT=old, reference_logprobs_NT=reference)

    @torch.no_grad()
    def _frozen_logprobs(self, model: torch.nn.Module, experience: Experience) -> Tensor:
        """logprobs_NT without gradient, micro-batch by micro-batch."""
        G = experience.group_size
        logprobs_PGT = torch.zeros_like(experience.completions.tokens_NT, dtype=torch.float32).unflatten(0, (-1, G))
        with evaluating(model):
            for groups_P, _ in self._micro_batches(experience):
                logprobs_NT = self._logprobs(model, experience.select(groups_P)).logprobs_NT
                logprobs_PGT[groups_P, :, : logprobs_NT.shape[1]] = logprobs_NT.unflatten(0, (-1, G))
        reshard(model)
        return logprobs_PGT.flatten(0, 1)

    def _logprobs(self, model: torch.nn.Module, experience: Experience, with_entropy: bool = False) -> TokenLogprobs:
        return completion_logprobs(
            model,
            experience.prompts,
            experience.completions,
            temperature=self.sampling.temperature,
            with_entropy=with_entropy,
            shared_prefix=bool(self._shares_prefix),
        )

    def _minibatches(self, experience: Experience) -> Iterator[Tensor]:
        """This rank's groups of num_inner_epochs × num_minibatches updates; the split is drawn anew each epoch."""
        generator = torch.Generator().manual_seed(self.seed + self.trainer.global_step)
        draw = partial(minibatches, len(experience), self.num_minibatches, generator, rank(), world_size())
        return (groups_P for _ in range(self.num_inner_epochs) for groups_P in draw())

    def _micro_batches(
        self, experience: Experience, groups_P: Tensor | None = None, skip_zero: bool = False
    ) -> list[MicroBatch]:
        """The groups (None: all) by token budget, as many micro-batches on every rank.

        With ``skip_zero`` those without advantage are left out, unless all are, on all ranks.
        """
        wanted_P = torch.ones(len(experience), dtype=torch.bool)
        if groups_P is not None:
            wanted_P = torch.zeros_like(wanted_P).index_fill(0, groups_P, True)
        active_P = wanted_P & experience.advantages_PG.ne(0).any(-1).cpu() if skip_zero else wanted_P
        split = partial(split_groups, experience, budget=self.micro_batch_tokens, shared=bool(self._shares_prefix))
        active, wanted = (split(active_P=some_P) for some_P in (active_P, wanted_P))
        numbers = gather_objects((len(active), len(wanted)))
        num_active, num_wanted = (max(column) for column in zip(*numbers, strict=True))
        return fill_up(experience, active if num_active else wanted, num_active or num_wanted)

    def _update(self, experience: Experience, groups_P: Tensor) -> dict[str, Tensor]:
        """One optimiser step on ``groups_P``; the denominator is that of the whole minibatch over all ranks."""
        config = self.loss_config
        mask_PGT = self._loss_mask(experience).unflatten(0, (-1, experience.group_size))
        total = all_reduce_sum(
            denominator(
                mask_PGT[groups_P].flatten(0, 1),
                aggregation=config.aggregation,
                max_new_tokens=self.sampling.max_new_tokens,
                num_completions=len(groups_P) * experience.group_size,
            )
        )
        micro_batches = self._micro_batches(experience, groups_P, skip_zero=config.kl_coef == 0)
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64, device=self.device))
        for i, (micro_P, counts) in enumerate(micro_batches):
            with gradient_sync(self.trainer.strategy, self.policy, sync=i + 1 == len(micro_batches)):
                self._accumulate(experience.select(micro_P), total, sums, counts)
        return self._step(experience, sums)

    def _loss_mask(self, experience: Experience) -> Tensor:
        completions, valid_PG = experience.completions, advantages.valid(experience.rewards_PG)
        valid_N = valid_PG.flatten().to(completions.mask_NT.device)
        return loss_mask(completions.mask_NT, valid_N, completions.truncated_N, self.loss_config)

    def _accumulate(self, experience: Experience, total: Tensor, sums: dict[str, Tensor], counts: bool) -> None:
        """Forward and backward of one micro-batch, with weight 0 unless it ``counts``; adds its metrics to ``sums``."""
        completions, mask_NT = experience.completions, self._loss_mask(experience) & counts
        current = self._logprobs(self.policy, experience, with_entropy=self.log_entropy)
        loss, metrics = policy_loss(
            current.logprobs_NT,
            experience.old_logprobs_NT,
            experience.reference_logprobs_NT,
            experience.advantages_PG.flatten(),
            mask_NT,
            config=self.loss_config,
            denominator=total,
            sampler_logprobs_NT=completions.sampler_logprobs_NT,
        )
        self.manual_backward(loss * world_size())  # DDP and FSDP average over ranks; the denominator is global
        metrics["tokens"], metrics["loss"] = mask_NT.sum(), loss.detach()
        real, forwarded = forwarded_tokens(experience, shared=bool(self._shares_prefix))
        padding = forwarded - real * counts
        metrics["padding"], metrics["forwarded"] = torch.tensor([padding, forwarded], device=self.device)
        if current.entropy_NT is not None:
            metrics["entropy"] = current.entropy_NT.detach()[mask_NT].sum()
        if completions.sampler_logprobs_NT is not None:
            difference_NT = current.logprobs_NT.detach() - completions.sampler_logprobs_NT
            metrics["sampler_logprob_diff"] = difference_NT[mask_NT].abs().sum()
        for key, value in metrics.items():
            sums[key] += value.double()

    def _step(self, experience: Experience, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Clip, step, and the minibatch's metrics over all ranks."""
        keys = sorted(sums)
        reduced = dict(zip(keys, all_reduce_sum(torch.stack([sums[key] for key in keys])), strict=True))
        grad_norm = clip_grad_norm(self.policy, self.max_grad_norm or float("inf"))
        checks.check_finite(self.trainer, experience, reduced["loss"], grad_norm)
        optimizer: Any = self.optimizers()
        scheduler: Any = self.lr_schedulers()
        lr = optimizer.param_groups[0]["lr"]
        optimizer.step()
        self.policy_is_initial = False
        optimizer.zero_grad()
        scheduler.step()
        return {"train/grad_norm": grad_norm, "train/lr": torch.tensor(lr), **update_metrics(reduced)}

    def _log_training(self, experience: Experience, metrics: dict[str, Tensor], seconds: dict[str, float]) -> None:
        self._log(metrics | rollout_metrics(experience, self.rollout.reward_sources, seconds))
        writer = getattr(self.logger, "experiment", None)
        if hasattr(writer, "add_histogram"):
            writer.add_histogram("advantage/histogram", experience.advantages_PG, self.trainer.global_step)  # type: ignore[union-attr]

    def _log(self, metrics: dict[str, Tensor]) -> None:
        """All curves are drawn over optimiser steps, not batches."""
        metrics = {key: value.float() for key, value in metrics.items()}
        self.log_dict({**metrics, "step": float(self.trainer.global_step)}, batch_size=1)

    # -------------------------------------------------------------- evaluation

    def on_validation_epoch_start(self) -> None:
        self.phase = "validate"

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.eval_metrics.update_batch(batch)

    def on_validation_epoch_end(self) -> None:
        self._log(self.eval_metrics.pop("val"))

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.eval_metrics.update_batch(batch)

    def on_test_epoch_end(self) -> None:
        self._log(self.eval_metrics.pop("test"))

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """One record per prompt, padding rows left out."""
        return prediction_records(batch["experience"], batch["is_padding"], self.reward_names)
