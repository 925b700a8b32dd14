"""The collectives that the app needs by itself; on one process each is the identity."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether a process group runs."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    """Of this process."""
    return dist.get_rank() if is_distributed() else 0


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over ranks; every rank must call it with the same shape."""
    if not is_distributed():
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def gather_rows(tensor: Tensor) -> Tensor:
    """All ranks' rows one after the other, in the order of ranks; shapes must be equal."""
    if not is_distributed():
        return tensor
    rows = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(rows, tensor.contiguous())
    return torch.cat(rows)


def gather_objects(value: Any) -> list[Any]:
    """Every rank's picklable ``value``, in the order of ranks."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


class PeerError(RuntimeError):
    """Another rank failed in work that all do; the message is that rank's."""


@contextmanager
def all_or_none(task: str) -> Iterator[None]:
    """Work that succeeds on all ranks or raises on all: none is left waiting for one that has failed.

    A collective: every rank enters equally often. A rank that fails raises its own error.

    Raises:
        PeerError: this rank is well, but another has failed.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # noqa: BLE001 - raised below
        failure = error
    reports = gather_objects(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for rank, report in enumerate(reports):
        if report is not None:
            raise PeerError(f"rank {rank} failed in {task}, so all ranks stop. It said:\n{report}")
