"""FSDP2 as a Lightning strategy whose checkpoints are single files in the format of DDP, on GPUs and on CPUs.

``trainer.strategy: fsdp2``. The module asks for its models to be sharded one by one (``shard``): sampling and manual
backward need that.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    Strategy,
    StrategyRegistry,
)
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.optim import Adam, Optimizer

from gopo_lightning._compat import set_data_parallel_size
from gopo_lightning.distributed.checkpoints import load_checkpoint
from gopo_lightning.distributed.fsdp import no_gradient_sync, shard_fsdp2, shard_like, whole_tensors

TIMEOUT = timedelta(minutes=30)


class FSDP2Strategy(ModelParallelStrategy):
    """Policy, gradients and optimiser state sharded over all ranks.

    Args:
        cpu_offload: keep shards, gradients and optimiser state in CPU memory, and compute on the GPU.
        process_group_backend: nccl or gloo; by the device when null.
        timeout: longest wait for another rank; 30 minutes by default, as torch has it.
    """

    strategy_name = "fsdp2"

    def __init__(
        self,
        cpu_offload: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = TIMEOUT,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.cpu_offload = cpu_offload

    def setup_environment(self) -> None:
        """All ranks read different prompts (Lightning's default would be tensor parallel within a node)."""
        set_data_parallel_size(self, self.num_nodes * self.num_processes)
        super().setup_environment()

    def shard(self, model: nn.Module, *, exact: bool = False) -> None:
        """Shard ``model`` in place; all ranks hold the same weights before. ``exact`` gathers them as they are."""
        mixed = self.precision_plugin.precision == "bf16-mixed" and not exact
        mesh = self.device_mesh["data_parallel"]
        shard_fsdp2(model, mesh, dtype=torch.bfloat16 if mixed else None, cpu_offload=self.cpu_offload)

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Refuses what torch would refuse at the first step, in words of its own."""
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            if optimizer.defaults.get("fused") and not isinstance(optimizer, Adam):
                name = type(optimizer).__name__
                raise ValueError(f"a fused {name} cannot step sharded weights; set its init_args.fused to false")

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole tensors on rank 0. A collective."""
        assert self.lightning_module is not None
        return whole_tensors(self.lightning_module.state_dict(), keep=self.is_global_zero)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Whole tensors on rank 0, numbered as any optimiser numbers them. A collective."""
        return whole_tensors(Strategy.optimizer_state(self, optimizer), keep=self.is_global_zero)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """The whole checkpoint, of which a rank reads what it needs; rank 0 says which."""
        return load_checkpoint(Path(self.broadcast(checkpoint_path)), mmap=True)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Each rank takes its part of the whole tensors."""
        assert self.lightning_module is not None
        mine = self.lightning_module.state_dict()
        state = {name: shard_like(value, mine.get(name)) for name, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning hands the state over after the optimisers are there."""
        return True

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each rank takes its part of the whole moments."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(_sharded_optimizer_state(optimizer, state))


def check_strategy(strategy: Strategy) -> None:
    """ValueError for the strategies of Lightning that shard: the module as a whole (FSDP1), or as it says itself."""
    if isinstance(strategy, FSDPStrategy | ModelParallelStrategy) and not isinstance(strategy, FSDP2Strategy):
        raise ValueError(
            f"trainer.strategy is {type(strategy).__name__}, which cannot shard a policy that is also sampled from; "
            'use trainer.strategy: fsdp2, in Python Trainer(strategy="fsdp2") or FSDP2Strategy()'
        )


def shard(model: nn.Module, trainer: Trainer | None) -> None:
    """Shard ``model`` in place if the strategy of ``trainer`` shards."""
    if trainer is not None and isinstance(trainer.strategy, FSDP2Strategy):
        trainer.strategy.shard(model)


def gradient_sync(strategy: Strategy, policy: nn.Module, *, sync: bool) -> AbstractContextManager[None]:
    """Around a forward and backward: whether the ranks exchange gradients in it, as the last micro-batch must."""
    if sync or not isinstance(strategy, ParallelStrategy):
        return nullcontext()
    return strategy.block_backward_sync() if isinstance(strategy, DDPStrategy) else no_gradient_sync(policy)


def _sharded_optimizer_state(optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """``state`` with this rank's part of its tensors. Parameters are told by their places in the groups, as torch does:
    their numbers need not count from 0.
    """
    saved, mine = (
        [parameter for group in groups for parameter in group["params"]]
        for groups in (state["param_groups"], optimizer.param_groups)
    )
    parameters = dict(zip(saved, mine, strict=True))
    shards = {
        number: {key: shard_like(value, parameters[number].detach()) for key, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": shards}


def _fsdp_cpu() -> FSDP2Strategy:
    """An earlier name, of FSDP1 on CPUs."""
    rank_zero_warn("trainer.strategy: fsdp_cpu is an old name of fsdp2, which runs on CPUs too; write fsdp2")
    return FSDP2Strategy()


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2 with one data-parallel rank per device")
StrategyRegistry.register("fsdp_cpu", _fsdp_cpu, description="an old name of fsdp2")
