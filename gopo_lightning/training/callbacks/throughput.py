"""What a run costs the machine."""

import resource
import sys
from typing import Any

import lightning as L
import torch

_GIB = 1024**3


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory so far: what torch allocated on a GPU, what the process held (RSS) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return maximum if sys.platform == "darwin" else maximum * 1024  # macOS counts bytes, Linux KiB


def describe_peak_memory(device: torch.device) -> str:
    """The peak so far, in GiB, and of what."""
    peak = f"Peak memory so far: {peak_memory_bytes(device) / _GIB:.2f} GiB"
    if device.type == "cuda":
        return f"{peak} of {torch.cuda.get_device_properties(device).total_memory / _GIB:.0f} on {device}"
    return f"{peak} (resident, CPU)"


class Throughput(L.Callback):
    """Logs ``system/peak_memory_gib`` with every rollout: the peak so far, the largest over the ranks.

    Every policy run has one, whether or not it is listed. Tokens per second and seconds per phase are measured where
    the work is done: in module and rollout.

    Args:
        enabled: false switches it off.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the peak. A collective: every rank takes part."""
        if not self.enabled:
            return
        peak_gib = torch.tensor(peak_memory_bytes(pl_module.device) / _GIB, device=pl_module.device)
        pl_module.log("system/peak_memory_gib", peak_gib, reduce_fx="max", sync_dist=True, batch_size=1)
