"""Training of reward models on comparisons; the result is a Hugging Face folder for `SequenceClassifierReward`."""

from gopo_lightning.objectives.comparison_losses import bradley_terry, centring, plackett_luce
from gopo_lightning.training.reward_model.metrics import ComparisonMetrics
from gopo_lightning.training.reward_model.module import RewardModelModule

__all__ = [
    "ComparisonMetrics",
    "RewardModelModule",
    "bradley_terry",
    "centring",
    "plackett_luce",
]
