"""Token log-probabilities of completions under a policy, at the sampling temperature, and their gradient.

Two forms with the same result. *Replicated*: a row per completion, [prompt | completion], G*(L + T) tokens a group.
*Shared prefix*: a row per prompt, [prompt | completion 1 | ... | completion G], L + G*T tokens (``shared_prefix/``).
Either way a completion's first token is predicted by the prompt's last position, token t by its token t - 1, and the
LM head runs on those positions of real tokens alone, chunk by chunk; a chunk's logits are recomputed in backward. The
head is entered through the model's own forward, so LoRA, tied embeddings and FSDP's gather keep working.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gopo_lightning.distributed.decoder_layers import plain_outputs
from gopo_lightning.policy.lm_head import TokenReader, logit_rule, read_logprobs
from gopo_lightning.policy.shared_prefix import PackedGroups, require_called, shared_prefix_attention
from gopo_lightning.types import Completions, PromptBatch


@dataclass(frozen=True)
class TokenLogprobs:
    """What the losses read of a forward pass; 0 outside the completions' mask."""

    logprobs_NT: Tensor
    """float32 (float64 where the model computes in it), differentiable."""
    entropy_NT: Tensor | None = None
    """In nats, of the distribution at the temperature, detached; None unless asked for."""


def completion_logprobs(
    model: nn.Module,
    prompts: PromptBatch,
    completions: Completions,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    shared_prefix: bool = False,
    chunk_tokens: int = 1024,
) -> TokenLogprobs:
    """Log-probabilities of ``completions`` given ``prompts`` at ``temperature`` (0 counts as 1, as in the sampler).

    ``model`` is a causal LM of transformers or a PeftModel; ``chunk_tokens`` bounds the tokens whose logits over the
    vocabulary exist at once. Runs under grad or no_grad, autocast, gradient checkpointing, in train or eval mode.
    """
    if len(completions) % len(prompts):
        raise ValueError(
            f"{len(completions)} completions of {len(prompts)} prompts are no whole groups; select by prompt."
        )
    pack = _pack_shared if shared_prefix else _pack_replicated
    inputs, column_NT = pack(prompts, completions)
    mask_NT = completions.mask_NT
    completions_per_row = len(completions) // len(inputs["input_ids"])  # G where groups are packed, else 1
    row_N1 = torch.arange(len(completions), device=mask_NT.device)[:, None] // completions_per_row
    at_M = row_N1.expand_as(mask_NT)[mask_NT], column_NT[mask_NT]
    reader = TokenReader(at_M, completions.tokens_NT[mask_NT], temperature or 1.0, with_entropy, chunk_tokens)
    with plain_outputs(model):
        rule = logit_rule(model, prompts.tokens_PL[:1, -1:])
        with shared_prefix_attention(model) if shared_prefix else nullcontext():
            result_KM = read_logprobs(model, inputs, reader, rule)
    if shared_prefix:
        require_called(model, inputs["shared_prefix"])
    logprobs_NT, *entropy = (row_M.new_zeros(mask_NT.shape).masked_scatter(mask_NT, row_M) for row_M in result_KM)
    return TokenLogprobs(logprobs_NT, entropy[0].detach() if entropy else None)


def _pack_replicated(prompts: PromptBatch, completions: Completions) -> tuple[dict[str, Any], Tensor]:
    """Arguments of the forward, and in which column of its rows, counted from the end, each token is predicted.

    Rows are padded on the right, where no causal model sees it, whether it reads the mask or not.
    """
    N, T = completions.tokens_NT.shape
    G = N // len(prompts)
    tokens = torch.cat([prompts.tokens_PL.repeat_interleave(G, 0), completions.tokens_NT], 1)
    mask = torch.cat([prompts.mask_PL.repeat_interleave(G, 0), completions.mask_NT], 1)
    lengths_N, prompt_lengths_N = mask.sum(-1), prompts.mask_PL.sum(-1).repeat_interleave(G)
    S = int(lengths_N.max())
    real_first = mask.int().argsort(dim=-1, descending=True, stable=True)[:, :S]
    inputs = {
        "input_ids": tokens.gather(1, real_first),
        "attention_mask": (torch.arange(S, device=mask.device) < lengths_N[:, None]).long(),
        "logits_to_keep": S + 1 - int(prompt_lengths_N.min()),
    }
    return inputs, prompt_lengths_N[:, None] - 1 - S + torch.arange(T, device=mask.device)


def _pack_shared(prompts: PromptBatch, completions: Completions) -> tuple[dict[str, Any], Tensor]:
    """The same for one row per prompt, of whose positions the last 1 + G*T predict."""
    (N, T), P = completions.tokens_NT.shape, len(prompts)
    G = N // P
    mask_PGT = completions.mask_NT.reshape(P, G, T)
    suffix_positions_PGT = prompts.mask_PL.sum(-1)[:, None, None] + positions(mask_PGT)
    inputs = {
        "input_ids": torch.cat([prompts.tokens_PL, completions.tokens_NT.reshape(P, G * T)], 1),
        # read by nobody but transformers' warning about padding: the layout is the mask
        "attention_mask": torch.cat([prompts.mask_PL, mask_PGT.flatten(1)], 1).long(),
        "position_ids": torch.cat([positions(prompts.mask_PL), suffix_positions_PGT.flatten(1)], 1),
        "logits_to_keep": 1 + G * T,
        "shared_prefix": PackedGroups(prompts.mask_PL, G, T),
    }
    column_PGT = torch.arange(-1 - G * T, -1, device=mask_PGT.device).view(G, T).repeat(P, 1, 1)
    column_PGT[:, :, 0] = -1 - G * T
    return inputs, column_PGT.view(N, T)


def positions(mask: Tensor) -> Tensor:
    """int64 position of each token among the real ones of its row; padding has a valid one, which nobody reads."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)
