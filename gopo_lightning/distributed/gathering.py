"""Sharded weights for sampling and scoring: gathered whole for a while, or layer by layer in every forward.

While they are whole, ranks may run as many forwards as they like. Layer by layer a forward is a collective: ranks must
run equally many, whatever the lengths of their texts.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, TypeAlias, TypeVar
from weakref import WeakSet

import psutil
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from gopo_lightning.distributed.collectives import all_reduce_sum, gather_objects, world_size
from gopo_lightning.distributed.fsdp import is_sharded, reshard, whole_bytes

T = TypeVar("T")

Gather: TypeAlias = Literal["full", "layer"]

_whole: "WeakSet[nn.Module]" = WeakSet()
"""Sharded models that are gathered at present."""


@contextmanager
def gathered(model: nn.Module, how: Gather = "full") -> Iterator[None]:
    """Around forwards of ``model`` without gradient that leave its weights as they are. A collective, twice.

    Args:
        how: ``full``: every rank holds all weights inside, and its shard alone again outside. ``layer``: a forward
            gathers each layer when it comes to it and frees it after, so all ranks must run equally many forwards
            (``forward_is_collective``).

    Raises:
        ValueError: ``full``, and a rank has no memory for it. All ranks raise.
    """
    if how == "full" and is_sharded(model):
        require_memory(whole_bytes(model), free_bytes(compute_device(model)))
        _whole.add(model)
    try:
        with _gathered_whole(model) if how == "full" else _gathered_by_layer(model):
            yield
    finally:
        _whole.discard(model)


def forward_is_collective(model: nn.Module) -> bool:
    """Whether a forward of ``model`` gathers weights, so that all ranks must run it together."""
    return is_sharded(model) and model not in _whole


def in_step(items: Sequence[T], model: nn.Module, *, spare: T) -> list[T]:
    """The inputs of this rank's forwards of ``model``, with as many ``spare`` ones as the rank with most has more.

    As they are where a forward concerns its rank alone; else a collective.
    """
    if not forward_is_collective(model):
        return list(items)
    return [*items, *[spare] * (max(gather_objects(len(items))) - len(items))]


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` is true on any rank. A collective."""
    return bool(all_reduce_sum(torch.tensor(int(flag), device=device)) > 0)


def compute_device(model: nn.Module) -> torch.device:
    """Where ``model`` computes, though its shards may be kept in CPU memory."""
    parameter = next(model.parameters())
    if not isinstance(parameter, DTensor) or parameter.device_mesh.device_type == parameter.device.type:
        return parameter.device
    return torch.device(parameter.device_mesh.device_type, torch.accelerator.current_device_index())


def free_bytes(device: torch.device) -> int:
    """Memory of ``device`` that this rank may still take; on CPUs its share of what the machine has left."""
    if device.type == "cpu":
        return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def require_memory(needed: int, free: int) -> None:
    """ValueError on all ranks if ``needed`` bytes are more than what is free on any. A collective."""
    least = min(gather_objects(free))
    if needed > least:
        raise ValueError(
            f"a rollout on whole weights needs {needed} bytes ({needed / 2**30:.1f} GiB) on each rank, and a rank has "
            f"{least} ({least / 2**30:.1f} GiB) free. Set model.init_args.placement.rollout_gather: layer, which "
            "gathers layer by layer, or use more memory or a smaller policy."
        )


@contextmanager
def _gathered_by_layer(model: nn.Module) -> Iterator[None]:
    try:
        yield
    finally:
        reshard(model)  # the root would stay


@contextmanager
def _gathered_whole(model: nn.Module) -> Iterator[None]:
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
