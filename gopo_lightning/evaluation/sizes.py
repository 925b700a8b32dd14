"""Sizes of a run's models, built from their configurations on the meta device: no weights are read."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gopo_lightning.distributed.decoder_layers import base_of
from gopo_lightning.evaluation.footprint import Decoder
from gopo_lightning.policy.loading import finding, locate
from gopo_lightning.policy.model import PolicyConfig, load_policy
from gopo_lightning.rewards import (
    AnchorReward,
    BudgetedComparisons,
    LocalJudge,
    RewardModelComparator,
    SequenceClassifierReward,
    Source,
)


def policy_sizes(config: PolicyConfig) -> tuple[Decoder, int]:
    """Of the policy with its adapter, and the bytes of a master weight.

    Raises:
        ValueError: there is no such model.
    """
    name, revision = config.base
    base = _on_meta(AutoModelForCausalLM, name, revision, config.trust_remote_code, config.torch_dtype)
    with torch.device("meta"):
        policy = load_policy(replace(config, compile=False, attn_implementation=None), base)
    return sizes_of(policy), base.dtype.itemsize


def models_of(source: Source) -> Iterator[tuple[str, Decoder, int, int, int]]:
    """Of a reward source's model: name, sizes, bytes of a weight, rows of a forward, and longest text (or 0)."""
    source = innermost(source)
    if isinstance(source, SequenceClassifierReward | LocalJudge):
        kind = AutoModelForCausalLM if isinstance(source, LocalJudge) else AutoModelForSequenceClassification
        dtype = None if source.dtype == "auto" else getattr(torch, source.dtype)
        model = _on_meta(kind, source.model_name, source.revision, source.trust_remote_code, dtype)
        yield source.name, sizes_of(model), model.dtype.itemsize, source.micro_batch_size, source.max_length or 0


def innermost(source: Source) -> Source:
    """What a source that only wraps another one asks; any other source itself."""
    if isinstance(source, RewardModelComparator):
        return innermost(source.reward)
    return innermost(source.comparator) if isinstance(source, AnchorReward | BudgetedComparisons) else source


def _on_meta(
    kind: Any, name: str, revision: str | None, trust_remote_code: bool, dtype: torch.dtype | None
) -> PreTrainedModel:
    with finding(name, revision):
        settings = AutoConfig.from_pretrained(locate(name), revision=revision, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model: PreTrainedModel = kind.from_config(
            settings, dtype=dtype or settings.dtype or torch.float32, trust_remote_code=trust_remote_code
        )
    return model


def sizes_of(model: nn.Module) -> Decoder:
    """Of a model of transformers, or of a PeftModel around one."""
    base: Any = base_of(model)
    config = base.config.get_text_config()
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    head = base.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    embeddings = sum(p.numel() for p in {base.get_input_embeddings().weight, *([] if head is None else [head.weight])})
    weights = sum(p.numel() for p in model.parameters())
    return Decoder(
        weights=weights,
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        matmul=sum(m.weight.numel() for m in linear),
        largest_layer=max(embeddings, (weights - embeddings) // config.num_hidden_layers),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        heads=heads * head_size,
        kv_heads=(getattr(config, "num_key_value_heads", None) or heads) * head_size,
        vocabulary=0 if head is None else config.vocab_size,
    )
