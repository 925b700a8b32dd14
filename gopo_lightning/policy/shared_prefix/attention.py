"""Attention of a group to its prompt: the maths, for any device. Legend in the package's docstring, and:

M = R * Q   queries of one completion that read the same keys and values, query heads first
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gopo_lightning.policy.shared_prefix import partial_softmax as parts


def attend_prompt(
    query_PHLD: Tensor,
    key_PKLD: Tensor,
    value_PKLD: Tensor,
    mask_P1LL: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Causal attention of the prompts among themselves, [P, H, L, D]; ``mask_P1LL`` None means that none is padded."""
    if softcap is not None:
        return _attend_softcapped(query_PHLD, key_PKLD, value_PKLD, mask_P1LL, scale, softcap)
    return F.scaled_dot_product_attention(
        query_PHLD, key_PKLD, value_PKLD, mask_P1LL, is_causal=mask_P1LL is None, scale=scale, enable_gqa=True
    )


def _attend_softcapped(
    query_PHLD: Tensor, key_PKLD: Tensor, value_PKLD: Tensor, mask_P1LL: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """Causal attention with soft-capped scores (Gemma 2), which SDPA has not."""
    K, L, device = key_PKLD.shape[1], query_PHLD.shape[2], query_PHLD.device
    allowed = ~_future(L, device) if mask_P1LL is None else mask_P1LL[:, None]
    scores = parts.widen(query_PHLD.unflatten(1, (K, -1)) @ key_PKLD[:, :, None].transpose(-1, -2)) * scale
    scores = ((scores / softcap).tanh() * softcap).masked_fill(~allowed, -torch.inf)
    return (scores.softmax(-1).to(value_PKLD.dtype) @ value_PKLD[:, :, None]).flatten(1, 2)


def attend_completions(
    query_PKGRQD: Tensor,
    prompt: tuple[Tensor, Tensor],
    suffix: tuple[Tensor, Tensor],
    prompt_bias_P11L: Tensor | None,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Attention of completions to their prompt and, causally, to themselves under one softmax, [P, K, G, R, Q, D].

    The prompt's keys meet the queries of the whole group in one product: G*R*Q rows against [P, K, L, D], never
    expanded. ``suffix`` is [P, K, G, Q, D] each. The bias, 0 or -inf, is added to the scores; None adds nothing.
    """
    R, Q = query_PKGRQD.shape[3:5]
    own_bias_11MQ = causal_bias(Q, query_PKGRQD.device).repeat(R, 1)[None, None]
    query_PKGMD = query_PKGRQD.flatten(3, 4).contiguous()
    own = (x.contiguous() for x in suffix)
    output: Tensor = _GroupAttention.apply(query_PKGMD, *prompt, *own, prompt_bias_P11L, own_bias_11MQ, scale, softcap)
    return output.unflatten(3, (R, Q))


class _GroupAttention(torch.autograd.Function):
    """Saves no score: autograd would keep the weights of every layer, more than all else at long prompts."""

    @staticmethod
    def forward(
        ctx: Any,
        query_PKGMD: Tensor,
        prompt_key: Tensor,
        prompt_value: Tensor,
        own_key: Tensor,
        own_value: Tensor,
        prompt_bias: Tensor | None,
        own_bias: Tensor,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        own = _by_completion(own_key), _by_completion(own_value), own_bias
        to_prompt = parts.attend(_by_prompt(query_PKGMD), prompt_key, prompt_value, prompt_bias, scale, softcap)
        to_own = parts.attend(_by_completion(query_PKGMD), *own, scale, softcap)
        shape = query_PKGMD.shape[:4]
        whole = ([x.reshape(*shape, *x.shape[3:]) for x in part] for part in (to_prompt, to_own))
        output, normaliser = parts.merge(*whole)
        output = output.to(query_PKGMD.dtype)
        ctx.save_for_backward(
            query_PKGMD, prompt_key, prompt_value, prompt_bias, own_key, own_value, own_bias, output, normaliser
        )
        ctx.options = scale, softcap
        return output

    @staticmethod
    def backward(ctx: Any, grad_PKGMD: Tensor) -> Any:
        query, prompt_key, prompt_value, prompt_bias, own_key, own_value, own_bias, output, normaliser = (
            ctx.saved_tensors
        )
        rows = grad_PKGMD.contiguous(), query, output, normaliser
        whole = parts.Whole(*map(_by_prompt, rows))
        d_query, *d_prompt = parts.gradients(whole, prompt_key, prompt_value, prompt_bias, *ctx.options)
        whole = parts.Whole(*map(_by_completion, rows))
        own = _by_completion(own_key), _by_completion(own_value), own_bias
        d_own_query, *d_own = parts.gradients(whole, *own, *ctx.options)
        d_query = d_query.reshape_as(query) + d_own_query.view_as(query)
        return d_query, *d_prompt, *(x.view_as(own_key) for x in d_own), None, None, None, None


def _by_prompt(x_PKGM: Tensor) -> Tensor:
    """All rows of a prompt side by side, [P, K, G*M, ...]."""
    return x_PKGM.flatten(2, 3)


def _by_completion(x_PKGM: Tensor) -> Tensor:
    """A batch of completions and heads, [P*K*G, 1, M, ...]."""
    return x_PKGM.flatten(0, 2)[:, None]


def attend_token(
    query_AH1D: Tensor,
    prompt: tuple[Tensor, Tensor],
    suffix: tuple[Tensor, Tensor],
    prompt_bias_P11L: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """The same for one token of each row, without gradient: to its prompt, [P, K, L, D] each, and to its past.

    The past is [A, K, t, D] each. Rows A = P*G are in the order of their prompts.
    """
    A, H, _, D = query_AH1D.shape
    P, K = prompt[0].shape[:2]
    query_AKRD = query_AH1D.reshape(A, K, H // K, D)
    query_PKMD = query_AKRD.unflatten(0, (P, -1)).transpose(1, 2).flatten(2, 3)
    to_prompt = parts.attend(query_PKMD, *prompt, prompt_bias_P11L, scale, softcap)
    to_prompt_AKR = [x.unflatten(2, (A // P, -1)).transpose(1, 2).flatten(0, 1) for x in to_prompt]
    to_past_AKR = parts.attend(query_AKRD, *suffix, None, scale, softcap)
    return parts.merge(to_prompt_AKR, to_past_AKR)[0].to(query_AH1D.dtype).view(A, H, 1, D)


def attention_mask(mask_PL: Tensor) -> Tensor | None:
    """bool [P, 1, L, L], causal without padding (which sees itself: no NaN); None if none is padded."""
    if bool(mask_PL.all()):
        return None
    L, device = mask_PL.shape[1], mask_PL.device
    return ((~_future(L, device) & mask_PL[:, None]) | torch.eye(L, dtype=torch.bool, device=device))[:, None]


def padding_bias(mask_PL: Tensor) -> Tensor | None:
    """float32 [P, 1, 1, L]: -inf on padding; None if there is none."""
    if bool(mask_PL.all()):
        return None
    return torch.zeros(mask_PL.shape, device=mask_PL.device).masked_fill(~mask_PL, -torch.inf)[:, None, None]


def causal_bias(size: int, device: torch.device) -> Tensor:
    """float32 [size, size]: -inf where the column comes after the row."""
    return torch.zeros(size, size, device=device).masked_fill(_future(size, device), -torch.inf)


def _future(size: int, device: torch.device) -> Tensor:
    """bool [size, size], True where the column comes after the row."""
    return torch.ones(size, size, dtype=torch.bool, device=device).triu(1)
