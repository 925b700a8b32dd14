"""What validation and test measure, exact on any number of ranks."""

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn
from torchmetrics import MeanMetric

from gopo_lightning.types import Experience

NAMES = ("reward", "win_rate", "length_mean", "truncated_fraction")


class EvaluationMetrics(nn.ModuleDict):
    """Means over all prompts or completions; a NaN (no valid score) does not count."""

    def __init__(self, sources: Sequence[str]) -> None:
        self.sources = tuple(sources)
        self.names = (*NAMES, *(f"{source}/{name}" for source in sources for name in ("reward", "win_rate")))
        super().__init__({_key(name): MeanMetric(nan_strategy="ignore") for name in self.names})

    def update_batch(self, batch: dict[str, Any]) -> None:
        """Adds a batch; rows that only fill up the last batch of a rank are left out.

        Args:
            batch: ``experience``, ``win_rate_P`` and ``win_rate_PK`` (against the reference, of the combined reward and
                of each source) and ``is_padding`` (bool [P]).
        """
        experience: Experience = batch["experience"]
        keep_P = ~batch["is_padding"].to(experience.rewards_PG.device)
        keep_N = keep_P.repeat_interleave(experience.group_size)
        if not keep_P.any():
            return
        values = {
            "reward": experience.rewards_PG[keep_P],
            "win_rate": batch["win_rate_P"][keep_P],
            "length_mean": experience.completions.lengths_N[keep_N].float(),
            "truncated_fraction": experience.completions.truncated_N[keep_N].float(),
        }
        for k, source in enumerate(self.sources):
            values[f"{source}/reward"] = experience.rewards_PGK[keep_P][..., k]
            values[f"{source}/win_rate"] = batch["win_rate_PK"][keep_P][..., k]
        for name, value in values.items():
            cast(MeanMetric, self[_key(name)]).update(value)

    def pop(self, stage: str) -> dict[str, Tensor]:  # type: ignore[override]
        """``<stage>/<name>`` → value over all ranks; starts anew. A collective."""
        values = {f"{stage}/{name}": cast(MeanMetric, self[_key(name)]).compute() for name in self.names}
        for name in self.names:
            cast(MeanMetric, self[_key(name)]).reset()
        return values


def _key(name: str) -> str:
    """``name`` as torch allows a submodule to be called: without dots, and not like a method of the dictionary.

    No two names share a key.
    """
    return "mean of " + name.replace("%", "%25").replace(".", "%2E")
