"""Which completions of a rollout are correct, for transforms that ask."""

import math

import torch
from torch import Tensor

from gopo_lightning.rollout.transforms import Setting
from gopo_lightning.types import Rollout


class Correct:
    """Those whose score is at least τ.

    Args:
        source: name of the reward source whose score is meant; None for the combined reward, as the transforms before
            have left it.
        tau: τ, in units of the score.
        owner: the class whose options these are, for error messages.

    Raises:
        ValueError: τ is not finite.
    """

    def __init__(self, source: str | None, tau: float, owner: str) -> None:
        if not math.isfinite(tau):
            raise ValueError(f"tau={tau} of {owner} must be finite. Use 0.5 for a source that gives 0 or 1.")
        self.source, self.tau, self.owner = source, tau, owner
        self._column: int | None = None

    def set_up(self, setting: Setting) -> None:
        """ValueError for a source that the run does not have."""
        names = [source.name for source in setting.sources]
        if self.source is not None and self.source not in names:
            raise ValueError(
                f"source={self.source!r} of {self.owner} is none of the reward sources {names}. Name one of them, or "
                "leave it out for the combined reward."
            )
        self._column = None if self.source is None else names.index(self.source)

    def __call__(self, rollout: Rollout) -> Tensor:
        """float64 correct_PG on the CPU, 1 or 0; NaN without a valid score, or of weight 0."""
        assert self.source is None or self._column is not None, "set_up comes first"
        scores_PG = (rollout.rewards_PG if self._column is None else rollout.rewards_PGK[..., self._column]).cpu()
        unknown_PG = scores_PG.isnan() | (rollout.weights_N.cpu() == 0).view_as(scores_PG)
        return (scores_PG >= self.tau).double().masked_fill(unknown_PG, torch.nan)
