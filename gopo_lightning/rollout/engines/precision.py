"""The precision of sampling: autocast, with the linear weights cast once per rollout and not once per token."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from gopo_lightning._compat import onednn_linear
from gopo_lightning.distributed.decoder_layers import replaced_forward
from gopo_lightning.distributed.gathering import forward_is_collective


@contextmanager
def sampling_precision(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Autocast to ``dtype`` inside, with copies of the linear weights in it; the masters come back untouched.

    The numbers are those of autocast alone, which would cast every weight again for every token. Embeddings and norms
    stay as they are, and so do sharded weights unless they are gathered.
    """
    device = next(model.parameters()).device
    plain = not forward_is_collective(model)
    linear = [
        module
        for module in model.modules()
        if plain and isinstance(module, nn.Linear | Conv1D) and not isinstance(module.weight, DTensor)
    ]
    with ExitStack() as stack:
        for module in linear:
            if device.type == "cpu" and dtype == torch.bfloat16 and type(module) is nn.Linear:
                stack.enter_context(_packed(module))
            else:
                stack.enter_context(_cast(module, dtype))
        stack.enter_context(torch.autocast(device.type, dtype, enabled=dtype != torch.float32))
        yield


@contextmanager
def _cast(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    masters = {name: master for name, master in module.named_parameters(recurse=False) if master.dtype != dtype}
    try:
        for name, master in masters.items():
            setattr(module, name, nn.Parameter(master.detach().to(dtype), requires_grad=False))
        yield
    finally:
        for name, master in masters.items():
            setattr(module, name, master)


def cpu_computes_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 (x86: AVX-512 or AVX-NE-CONVERT); without them it is emulated."""
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # of torch 2.11
    return found.get("architecture") != "x86_64" or bool(found["avx512_bw"] or found["avx_ne_convert"])


def _packed(module: nn.Linear) -> AbstractContextManager[None]:
    """In oneDNN's layout for few rows: a product would otherwise lay the weight out anew, a quarter of its time."""
    bias = None if module.bias is None else module.bias.detach().bfloat16()
    linear = onednn_linear(module.weight.detach().bfloat16(), bias) if cpu_computes_bfloat16() else None
    return _cast(module, torch.bfloat16) if linear is None else replaced_forward(module, lambda x: linear(x.bfloat16()))
