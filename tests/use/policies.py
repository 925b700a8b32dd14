"""Policies on disk: tiny random ones of many architectures, whose completions end by themselves at unequal lengths."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gopo_lightning.data import assets
from tests.conftest import byte_tokenizer

REAL = "smollm2-135m-instruct"
"""The real pretrained policy."""

END = 0.12
"""Mean probability of EOS after a token: completions have 8 tokens on average, and some have 1 or 30."""

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
_MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _SIZES,
    "qwen2": _SIZES,
    "qwen3": _SIZES | {"tie_word_embeddings": True},
    "gemma2": _SIZES | {"query_pre_attn_scalar": 8, "attn_implementation": "eager", "sliding_window": 8},
    "gemma3_text": _SIZES | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
    "mistral": _SIZES | {"sliding_window": 8},
    "gpt2": {"n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
    "mixtral": _SIZES | _MOE | {"output_router_logits": True},
    "qwen3_moe": _SIZES | _MOE,
    "gpt_oss": _SIZES | _MOE | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
    "lfm2": _SIZES | {"layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": _SIZES
    | _MOE
    | {
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 16,
        "shared_intermediate_size": 16,
    },
    "mamba": {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "initializer_range": 0.2},
    "rwkv": {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2, "context_length": 256},
}
"""Architecture → arguments of its transformers config."""

LORA_TARGETS: dict[str, list[str]] = {
    "gpt2": ["c_attn"],
    "lfm2": ["in_proj", "q_proj", "v_proj"],
    "granitemoehybrid": ["in_proj", "q_proj", "v_proj"],
    "mamba": ["in_proj", "x_proj"],
    "rwkv": ["key", "value"],
}
"""Where an architecture has no q_proj and v_proj, or more than those."""

RECURRENT = {"lfm2", "granitemoehybrid", "mamba", "rwkv"}
"""Their state is no list of keys and values, so no prompt can be shared."""


def folder_of(name: str, root: Path) -> Path:
    """The folder of policy ``name``, built in ``root`` unless it is there or is the real one."""
    if name == REAL:
        return assets.path(REAL)
    folder = root / name
    if not folder.exists():
        build(name).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    return folder


def build(name: str) -> PreTrainedModel:
    """A random model of architecture ``name`` over bytes, the same at every call."""
    tokenizer = byte_tokenizer()
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    options = CONFIGS[name] | special | {"vocab_size": len(tokenizer)}
    attention = options.pop("attn_implementation", None)
    chosen = {} if attention is None else {"attn_implementation": attention}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **options), **chosen)
        _end_by_itself(model, tokenizer.eos_token_id)
    return model


@torch.no_grad()
def _end_by_itself(model: PreTrainedModel, eos: int) -> None:
    """Scale the output weights of EOS up until it has probability ``END`` after random text, on average.

    Its logit stays a function of the text, so some texts end soon and others late.
    """
    model.eval()
    tokens_NT = torch.randint(32, 127, (32, 24))
    weights_V = model.get_output_embeddings().weight
    direction = weights_V[eos].clone()

    def end_probability(scale: float) -> float:
        weights_V[eos] = scale * direction
        return float(model(tokens_NT, use_cache=False).logits.float().softmax(-1)[..., eos].mean())

    _solve(end_probability, END)


def _solve(function: Callable[[float], float], target: float) -> None:
    """Leave the argument of the increasing ``function`` where it reaches ``target``: doubling, then bisection."""
    low, high = 0.0, 1.0
    while function(high) < target and high < 1e4:
        low, high = high, 2 * high
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < target else (low, middle)
