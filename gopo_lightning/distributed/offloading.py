"""Frozen models that wait in CPU memory, and are on the device while they compute."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn
from torch.distributed.tensor import DTensor


@contextmanager
def on_device(models: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """``models`` compute on ``device`` inside; those that wait in CPU memory leave their copies there again after.

    The weights must not be changed inside: nothing is copied back. Sharded ones stay where they are.
    """
    tensors = [t for m in models for t in chain(m.parameters(), m.buffers()) if not isinstance(t, DTensor)]
    home = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device, non_blocking=True)
        yield
    finally:
        for tensor, data in zip(tensors, home, strict=True):
            tensor.data = data
