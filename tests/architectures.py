"""Tiny random models of each architecture that the parity tests name, and ragged groups to run through them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
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

from gopo_lightning.structs import Completions, Prompt, PromptBatch

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
            attn_implementation="eager",  # transformers' sdpa drops the soft cap of the scores
        )
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
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
"""The architectures of the issue, absolute positions (GPT-2) and soft caps (Gemma 2) among them."""

SCALED_LOGITS: dict[str, Callable[[], PreTrainedModel]] = {
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)),
}


def build(name: str) -> PreTrainedModel:
    """A model in train mode, the same at every call."""
    torch.manual_seed(0)
    model = (BUILDERS | SCALED_LOGITS)[name]().train()
    model.generation_config.pad_token_id = 0
    return model


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
