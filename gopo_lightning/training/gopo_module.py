"""The LightningModule: policy, frozen reference, rewards; optimiser steps and logging. The maths lives elsewhere.

prompts ──▶ Collector ──▶ Rollout ──▶ Shaping ──▶ Experience ──▶ GradientUpdate ──▶ optimiser step
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import torch
from lightning.pytorch import Callback
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gopo_lightning._compat import attached_trainer
from gopo_lightning.data.sources import load_rows
from gopo_lightning.distributed.checkpoints import TrainableState, install_atomic_saving
from gopo_lightning.distributed.collectives import all_or_none, rank, world_size
from gopo_lightning.objectives.base import Needed
from gopo_lightning.policy.model import Policy, PolicyConfig, eos_token_ids, float32_default, load_tokenizer
from gopo_lightning.rewards import learning
from gopo_lightning.rewards.validity import InvalidSteps
from gopo_lightning.rollout import RolloutCallback, SamplingConfig
from gopo_lightning.rollout.collector import EVALUATION_STEP, Actor
from gopo_lightning.rollout.engines.base import ChecksSampling
from gopo_lightning.rollout.phases import Phases
from gopo_lightning.rollout.transforms import Context
from gopo_lightning.training import argument_checks, checks
from gopo_lightning.training.build import (
    build_advantage,
    build_collector,
    build_refill,
    build_shaping,
    describe_settings,
)
from gopo_lightning.training.callbacks.predictions import PredictionWriter, prediction_records
from gopo_lightning.training.callbacks.standard import standard_callbacks
from gopo_lightning.training.callbacks.validate_first import ValidateFirst
from gopo_lightning.training.companions import Iterate
from gopo_lightning.training.config import (
    ObjectiveConfig,
    RewardConfig,
    RolloutConfig,
    UpdateConfig,
    as_config,
    default_optimizer,
)
from gopo_lightning.training.curves import rollout_metrics
from gopo_lightning.training.forward import PolicyForward
from gopo_lightning.training.loggers import log_histogram
from gopo_lightning.training.micro_batches import minibatches
from gopo_lightning.training.next_step import next_step
from gopo_lightning.training.optimisation import OptimisedModule
from gopo_lightning.training.placement import PlacementConfig, Reference, load_placed_policy, set_up_source
from gopo_lightning.training.recorded_stream import build_streams
from gopo_lightning.training.resume import OnSettingChange, plain
from gopo_lightning.training.schedules import Schedule
from gopo_lightning.training.update import build_update
from gopo_lightning.training.update_rule import Part, Term
from gopo_lightning.training.validation import EvaluationMetrics, Validation
from gopo_lightning.types import Experience, PromptBatch, Rollout

R = TypeVar("R", bound=Rollout)

if TYPE_CHECKING:  # in Python a group may be a dict, and the first field of a group may stand for it
    PolicyGroup: TypeAlias = PolicyConfig | Mapping[str, Any] | str
    RewardGroup: TypeAlias = RewardConfig | Mapping[str, Any] | Sequence[Any]
    RolloutGroup: TypeAlias = RolloutConfig | Mapping[str, Any]
    ObjectiveGroup: TypeAlias = ObjectiveConfig | Mapping[str, Any] | str
    UpdateGroup: TypeAlias = UpdateConfig | Mapping[str, Any]
    PlacementGroup: TypeAlias = PlacementConfig | Mapping[str, Any]
else:  # what the command line parses
    PolicyGroup, RewardGroup, RolloutGroup = PolicyConfig, RewardConfig, RolloutConfig
    ObjectiveGroup, UpdateGroup, PlacementGroup = ObjectiveConfig, UpdateConfig, PlacementConfig


class GOPOModule(TrainableState, OptimisedModule):
    """Group Ordinal Policy Optimization (arXiv 2602.03876), its baselines and its relatives.

    In Python each group of arguments may be a dict of its fields: ``GOPOModule(policy="…", rewards=[…])``.

    Args:
        policy: which causal LM to train.
        rewards: what scores the completions, or compares them with each other.
        rollout: how completions are sampled.
        objective: advantage, credit and loss.
        update: optimiser, schedule, minibatches and memory.
        placement: where weights are, and when, under strategies that shard.
        seed: of the completions' random streams; the value of seed_everything when null.
        on_setting_change: what happens when a run is resumed with another seed, num_completions, advantage, optimiser
            class or policy: `refuse`, or `warn` and go on. Any other setting may change, and acts from the resume on.
    """

    kind = "policy"
    fixed_settings = ("seed", "rollout.num_completions", "objective.advantage", "optimizer.class", "policy", "also")

    def __init__(
        self,
        policy: PolicyGroup,
        rewards: RewardGroup,
        rollout: RolloutGroup = RolloutConfig(),  # noqa: B008  (frozen)
        objective: ObjectiveGroup = ObjectiveConfig(),  # noqa: B008
        update: UpdateGroup = UpdateConfig(),  # noqa: B008
        placement: PlacementGroup = PlacementConfig(),  # noqa: B008
        seed: int | None = None,
        on_setting_change: OnSettingChange = "refuse",
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.policy_config = as_config(PolicyConfig, policy, "policy")
        self.base_model = self.policy_config.name, self.policy_config.revision
        self.reward_config = as_config(RewardConfig, rewards, "rewards")
        self.rollout_config = as_config(RolloutConfig, rollout, "rollout")
        self.objective_config = as_config(ObjectiveConfig, objective, "objective")
        self.update_config = as_config(UpdateConfig, update, "update")
        self.placement = as_config(PlacementConfig, placement, "placement")
        self.on_setting_change: OnSettingChange = on_setting_change
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        groups = self.rollout_config, self.reward_config, self.objective_config
        argument_checks.check_arguments(*groups, self.update_config)
        self.optimizer_callable = self.update_config.optimizer or default_optimizer
        options = self.update_config.lr_schedule_options or {}
        warmup = self.update_config.warmup_steps, self.update_config.warmup_start
        self.schedule = Schedule(self.update_config.lr_schedule, *warmup, options)
        self.phases, self.policy_is_initial = Phases(), False
        self.reward_names = [source.name for source in self.reward_config.sources]
        self.invalid = InvalidSteps(self.reward_names, self.reward_config.max_invalid_steps)
        self.collector = build_collector(*groups[:2], self.seed, self.phases, partial(next_step, self))
        self.forward_pass = PolicyForward(
            self.sampling.temperature, self.update_config.micro_batch_tokens, self.update_config.prefix_sharing
        )
        self.update = build_update(self.update_config, self.objective_config, self.forward_pass, self.seed)
        self.collector.engine = self.update.engine(self.collector.engine)
        self.advantage = build_advantage(self.reward_config, self.objective_config)
        self.refill = build_refill(self.rollout_config, self.collector, self.advantage)
        tokenizer = partial(getattr, self, "tokenizer")
        self.shaping = build_shaping(*groups, self.advantage, tokenizer)
        self.loss = self.objective_config.loss
        every = self.objective_config.iterate_every
        self.iterate = None if every is None else Iterate(every)
        self.streams = build_streams(self.objective_config, self.update_config, self.sampling, self.seed, tokenizer)
        self.terms = [Term(self.loss), *(stream.term for stream in self.streams)]
        argument_checks.check_iterate(self.needs, every)
        self._settings = {"seed": self.seed, **describe_settings(*groups, self.update_config)}
        self.policy: Policy = cast(Policy, None)  # see configure_model
        self.reference = Reference(self.policy_config, self.placement)  # no module: hidden from state_dict and strategy
        self.validation = Validation(self.collector, self.rollout_config.eval_num_completions, self.reference)
        self.rollout_callback = RolloutCallback(self)
        self.eval_metrics = EvaluationMetrics(self.reward_names)

    # ------------------------------------------------------------------ set-up

    @property
    def sampling(self) -> SamplingConfig:
        """Of the completions."""
        return self.rollout_config.sampling

    @property
    def phase(self) -> str:
        """What is done at the moment; the progress bar shows it."""
        return self.phases.current

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
        return self.update_config.num_inner_epochs * self.update_config.num_minibatches

    @property
    def needs(self) -> frozenset[Needed]:
        """Frozen log-probs that something reads."""
        return frozenset().union(*self._needs_of_terms)

    @property
    def _needs_of_terms(self) -> list[frozenset[Needed]]:
        """The same of each stream of experience, the rollout first."""
        ours = self.loss.needs | self.shaping.needs
        logged: frozenset[Needed] = frozenset({"reference"} if self.objective_config.log_reference_kl else ())
        return [ours | logged, *(stream.term.objective.needs for stream in self.streams)]

    def configure_callbacks(self) -> list[Callback]:
        checks.check_trainer(
            self.trainer, updates_per_rollout=self.updates_per_batch, policy_dtype=self.policy_config.dtype
        )
        self.placement.check(self.trainer)
        self.update.check(self.trainer)
        if self.trainer.state.fn == "fit":
            checks.check_sampling(self.sampling, updates_per_rollout=self.updates_per_batch)
        ours = [*super().configure_callbacks(), *standard_callbacks(self.trainer, self.rollout_config)]
        return [*ours, self.rollout_callback, ValidateFirst(), PredictionWriter()]

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

    def prepare_data(self) -> None:
        for stream in self.streams:
            load_rows(stream.config.data)  # what is not local, on one process per node

    def setup(self, stage: str) -> None:
        install_atomic_saving(self.trainer)
        with all_or_none("the set-up of the rollout engine"):  # it may ask a server
            if isinstance(engine := self.collector.engine, ChecksSampling):
                engine.check_sampling(self.sampling, logprobs=stage == "fit" and self.loss.reads_sampler)
        for source in self.collector.sources:
            with all_or_none(f"the set-up of reward source '{source.name}'"):
                set_up_source(source, self.placement, self.trainer)
        self.validation.stored.begin(self._made_by())
        if stage == "fit":
            checks.check_minibatches(self.trainer, self.update_config.num_minibatches)
            checks.check_order(self.trainer, self.rollout_config)
            self.advantage.set_up()
            for stream in self.streams:
                self._settings.setdefault("also", {})[stream.term.name] = stream.set_up(self.trainer)
            if "reference" in self.needs:
                self.reference.load(self.trainer, keep=True)

    def _made_by(self) -> dict[str, Any]:
        """All but the prompt that decides what the reference says in an evaluation."""
        policy = self.policy_config
        return {
            "policy": (policy.name, policy.revision, policy.dtype),
            "precision": str(self.trainer.precision),
            "engine": type(self.collector.engine_at(EVALUATION_STEP)).__name__,
            "sampling": sorted(asdict(self.sampling).items()),
            "num_completions": self.rollout_config.eval_num_completions,
            "seed": self.seed,
        }

    def on_fit_start(self) -> None:
        self.policy.train()

    # ---------------------------------------------------------------- rollouts

    def training_batch(self, prompts: PromptBatch, *, step: int) -> dict[str, Any]:
        """``experience`` and the ``seconds`` of its phases; called by the rollout callback."""
        self.phases.begin()
        self.update.begin(step)
        if self.iterate is not None:
            self.iterate.refresh(self.policy, step)
        rollout = self.collector.collect(self._actor(), prompts, self.rollout_config.num_completions, step=step)
        self.invalid.update(step, rollout.rewards_PGK)
        data: Any = getattr(self.trainer, "datamodule", None)
        rollout, refilled = self.refill(rollout, self._actor(), data, step=step)
        if self.shaping.needs:
            autocast = self.trainer.precision_plugin.forward_context()  # the callback's hooks run outside of it
            with self.phases("logprobs", self.device), autocast, float32_default():
                rollout = self._with_logprobs(rollout, self.shaping.needs)
        experience = self.shaping(rollout, Context(self.seed, step))
        self.phases.current = "train"
        recorded = [stream.experience(self._actor(), step) for stream in self.streams]
        seconds = self.phases.seconds
        return {"experience": experience, "recorded": recorded, "seconds": seconds, "refilled": refilled}

    def validation_batch(self, prompts: PromptBatch) -> dict[str, Any]:
        """``rollout`` and win rates, with the ``seconds``; called by the rollout callback."""
        self.phases.begin()
        batch = self.validation.batch(self._actor(), prompts, self.trainer, is_initial=self.policy_is_initial)
        return {**batch, "seconds": self.phases.seconds}

    def prediction_batch(self, prompts: PromptBatch) -> dict[str, Any]:
        """``rollout`` and the ``seconds``; called by the rollout callback."""
        self.phases.begin()
        return {"rollout": self.validation.rollout(self._actor(), prompts), "seconds": self.phases.seconds}

    def _actor(self) -> Actor:
        """The policy as it is now."""
        autocast, gather = self.trainer.precision_plugin.forward_context, self.placement.rollout_gather
        return Actor(self.policy, self.tokenizer, self.eos_token_ids, self.device, autocast, gather)

    def rollout_state(self) -> dict[str, Any]:
        """What the next rollouts and validations depend on beside the weights. A collective."""
        state: dict[str, Any] = {
            "reference": self.validation.stored.state_dict(),
            "invalid": self.invalid.state_dict(),
            "transforms": self.shaping.state_dict(),
            "shares_prefix": self.forward_pass.shares_prefix,
            "streams": {stream.term.name: stream.state_dict() for stream in self.streams},
            **self.collector.state_dict(),
        }
        if self.iterate is not None:
            state["iterate"] = self.iterate.state_dict(keep=self.trainer.is_global_zero)
        return state

    def load_rollout_state(self, state: Mapping[str, Any]) -> None:
        """What ``rollout_state`` gave."""
        self.validation.stored.load_state_dict(state["reference"])
        self.invalid.load_state_dict(state.get("invalid", {}))
        self.shaping.load_state_dict(state.get("transforms", {}))
        self.collector.load_state_dict(state)
        self.forward_pass.restore(state.get("shares_prefix"))
        for stream in self.streams:
            stream.load_state_dict(state.get("streams", {}).get(stream.term.name, {}))
        if self.iterate is not None and "iterate" in state:
            self.iterate.load_state_dict(state["iterate"])

    # ---------------------------------------------------------------- training

    @float32_default()
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        start = perf_counter()
        streams = zip([batch["experience"], *batch["recorded"]], self._needs_of_terms, strict=True)
        experiences = [self._with_logprobs(each, needs) for each, needs in streams]
        updates = []
        for groups in zip(*map(self._minibatches, experiences), strict=True):
            parts = [Part(*part) for part in zip(self.terms, experiences, groups, strict=True)]
            updates.append(self.update(self, self.policy, parts))
            self.policy_is_initial = False
        experience = experiences[0]
        metrics = {key: torch.stack([update[key] for update in updates]).mean() for key in updates[0]}
        if (difference := "train/sampler_logprob_diff") in metrics:
            metrics[difference] = updates[0][difference]  # later ones saw other weights
        self.shaping.commit(experience)
        learning.observe(self.collector.sources, experience, step=self.trainer.global_step)
        seconds = {**batch["seconds"], "train": perf_counter() - start}  # the metrics have synchronised the device
        measured = rollout_metrics(experience, self.collector, seconds, batch["refilled"])
        self._log(metrics | measured | self.shaping.metrics())
        log_histogram(self.trainer, "advantage/histogram", experience.advantages_PG)

    def _with_logprobs(self, rollout: R, needs: frozenset[Needed]) -> R:
        """Adds the frozen log-probs that are needed, before the first update, and are not there. A collective."""
        self.forward_pass.decide(self.policy, rollout)
        found: dict[str, Any] = {}
        differs = self.updates_per_batch > 1 or "old" in self.shaping.needs  # else old is current
        if "old" in needs and differs and rollout.old_logprobs_NT is None:
            found["old_logprobs_NT"] = self.forward_pass.frozen(self.policy, rollout)
        if "reference" in needs and rollout.reference_logprobs_NT is None:
            with self.reference.of(self.policy) as model:
                found["reference_logprobs_NT"] = self.forward_pass.frozen(model, rollout)
        if "iterate" in needs and rollout.iterate_logprobs_NT is None:
            assert self.iterate is not None
            with self.iterate.of(self.policy) as model:
                found["iterate_logprobs_NT"] = self.forward_pass.frozen(model, rollout)
        return replace(rollout, **found) if found else rollout

    def _minibatches(self, experience: Experience) -> Iterator[Tensor]:
        """This rank's groups of num_inner_epochs × num_minibatches updates; the split is drawn anew each epoch."""
        generator = torch.Generator().manual_seed(self.seed + self.trainer.global_step)
        num_minibatches = self.update_config.num_minibatches
        draw = partial(minibatches, len(experience), num_minibatches, generator, rank(), world_size())
        return (groups_P for _ in range(self.update_config.num_inner_epochs) for groups_P in draw())

    def _log(self, metrics: dict[str, Tensor]) -> None:
        """All curves are drawn over optimiser steps, not batches."""
        metrics = {key: value.float() for key, value in metrics.items()}
        self.log_dict({**metrics, "step": float(self.logged_step)}, batch_size=1)

    # -------------------------------------------------------------- evaluation

    def on_validation_epoch_start(self) -> None:
        self.phases.current = "validate"

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.eval_metrics.update_batch(batch)

    def on_validation_epoch_end(self) -> None:
        self._log(self.eval_metrics.pop("val"))

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.eval_metrics.update_batch(batch)

    def on_validation_end(self) -> None:
        self.validation.end(self.trainer, "reference_completions.jsonl")

    def on_test_epoch_end(self) -> None:
        self._log(self.eval_metrics.pop("test"))

    def on_test_end(self) -> None:
        self.validation.end(self.trainer, "reference_completions_test.jsonl")

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """One record per prompt, padding rows left out."""
        return prediction_records(batch["rollout"], batch["is_padding"], self.reward_names)
