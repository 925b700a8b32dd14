"""Token log-probabilities of completions under a policy, at the sampling temperature, and their gradient.

Two forms with the same result. *Replicated*: a row per completion, [prompt | completion], G*(L + T) tokens a group.
*Shared prefix* (``shared_prefix/``): one row of all groups without padding, [prompt | completion 1 | ... | completion G
| next prompt | ...]. Either way a completion's first token is predicted by the prompt's last position, token t by its
token t - 1, and the LM head runs on those positions of real tokens alone, chunk by chunk; a chunk's logits are
recomputed in backward. The head is entered through the model's own forward, so LoRA, tied embeddings and FSDP's gather
keep working.
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
        with shared_prefix_attention(model, inputs["shared_prefix"]) if shared_prefix else nullcontext():
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


def layout_of(prompts: PromptBatch, completions: Completions) -> PackedGroups:
    """Of the row [prompt 1 | its completions | prompt 2 | ...] without padding."""
    lengths_PG = completions.lengths_N.view(len(prompts), -1)
    return PackedGroups(prompts.mask_PL.sum(-1).tolist(), lengths_PG.tolist(), lengths_PG.device)


def _pack_shared(prompts: PromptBatch, completions: Completions) -> tuple[dict[str, Any], Tensor]:
    """The same for one row of all groups, see `layout_of`."""
    mask_NT, mask_PL, layout = completions.mask_NT, prompts.mask_PL, layout_of(prompts, completions)
    S, prompt_S, G = layout.num_tokens, layout.prompt_S, len(completions) // len(prompts)
    places_NT = torch.zeros_like(completions.tokens_NT)
    places_NT[mask_NT] = (~prompt_S).nonzero()[:, 0]
    prompt_lengths_P = mask_PL.sum(-1)
    positions_NT = prompt_lengths_P.repeat_interleave(G)[:, None] + positions(mask_NT)
    sizes_P = prompt_lengths_P + completions.lengths_N.view(-1, G).sum(-1)
    last_P = sizes_P.cumsum(0) - sizes_P + prompt_lengths_P - 1  # token of each prompt

    def row(prompt_PL: Tensor, completion_NT: Tensor) -> Tensor:
        row_S = completion_NT.new_empty(S)
        row_S[prompt_S], row_S[~prompt_S] = prompt_PL[mask_PL], completion_NT[mask_NT]
        return row_S[None]

    column_NT = places_NT - 1 - S
    column_NT[:, 0] = last_P.repeat_interleave(G) - S
    inputs = {
        "input_ids": row(prompts.tokens_PL, completions.tokens_NT),
        # read by nobody but transformers' warning about padding: the layout is the mask
        "attention_mask": torch.ones(1, S, dtype=torch.int64, device=mask_NT.device),
        "position_ids": row(positions(mask_PL), positions_NT),
        "logits_to_keep": S + 1 - layout.lengths[0][0],
        "shared_prefix": layout,
    }
    return inputs, column_NT


def positions(mask: Tensor) -> Tensor:
    """int64 position of each token among the real ones of its row; padding has a valid one, which nobody reads."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)
