"""Reward sources: anything that scores or compares completions, and ways to combine several."""

from gopo_lightning.rewards import combine
from gopo_lightning.rewards.anchor import AnchorReward
from gopo_lightning.rewards.base import HoldsModels, RewardSource, SourceConfigError, score
from gopo_lightning.rewards.budgeted import BudgetedComparisons
from gopo_lightning.rewards.chat_model import ChatModel
from gopo_lightning.rewards.classifier import SequenceClassifierReward
from gopo_lightning.rewards.comparators import FunctionComparator, RankingOracle, RewardModelComparator
from gopo_lightning.rewards.early import AsksEarly, EarlyQuestions
from gopo_lightning.rewards.evolving_rubric import EvolvingRubric
from gopo_lightning.rewards.function import FunctionReward
from gopo_lightning.rewards.human import HumanRanking
from gopo_lightning.rewards.learning import LearnsFromRollouts
from gopo_lightning.rewards.llm_judge import LLMJudge
from gopo_lightning.rewards.llm_score import LLMScore, RubricJudge
from gopo_lightning.rewards.local_judge import LocalJudge
from gopo_lightning.rewards.pairwise import PairComparator, PairwiseSource
from gopo_lightning.rewards.recorded import RecordedReward
from gopo_lightning.rewards.scoring import (
    GroupScores,
    Source,
    against_reference,
    comparison_metrics,
    reads_wins,
    score_groups,
)

__all__ = [
    "AnchorReward",
    "AsksEarly",
    "BudgetedComparisons",
    "ChatModel",
    "EarlyQuestions",
    "EvolvingRubric",
    "FunctionComparator",
    "FunctionReward",
    "GroupScores",
    "HoldsModels",
    "HumanRanking",
    "LLMJudge",
    "LLMScore",
    "LearnsFromRollouts",
    "LocalJudge",
    "PairComparator",
    "PairwiseSource",
    "RankingOracle",
    "RecordedReward",
    "RewardModelComparator",
    "RewardSource",
    "RubricJudge",
    "SequenceClassifierReward",
    "Source",
    "SourceConfigError",
    "against_reference",
    "combine",
    "comparison_metrics",
    "reads_wins",
    "score",
    "score_groups",
]
