"""Sampling: the engine protocol, the engines, and the callback that fills ``batch["experience"]``."""

from gopo_lightning.rollout.callback import RolloutCallback
from gopo_lightning.rollout.engine import RolloutEngine, SamplingConfig
from gopo_lightning.rollout.transformers_engine import TransformersEngine
from gopo_lightning.rollout.vllm_engine import VLLMEngine

__all__ = ["RolloutCallback", "RolloutEngine", "SamplingConfig", "TransformersEngine", "VLLMEngine"]
