"""What a step is doing, and the seconds of each of its phases."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from time import perf_counter

import torch


class Phases:
    """The present phase, which a progress bar shows, and the seconds of those of one batch."""

    def __init__(self) -> None:
        self.current = "start"
        self.seconds: dict[str, float] = {}

    def begin(self) -> None:
        """A new batch."""
        self.seconds = {}

    @contextmanager
    def __call__(self, name: str, device: torch.device) -> Iterator[None]:
        """Enter ``name`` and add its seconds to those of the batch (with the device's queue empty at both ends)."""
        self.current = name
        synchronize = torch.cuda.synchronize if device.type == "cuda" else nullcontext
        synchronize()
        start = perf_counter()
        yield
        synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - start
