"""One sharding plan for any decoder-only model of Hugging Face: each decoder layer by itself, then the rest as one.

FSDP2 replaces parameters by DTensors and gathers a layer when its forward or backward needs it. Sampling would gather
every layer for every token, so ``gathered`` holds the whole model while it samples, and ranks then need not agree
about the number of tokens.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, cast

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
    StateDictType,
    fully_shard,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from gopo_lightning.layers import base_of, decoder_layers


def shard_fsdp2(model: nn.Module, mesh: DeviceMesh, *, dtype: torch.dtype | None, cpu_offload: bool = False) -> None:
    """Shard ``model`` in place over the ranks of ``mesh``.

    Args:
        dtype: of gathered weights and of the computation; gradients are reduced in float32. None keeps the weights'.
        cpu_offload: keep shards, gradients and optimiser state in CPU memory.
    """
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=None if dtype is None else torch.float32),
        "offload_policy": CPUOffloadPolicy() if cpu_offload else OffloadPolicy(),
    }
    for layer in decoder_layers(model):
        fully_shard(layer, **options)
    fully_shard(base_of(model), **options)  # never the PeftModel around it


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
def gathered(model: nn.Module) -> Iterator[None]:
    """Every rank holds all weights of ``model`` inside, and its shard alone again outside. A collective, twice.

    Inside, ranks may run forwards as they like, without gradient; the weights must not be changed.
    """
    wrapped = [module for module in model.modules() if isinstance(module, FSDP1)]
    if wrapped:
        with FSDP1.summon_full_params(wrapped[0], writeback=False), _called_directly(wrapped):
            yield
        return
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded[1:]:  # the first is the root, whose backward follows at once
            module.set_reshard_after_forward(True, recurse=False)
        reshard(model)


def reshard(model: nn.Module) -> None:
    """Free what a forward without backward has left gathered, so that no later one reads stale weights."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


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


@contextmanager
def _called_directly(wrapped: list[FSDP1]) -> Iterator[None]:
    """FSDP1 modules call the module they wrap directly, and nothing is gathered or freed."""
    for module in wrapped:
        module.forward = module.module.__call__  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in wrapped:
            del module.forward
