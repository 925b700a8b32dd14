"""Pure maths: rewards to advantages, log-probs to losses. Nothing but torch."""

from gopo_lightning.objectives.base import Loss, Mean, Objective
from gopo_lightning.objectives.clipped import ClippedSurrogate

__all__ = ["ClippedSurrogate", "Loss", "Mean", "Objective"]
