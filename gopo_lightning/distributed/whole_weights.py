"""The policy's weights one at a time, whole and named as in its checkpoint, for an engine that keeps a copy."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from gopo_lightning._compat import persistent_buffers
from gopo_lightning.distributed.decoder_layers import base_of
from gopo_lightning.distributed.gathering import forward_is_collective


def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each weight, the products of an adapter that is switched on added to it; tied ones twice.

    The model is left as it is. Values share its memory and are gone once the iterator has left their layer: copy them.
    If a forward of ``model`` is a collective, so is this, layer by layer: all ranks must go through to the end.

    Raises:
        ValueError: an adapter that is more than a product of two matrices (DoRA, modules_to_save, other than LoRA).
    """
    return _walk(base_of(model), "", forward_is_collective(model))


def _walk(module: nn.Module, prefix: str, gather: bool) -> Iterator[tuple[str, Tensor]]:
    if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        yield from _merged(module, prefix)
        return
    with _whole(module) if gather else nullcontext():
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False)) | persistent_buffers(module)
        for name, value in own.items():
            yield prefix + name, value.detach()
        for name, child in module.named_children():
            yield from _walk(child, f"{prefix}{name}.", gather)


def _merged(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """The weights of a linear layer with LoRA beside it."""
    if not isinstance(module, lora.Linear) or any(module.use_dora.values()):
        raise ValueError(
            f"{prefix.rstrip('.')} has an adapter of type {type(module).__name__} that this engine cannot add to the "
            "weights; use LoRA on linear layers without use_dora and modules_to_save, or the TransformersEngine"
        )
    weights = {name: value.detach() for name, value in module.get_base_layer().named_parameters()}
    if not module.disable_adapters:
        for adapter in module.active_adapters:
            weights["weight"] = weights["weight"] + module.get_delta_weight(adapter)
    yield from ((prefix + name, value) for name, value in weights.items())


@contextmanager
def _whole(module: nn.Module) -> Iterator[None]:
    """The weights that are sharded at ``module`` itself are whole inside."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()
