"""What the phases of a rollout have in common: their seconds, and where rewards are kept."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from time import perf_counter
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from gopo_lightning.training.gopo_module import GOPOModule


def device_of_rewards(device: torch.device) -> torch.device:
    """``device``, or the CPU where it has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


@contextmanager
def phase(module: "GOPOModule", name: str) -> Iterator[list[float]]:
    """Name the phase for the progress bar and measure its seconds (with the device's queue empty at both ends)."""
    module.phase = name
    seconds = [0.0]
    synchronize = torch.cuda.synchronize if module.device.type == "cuda" else nullcontext
    synchronize()
    start = perf_counter()
    yield seconds
    synchronize()
    seconds[0] = perf_counter() - start
