"""Where weights are, and when: how the policy is loaded and gathered, and where frozen models wait for their phase."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, cast

import torch
from lightning.pytorch import Trainer
from torch import nn
from transformers import PreTrainedModel

from gopo_lightning.distributed.fsdp import reshard
from gopo_lightning.distributed.gathering import Gather
from gopo_lightning.distributed.offloading import on_device
from gopo_lightning.distributed.strategies import FSDP2Strategy, check_strategy, shard
from gopo_lightning.policy.adapters import KeptWeights
from gopo_lightning.policy.model import Policy, PolicyConfig, load_policy, load_reference, reference_of
from gopo_lightning.policy.sharded_loading import fill_shards, policy_without_weights
from gopo_lightning.rewards import HoldsModels, Source
from gopo_lightning.rewards.loading import Empty, without_weights

CPU = torch.device("cpu")


@dataclass(frozen=True)
class PlacementConfig:
    """Where weights are, and when. The defaults are the fastest; the others need less memory."""

    load: Literal["whole", "shards"] = "whole"
    """`whole`: every rank loads the policy, then keeps its shard. `shards`: a rank reads its shard alone from the
    safetensors, for policies that no process could hold (`trainer.strategy: fsdp2`). So are frozen models that are
    sharded, but for adapters, which are merged into their base."""
    rollout_gather: Gather = "full"
    """Of a sharded policy. `full`: gathered once per rollout, after a check of free memory. `layer`: in every forward
    layer by layer, which costs a gather of all weights per token and memory for one layer (`fsdp2`)."""
    frozen_models: Literal["replicate", "shard", "offload"] = "replicate"
    """The reference and reward models. `replicate`: on every device. `shard`: over all ranks, gathered layer by layer
    (`fsdp2`). `offload`: in CPU memory, and on the device while they are used."""

    def check(self, trainer: Trainer) -> None:
        """ValueError for what the strategy of ``trainer`` cannot do."""
        strategy = trainer.strategy
        check_strategy(strategy)
        if isinstance(strategy, FSDP2Strategy):
            return
        name = strategy.strategy_name if hasattr(strategy, "strategy_name") else type(strategy).__name__
        for option, sharding, others in (
            ("load", "shards", "whole"),
            ("rollout_gather", "layer", "full"),
            ("frozen_models", "shard", "offload or replicate"),
        ):
            if getattr(self, option) == sharding:
                raise ValueError(
                    f"placement.{option}={sharding}, but the strategy {name} does not shard; use "
                    f"trainer.strategy: fsdp2, or placement.{option}: {others}"
                )


def load_placed_policy(config: PolicyConfig, placement: PlacementConfig, trainer: Trainer | None) -> Policy:
    """The policy, sharded if the strategy shards."""
    if placement.load == "whole" or trainer is None:
        policy = load_policy(config)
        shard(policy, trainer)
    else:
        policy = policy_without_weights(config)
        shard(policy, trainer)
        strategy = cast(FSDP2Strategy, trainer.strategy)
        fill_shards(policy, config.name, config.revision, _shards_device(strategy))
    return policy


def place_frozen(model: nn.Module, placement: PlacementConfig, trainer: Trainer, *, exact: bool) -> None:
    """Put a frozen ``model``, which is on the CPU, where it waits for its phase.

    Args:
        exact: gathered weights keep their dtype also where the policy's are cast, as scores must.
    """
    if placement.frozen_models == "replicate":
        model.to(trainer.strategy.root_device)
    elif placement.frozen_models == "shard":
        cast(FSDP2Strategy, trainer.strategy).shard(model, exact=exact)


def set_up_source(source: Source, placement: PlacementConfig, trainer: Trainer) -> None:
    """``source.setup``, and its models placed; one that names none keeps all it has on the device.

    Models that are to be loaded by shards, where they are no adapters, never have their weights whole.
    """
    if placement.frozen_models == "replicate" or not isinstance(source, HoldsModels):
        source.setup(trainer.strategy.root_device)
    else:
        by_shards = placement.load == "shards" and placement.frozen_models == "shard"
        loading: AbstractContextManager[Empty] = without_weights() if by_shards else nullcontext({})
        with loading as empty:
            source.setup(CPU)
        for model in source.models():
            place_frozen(model, placement, trainer, exact=True)
            if model in empty:
                fill_shards(model, *empty[model], _shards_device(cast(FSDP2Strategy, trainer.strategy)))
        if not source.models():
            source.setup(trainer.strategy.root_device)


def _shards_device(strategy: FSDP2Strategy) -> torch.device:
    return CPU if strategy.cpu_offload else strategy.root_device


class Reference:
    """The frozen policy of step 0: of an adapter its own base or the weights it began with, else a copy that is loaded
    when it is needed.
    """

    def __init__(self, config: PolicyConfig, placement: PlacementConfig) -> None:
        self.config, self.placement = config, placement
        self.copy: PreTrainedModel | None = None
        self.initial: KeptWeights | None = None
        self._kept, self._device = False, CPU

    def remember(self, policy: Policy) -> None:
        """Keep what ``policy``, as it was loaded, begins with, if its base alone does not say."""
        if self.config.trains_adapter and not self.config.begins_as_base:
            self.initial = KeptWeights.of(policy)

    def load(self, trainer: Trainer, *, keep: bool) -> None:
        """Load and place the copy, if there is to be one; ``release`` lets it go unless it was once to be kept."""
        self._kept, self._device = self._kept or keep, trainer.strategy.root_device
        if self.config.trains_adapter or self.copy is not None:
            return
        if self.placement.load == "shards" and self.placement.frozen_models == "shard":
            policy = load_placed_policy(self.config, self.placement, trainer)
            self.copy = cast(PreTrainedModel, policy.requires_grad_(False).eval())
            trainer.precision_plugin.convert_module(self.copy)
        else:
            self.copy = load_reference(self.config)
            trainer.precision_plugin.convert_module(self.copy)  # as the policy is: `bf16-true` rounds the weights
            place_frozen(self.copy, self.placement, trainer, exact=False)

    def release(self) -> None:
        """Free what was loaded for one use."""
        if not self._kept:
            self.copy = None

    @contextmanager
    def of(self, policy: Policy) -> Iterator[nn.Module]:
        """The reference model of ``policy``, ready to compute."""
        models = [] if self.copy is None else [self.copy]
        reshard(policy)
        with on_device(models, self._device), reference_of(policy, self.copy or self.initial) as model:
            yield model
            reshard(model)
