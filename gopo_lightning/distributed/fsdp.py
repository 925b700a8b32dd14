"""One sharding plan for any decoder-only model of Hugging Face: each decoder layer by itself, then the rest as one.

FSDP2 replaces parameters by DTensors and gathers a layer when its forward or backward needs it; ``gathering.py`` is
about sampling on such weights.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullOptimStateDictConfig,
    FullStateDictConfig,
    MixedPrecisionPolicy,
    OffloadPolicy,
    ShardingStrategy,
    StateDictType,
    fully_shard,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from gopo_lightning.distributed.decoder_layers import base_of, decoder_layers

_gathered_dtypes: "WeakKeyDictionary[nn.Module, torch.dtype | None]" = WeakKeyDictionary()
"""What FSDP2 casts weights to when it gathers them; None leaves them as they are."""


def shard_fsdp2(model: nn.Module, mesh: DeviceMesh, *, dtype: torch.dtype | None, cpu_offload: bool = False) -> None:
    """Shard ``model`` in place over the ranks of ``mesh``.

    Args:
        dtype: of gathered weights and of the computation; gradients are reduced in float32. None keeps the weights'.
        cpu_offload: keep shards, gradients and optimiser state in CPU memory.

    Raises:
        ValueError: the model names no layers to shard by.
    """
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=None if dtype is None else torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if cpu_offload else OffloadPolicy(),
    }
    for layer in decoder_layers(model):
        fully_shard(layer, **options)
    fully_shard(base_of(model), **options)  # never the PeftModel around it
    _gathered_dtypes[model] = dtype


def shard_fsdp1(model: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """``model`` wrapped by FSDP1 with keyword arguments ``options``; a PeftModel is wrapped inside and stays one."""
    classes = {type(layer) for layer in decoder_layers(model)}
    wrapped = FSDP1(
        base_of(model), **{**options, "use_orig_params": True, "auto_wrap_policy": ModuleWrapPolicy(classes)}
    )
    if not isinstance(model, PeftModel):
        return wrapped
    model.base_model.model = wrapped
    return model


@contextmanager
def no_gradient_sync(model: nn.Module) -> Iterator[None]:
    """Backward passes inside add gradients up on their rank; the next one outside reduces them all."""
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_requires_gradient_sync(False, recurse=False)
    root = root_fsdp1(model)
    try:
        with nullcontext() if root is None else root.no_sync():
            yield
    finally:
        for module in sharded:
            module.set_requires_gradient_sync(True, recurse=False)


def is_sharded(model: nn.Module) -> bool:
    """Whether ``model`` or a part of it is sharded by FSDP1 or FSDP2."""
    return any(isinstance(module, FSDP1 | FSDPModule) for module in model.modules())


def reshard(model: nn.Module) -> None:
    """Free what a forward without backward has left gathered, so that no later one reads stale weights."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_bytes(model: nn.Module) -> int:
    """Bytes that all weights of a sharded ``model`` take when they are gathered."""
    root = root_fsdp1(model)
    if root is not None:
        assert root.process_group is not None
        parts = 1 if root.sharding_strategy is ShardingStrategy.NO_SHARD else root.process_group.size()
        return parts * sum(p.numel() * p.element_size() for p in model.parameters())
    dtype = _gathered_dtypes.get(model)
    return sum(p.numel() * (dtype or p.dtype).itemsize for p in model.parameters())


def root_fsdp1(model: nn.Module) -> FSDP1 | None:
    """The outermost FSDP1 module of ``model``, or None if it is not sharded by FSDP1."""
    return next((module for module in model.modules() if isinstance(module, FSDP1)), None)


def clip_grad_norm(policy: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients so that their common L2 norm is at most ``max_norm``; returns the norm before, a scalar.

    Right for plain and for sharded parameters, whose norm is taken over all shards. A collective if sharded.
    """
    root = root_fsdp1(policy)
    if root is not None:
        return root.clip_grad_norm_(max_norm)
    norm = nn.utils.clip_grad_norm_(policy.parameters(), max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def full(tree: Any, *, keep: bool) -> Any:
    """``tree`` with every DTensor as a whole CPU tensor. A collective; ranks with ``keep`` False get empty tensors."""

    def whole(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        tensor = cast(DTensor, value.to(value.device_mesh.device_type)).full_tensor()
        return tensor.cpu() if keep else torch.empty(0)

    return tree_map(whole, tree, is_leaf=lambda value: isinstance(value, Tensor))


@contextmanager
def whole_fsdp1(module: nn.Module) -> Iterator[None]:
    """State dicts of FSDP1 modules in ``module`` hold whole tensors inside, left on their device (see below)."""
    # offload_to_cpu crashes on CPUs
    settings = (StateDictType.FULL_STATE_DICT, FullStateDictConfig(), FullOptimStateDictConfig(offload_to_cpu=False))
    with FSDP1.state_dict_type(module, *settings):
        yield


def whole_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Whole CPU tensors, of an adapter those of the adapter alone. A collective; complete on rank 0."""
    if root_fsdp1(model) is not None:
        with whole_fsdp1(model):
            return {name: value.cpu() for name, value in model.state_dict().items()}
    options = StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=isinstance(model, PeftModel)
    )
    return cast(dict[str, Tensor], get_model_state_dict(model, options=options))


@contextmanager
def plain_names(model: nn.Module) -> Iterator[None]:
    """Inside, the modules of ``model`` are named as if FSDP1 had not wrapped any: peft looks for its layers by name."""
    original = model.named_modules

    def named_modules(*args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        return ((name.replace("_fsdp_wrapped_module.", ""), module) for name, module in original(*args, **kwargs))

    model.named_modules = named_modules  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.named_modules


def like(value: Any, template: Any) -> Any:
    """This rank's part of the whole tensor ``value``, as ``template`` is sharded; anything else as it is."""
    if not isinstance(template, DTensor) or not isinstance(value, Tensor) or value.shape != template.shape:
        return value
    part = distribute_tensor(value.to(template.device), template.device_mesh, template.placements, src_data_rank=None)
    return part.clone()  # not a view of the whole
