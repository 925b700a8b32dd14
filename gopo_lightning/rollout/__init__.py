"""Prompts to experience: engines, transforms, and the callback that fills ``batch["experience"]``."""

from gopo_lightning.rollout.callback import RolloutCallback
from gopo_lightning.rollout.clusters import Clusters, NearEmbeddings, SameAnswer, SameText
from gopo_lightning.rollout.conditional import ConditionalBonus
from gopo_lightning.rollout.engines.base import RolloutEngine, SamplingConfig
from gopo_lightning.rollout.engines.recorded import RecordedEngine
from gopo_lightning.rollout.engines.transformers import TransformersEngine
from gopo_lightning.rollout.engines.vllm import VLLMEngine
from gopo_lightning.rollout.engines.vllm_server import VLLMServerEngine
from gopo_lightning.rollout.history import HistoryLength
from gopo_lightning.rollout.penalties import OverlongPenalty, RepetitionPenalty
from gopo_lightning.rollout.prefixes import PrefixScores
from gopo_lightning.rollout.rejection import RejectionSample
from gopo_lightning.rollout.semantic_entropy import SemanticEntropy
from gopo_lightning.rollout.transforms import KLInReward, RankFilter, Transform

__all__ = [
    "Clusters",
    "ConditionalBonus",
    "HistoryLength",
    "KLInReward",
    "NearEmbeddings",
    "OverlongPenalty",
    "PrefixScores",
    "RankFilter",
    "RecordedEngine",
    "RejectionSample",
    "RepetitionPenalty",
    "RolloutCallback",
    "RolloutEngine",
    "SameAnswer",
    "SameText",
    "SamplingConfig",
    "SemanticEntropy",
    "Transform",
    "TransformersEngine",
    "VLLMEngine",
    "VLLMServerEngine",
]
