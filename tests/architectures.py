"""Tiny random models of each architecture that the parity tests name, and ragged groups to run through them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from gopo_lightning.types import Completions, Prompt, PromptBatch

VOCAB = 61
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}

BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SIZES)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **SIZES,
            final_logit_softcapping=3.0,
            attn_logit_softcapping=2.0,
            query_pre_attn_scalar=8,
            sliding_window=6,  # shorter than the sequences, in the first of two layers
            attn_implementation="eager",  # transformers' sdpa drops the soft cap of the scores
        )
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, sliding_window=6, layer_types=["full_attention", "sliding_attention"])
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    "mistral, window": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=6)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_positions=64,
            n_embd=32,
            n_layer=2,
            n_head=4,
            initializer_range=0.3,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=1,
        )
    ),
}
"""The architectures of the issue, absolute positions (GPT-2), soft caps (Gemma 2) and sliding windows among them."""

SCALED_LOGITS: dict[str, Callable[[], PreTrainedModel]] = {
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)),
}


_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
_DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}

FAMILIES: dict[str, dict[str, Any]] = {
    # convolution or recurrence beside attention
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": _MAMBA | _LOCAL | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
    "qwen3_next": _DELTA | _EXPERTS | {"shared_expert_intermediate_size": 16},
    "qwen3_5_text": _DELTA,
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 64},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
        "time_step_min": 1e-9,  # transformers cuts shorter steps off in whole sequences, and not in decoding
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 6},
    # recurrence alone
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1},
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
    # mixtures of experts
    "mixtral": _LOCAL | {"output_router_logits": True},
    "qwen3_moe": _EXPERTS | {"output_router_logits": True},
    "gpt_oss": _LOCAL | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6},
    # windows shorter than the sequences
    "mistral": {"sliding_window": 6},
    "gemma3_text": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "llama4_text": {"attention_chunk_size": 6, "num_local_experts": 2, "intermediate_size_mlp": 32},
    # attention that takes no arguments of ours, positions that are learned, positions that begin after the pad id
    "nemotron": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "roberta": {"is_decoder": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}
"""Options beside ``SIZES`` of models that differ from a plain decoder in what they remember, route or see."""


def build(name: str) -> PreTrainedModel:
    """A model in train mode, the same at every call."""
    torch.manual_seed(0)
    model = (BUILDERS | SCALED_LOGITS)[name]().train()
    model.generation_config.pad_token_id = 0
    return model


def family(name: str) -> PreTrainedModel:
    """A model of ``FAMILIES`` in train mode, the same at every call."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SIZES | FAMILIES[name]))
    return model.train()


def prompt_batch(lengths: Sequence[int] = (5, 9, 1)) -> PromptBatch:
    """Random prompts of these lengths, left-padded."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(2, VOCAB, (length,), generator=generator).tolist() for length in lengths]
    return PromptBatch.collate([Prompt(i, tuple(row), "") for i, row in enumerate(rows)], pad_token_id=0)


def ragged_completions(num_prompts: int = 3, group_size: int = 4, num_tokens: int = 7) -> Completions:
    """Random completions of every length from 1 to T; padding is a token that also occurs in the text."""
    N, T = num_prompts * group_size, num_tokens
    generator = torch.Generator().manual_seed(2)
    tokens_NT = torch.randint(2, VOCAB, (N, T), generator=generator)
    lengths_N = torch.arange(N) * 5 % T + 1
    mask_NT = torch.arange(T) < lengths_N[:, None]
    return Completions(tokens_NT.masked_fill(~mask_NT, 5), mask_NT, lengths_N == T, ("",) * N)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """The gradients of the trainable parameters, taken out of the model."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def relative_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Norm of a - b over all parameters, by the norm of b."""
    assert a.keys() == b.keys()
    assert a
    flat_a, flat_b = (torch.cat([x[name].flatten().double() for name in b]) for x in (a, b))
    return float((flat_a - flat_b).norm() / flat_b.norm())
