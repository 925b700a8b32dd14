"""One sharding plan for any decoder-only model of Hugging Face: each decoder layer by itself, then the rest as one.

FSDP2 replaces parameters by DTensors and gathers a layer when its forward or backward needs it; ``gathering.py`` is
about sampling on such weights.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor

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


@contextmanager
def no_gradient_sync(model: nn.Module) -> Iterator[None]:
    """Backward passes inside add gradients up on their rank; the next one outside reduces them all."""
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_requires_gradient_sync(False, recurse=False)
    try:
        yield
    finally:
        for module in sharded:
            module.set_requires_gradient_sync(True, recurse=False)


def is_sharded(model: nn.Module) -> bool:
    """Whether ``model`` or a part of it is sharded."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def reshard(model: nn.Module) -> None:
    """Free what a forward without backward has left gathered, so that no later one reads stale weights."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_bytes(model: nn.Module) -> int:
    """Bytes that all weights of a sharded ``model`` take when they are gathered."""
    dtype = _gathered_dtypes.get(model)
    return sum(p.numel() * (dtype or p.dtype).itemsize for p in model.parameters())


def clip_grad_norm(policy: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients so that their common L2 norm is at most ``max_norm``; returns the norm before, a scalar.

    Right for plain and for sharded parameters, whose norm is taken over all shards. A collective if sharded.
    """
    norm = nn.utils.clip_grad_norm_(policy.parameters(), max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def whole_tensors(tree: Any, *, keep: bool) -> Any:
    """``tree``, dictionaries of any depth, with every DTensor as a whole CPU tensor.

    A collective; ranks with ``keep`` False get empty tensors.
    """
    if isinstance(tree, Mapping):
        return {key: whole_tensors(value, keep=keep) for key, value in tree.items()}
    if not isinstance(tree, DTensor):
        return tree
    tensor = cast(DTensor, tree.to(tree.device_mesh.device_type)).full_tensor()
    return tensor.cpu() if keep else torch.empty(0)


def whole_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Whole CPU tensors, of an adapter those of the adapter alone. A collective; complete on rank 0."""
    options = StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=isinstance(model, PeftModel)
    )
    return cast(dict[str, Tensor], get_model_state_dict(model, options=options))


def shard_like(value: Any, template: Any) -> Any:
    """This rank's part of the whole tensor ``value``, as ``template`` is sharded; anything else as it is."""
    if not isinstance(template, DTensor) or not isinstance(value, Tensor) or value.shape != template.shape:
        return value
    part = distribute_tensor(value.to(template.device), template.device_mesh, template.placements, src_data_rank=None)
    return part.clone()  # not a view of the whole
