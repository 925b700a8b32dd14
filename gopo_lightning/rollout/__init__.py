"""Sampling: the engine protocol and the engines."""

from gopo_lightning.rollout.engines.base import RolloutEngine, SamplingConfig
from gopo_lightning.rollout.engines.transformers import TransformersEngine
from gopo_lightning.rollout.engines.vllm import VLLMEngine

__all__ = ["RolloutEngine", "SamplingConfig", "TransformersEngine", "VLLMEngine"]
