"""Pure maths: rewards to advantages, log-probs to losses. Nothing but torch."""

from gopo_lightning.objectives.base import Loss, Mean, Objective
from gopo_lightning.objectives.clipped import ClippedSurrogate
from gopo_lightning.objectives.lists import PRO, GroupPreference, PlackettLuce
from gopo_lightning.objectives.pairs import PairObjective

__all__ = [
    "PRO",
    "ClippedSurrogate",
    "GroupPreference",
    "Loss",
    "Mean",
    "Objective",
    "PairObjective",
    "PlackettLuce",
]
