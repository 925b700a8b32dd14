"""Reward sources: anything that gives a completion a number, and ways to combine several."""

from gopo_lightning.rewards import combine
from gopo_lightning.rewards.base import RewardSource, SourceConfigError, score
from gopo_lightning.rewards.classifier import SequenceClassifierReward
from gopo_lightning.rewards.function import FunctionReward

__all__ = [
    "FunctionReward",
    "RewardSource",
    "SequenceClassifierReward",
    "SourceConfigError",
    "combine",
    "score",
]
