"""FSDP as Lightning strategies whose checkpoints are single files in the format of DDP, on GPUs and on CPUs.

``trainer.strategy: fsdp2`` is the recommended one, ``fsdp_cpu`` is FSDP1 on CPUs (``fsdp`` is Lightning's own and wants
GPUs). The module asks for its models to be sharded one by one (``shard``): sampling and manual backward need that.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    Strategy,
    StrategyRegistry,
)
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.optim import Adam, Optimizer

from gopo_lightning.distributed.checkpoints import load
from gopo_lightning.distributed.fsdp import full, like, no_gradient_sync, shard_fsdp1, shard_fsdp2, whole_fsdp1

M = TypeVar("M", bound=nn.Module)


class FSDP2Strategy(ModelParallelStrategy):
    """Policy, gradients and optimiser state sharded over all ranks.

    Args:
        cpu_offload: keep shards, gradients and optimiser state in CPU memory, and compute on the GPU.
        process_group_backend: nccl or gloo; by the device when null.
        timeout: longest wait for another rank.
    """

    strategy_name = "fsdp2"

    def __init__(
        self,
        cpu_offload: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
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
        self._data_parallel_size = self.num_nodes * self.num_processes
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
        return full(self.lightning_module.state_dict(), keep=self.is_global_zero)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Whole tensors on rank 0, numbered as any optimiser numbers them. A collective."""
        return full(Strategy.optimizer_state(self, optimizer), keep=self.is_global_zero)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """The whole checkpoint, of which a rank reads what it needs; rank 0 says which."""
        return load(Path(self.broadcast(checkpoint_path)), mmap=True)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Each rank takes its part of the whole tensors."""
        assert self.lightning_module is not None
        mine = self.lightning_module.state_dict()
        state = {name: like(value, mine.get(name)) for name, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning hands the state over after the optimisers are there."""
        return True

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each rank takes its part of the whole moments."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(_sharded_optimizer_state(optimizer, state))


class FSDP1Strategy(FSDPStrategy):
    """FSDP1 on CPUs, for tests and laptops; its checkpoints have the format of DDP's, also under LoRA.

    Args:
        sharding_strategy: FULL_SHARD, SHARD_GRAD_OP, HYBRID_SHARD or NO_SHARD.
        timeout: longest wait for another rank.
    """

    strategy_name = "fsdp_cpu"

    def __init__(
        self, sharding_strategy: str = "FULL_SHARD", timeout: timedelta | None = default_pg_timeout, **kwargs: Any
    ) -> None:
        super().__init__(sharding_strategy=sharding_strategy, timeout=timeout, **kwargs)  # type: ignore[arg-type]

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Registered below, under a name that Lightning lets run on CPUs."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole tensors on rank 0. A collective."""
        with self._whole() as module:
            state = module.state_dict()
        return full(state, keep=self.is_global_zero)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Whole tensors on rank 0, numbered as any optimiser numbers them. A collective."""
        with self._whole() as module:
            state = FSDP1.optim_state_dict(module, optimizer)
        numbers = {name: number for number, name in enumerate(_trained_names(module))}
        groups = optimizer.state_dict()["param_groups"]
        return {"state": {numbers[name]: value for name, value in state["state"].items()}, "param_groups": groups}

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """The whole checkpoint, of which a rank reads what it needs; rank 0 says which."""
        return load(Path(self.broadcast(checkpoint_path)), mmap=True)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Each rank takes its part of the whole tensors."""
        with self._whole() as module:
            module.load_state_dict(checkpoint["state_dict"], strict=strict)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning hands the state over after the optimisers are there."""
        return True

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each rank takes its part of the whole moments."""
        (optimizer,), (state,) = self.optimizers, checkpoint["optimizer_states"]
        with self._whole() as module:
            names = _trained_names(module)
            named = {
                "state": {names[number]: value for number, value in state["state"].items()},
                "param_groups": [
                    {**group, "params": [names[number] for number in group["params"]]}
                    for group in state["param_groups"]
                ],
            }
            optimizer.load_state_dict(FSDP1.optim_state_dict_to_load(module, optimizer, named))

    @contextmanager
    def _whole(self) -> Iterator[LightningModule]:
        assert self.lightning_module is not None
        with whole_fsdp1(self.lightning_module):
            yield self.lightning_module


def shard(model: M, trainer: Trainer | None) -> M:
    """``model`` as the strategy of ``trainer`` wants it: sharded, or as it is.

    Raises:
        ValueError: a strategy of Lightning that would train every rank on the same prompts.
    """
    strategy = None if trainer is None else trainer.strategy
    if isinstance(strategy, FSDP2Strategy):
        strategy.shard(model)
    elif isinstance(strategy, ModelParallelStrategy):
        raise ValueError("ModelParallelStrategy does not know how to shard a policy; use trainer.strategy: fsdp2")
    elif isinstance(strategy, FSDPStrategy):
        return cast(M, shard_fsdp1(model, _fsdp1_options(strategy)))
    return model


def is_sharding(strategy: Strategy) -> bool:
    """Whether ``shard`` does something under ``strategy``."""
    return isinstance(strategy, FSDP2Strategy | FSDPStrategy)


def gradient_sync(strategy: Strategy, policy: nn.Module, *, sync: bool) -> AbstractContextManager[None]:
    """Around a forward and backward: whether the ranks exchange gradients in it, as the last micro-batch must."""
    if sync or not isinstance(strategy, ParallelStrategy):
        return nullcontext()
    return strategy.block_backward_sync() if isinstance(strategy, DDPStrategy) else no_gradient_sync(policy)


def _fsdp1_options(strategy: FSDPStrategy) -> dict[str, Any]:
    return {
        **strategy.kwargs,
        "device_id": strategy.root_device,
        "cpu_offload": strategy.cpu_offload,
        "mixed_precision": strategy.mixed_precision_config,
        "sharding_strategy": strategy.sharding_strategy,
    }


def _trained_names(module: nn.Module) -> list[str]:
    """Names of the trained parameters without FSDP1's prefix, in the order of the optimiser."""
    return [
        name.replace("_fsdp_wrapped_module.", "")
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    ]


def _sharded_optimizer_state(optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shards = {
        number: {key: like(value, parameters[number].detach()) for key, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": shards}


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2 with one data-parallel rank per device")
StrategyRegistry.register("fsdp_cpu", FSDP1Strategy, description="FSDP1 on CPUs, for tests and laptops")
