"""Training goes on without a source's scores, for a completion without one leaves the loss. Not for ever unnoticed."""

from collections.abc import Mapping, Sequence

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from gopo_lightning.distributed.collectives import all_reduce_sum

WARN_AFTER = 3
"""Steps in a row."""


class InvalidSteps:
    """Counts the training steps in a row in which a source gave no completion of any rank a valid score.

    Args:
        names: of the K sources.
        max_steps: a source that is without scores for so many steps ends the run; None never does.
    """

    def __init__(self, names: Sequence[str], max_steps: int | None) -> None:
        if max_steps is not None and max_steps < 1:
            raise ValueError(f"max_invalid_steps={max_steps} must be at least 1; use null to go on whatever happens.")
        self.counts, self.max_steps = dict.fromkeys(names, 0), max_steps

    def update(self, step: int, rewards_PGK: Tensor) -> None:
        """Count ``step``. A collective: all ranks call it, and raise together.

        Raises:
            ValueError: a source has had no valid score for ``max_steps`` steps.
        """
        valid_PGK = ~rewards_PGK.isnan()
        totals_2K = all_reduce_sum(torch.stack([valid_PGK.sum((0, 1)), torch.ones_like(valid_PGK).sum((0, 1))]))
        num_completions = int(totals_2K[1, 0])
        for name, valid in zip(self.counts, totals_2K[0].tolist(), strict=True):
            self.counts[name] = 0 if valid else self.counts[name] + 1
            count = self.counts[name]
            said = (
                f"reward source '{name}' gave none of {num_completions} completions a valid score at step {step}, and "
                f"none in {count} steps in a row"
            )
            if count == self.max_steps:
                raise ValueError(
                    f"{said}: max_invalid_steps={count}. Look at what it returns (NaN, None, or all abstained), and go "
                    "on from the last checkpoint; null has no limit."
                )
            if count == WARN_AFTER:
                rank_zero_warn(
                    f"{said}: nothing is learned from it. model.init_args.rewards.max_invalid_steps ends such a run."
                )

    def state_dict(self) -> dict[str, int]:
        """Source → steps so far."""
        return dict(self.counts)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore the counts of the sources that are still there."""
        self.counts |= {name: count for name, count in state.items() if name in self.counts}
