"""What validation and test measure, exact on any number of ranks."""

from typing import Any, cast

from torch import Tensor, nn
from torchmetrics import MeanMetric

from gopo_lightning.metrics import win_rate
from gopo_lightning.structs import Experience

NAMES = ("reward", "win_rate", "length_mean", "truncated_fraction")


class EvaluationMetrics(nn.ModuleDict):
    """Means over all prompts or completions; a NaN (no valid score) does not count."""

    def __init__(self) -> None:
        super().__init__({name: MeanMetric(nan_strategy="ignore") for name in NAMES})

    def update_batch(self, batch: dict[str, Any]) -> None:
        """Adds a batch; rows that only fill up the last batch of a rank are left out.

        Args:
            batch: ``experience``, ``reference_PG`` (rewards of the reference) and ``is_padding`` (bool [P]).
        """
        experience: Experience = batch["experience"]
        keep_P = ~batch["is_padding"].to(experience.rewards_PG.device)
        keep_N = keep_P.repeat_interleave(experience.group_size)
        if not keep_P.any():
            return
        values = {
            "reward": experience.rewards_PG[keep_P],
            "win_rate": win_rate(experience.rewards_PG, batch["reference_PG"])[keep_P],
            "length_mean": experience.completions.lengths_N[keep_N].float(),
            "truncated_fraction": experience.completions.truncated_N[keep_N].float(),
        }
        for name, value in values.items():
            cast(MeanMetric, self[name]).update(value)

    def pop(self, stage: str) -> dict[str, Tensor]:  # type: ignore[override]
        """``<stage>/<name>`` → value over all ranks; starts anew. A collective."""
        values = {f"{stage}/{name}": cast(MeanMetric, self[name]).compute() for name in NAMES}
        for name in NAMES:
            cast(MeanMetric, self[name]).reset()
        return values
