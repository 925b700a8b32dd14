"""Attention of a group to its prompt: the maths, for any device. Legend in the package's docstring, and:

M = R * Q   queries of one completion that read the same keys and values, query heads first
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_MAX_SCORES = 2**20
"""Scores that exist at once, so that they stay in a core's cache and backward needs no more than this."""


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
    scores = _widen(query_PHLD.unflatten(1, (K, -1)) @ key_PKLD[:, :, None].transpose(-1, -2)) * scale
    scores = ((scores / softcap).tanh() * softcap).masked_fill(~allowed, -torch.inf)
    return (scores.softmax(-1).to(value_PKLD.dtype) @ value_PKLD[:, :, None]).flatten(1, 2)


def attend_completions(
    query_PKGRQD: Tensor,
    prompt: tuple[Tensor, Tensor],
    suffix: tuple[Tensor, Tensor],
    prompt_bias_P11L: Tensor | None,
    suffix_bias_QT: Tensor | None,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Attention of completions to their prompt and themselves under one softmax, [P, K, G, R, Q, D].

    The prompt's keys meet the queries of the whole group in one product: G*R*Q rows against [P, K, L, D], never
    expanded. ``suffix`` is [P, K, G, T, D] each. A bias of 0 or -inf is added to the scores; None adds nothing.
    """
    R, Q = query_PKGRQD.shape[3:5]
    query_PKGMD = query_PKGRQD.reshape(*query_PKGRQD.shape[:3], R * Q, -1)
    bias = (
        None if prompt_bias_P11L is None else prompt_bias_P11L[:, None],
        None if suffix_bias_QT is None else suffix_bias_QT.repeat(R, 1),
    )
    output: Tensor = _GroupAttention.apply(query_PKGMD, *prompt, *suffix, *bias, scale, softcap)
    return output.unflatten(3, (R, Q))


class _GroupAttention(torch.autograd.Function):
    """softmax over the scores of prompt and suffix together, in float32; backward computes them again.

    Autograd would keep the weights of every layer: more memory than all else at long prompts.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        prompt_key: Tensor,
        prompt_value: Tensor,
        suffix_key: Tensor,
        suffix_value: Tensor,
        prompt_bias: Tensor | None,
        suffix_bias: Tensor | None,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        output = query.new_empty(*query.shape[:-1], prompt_value.shape[-1])
        normaliser = query.new_empty(query.shape[:-1], dtype=_wide(query))
        ctx.scale, ctx.softcap = scale, softcap
        ctx.save_for_backward(
            query, prompt_key, prompt_value, suffix_key, suffix_value, prompt_bias, suffix_bias, normaliser
        )
        for p, g in _parts(query, prompt_key, suffix_key):
            part = query[p, :, g]
            scores = _prompt_scores(part, prompt_key[p], _rows(prompt_bias, p), scale, softcap)
            own_scores = _suffix_scores(part, suffix_key[p, :, g], suffix_bias, scale, softcap)
            peak = torch.maximum(scores.amax(-1), own_scores.amax(-1))[..., None]
            weights, own_weights = scores.sub_(peak).exp_(), own_scores.sub_(peak).exp_()
            total = weights.sum(-1, keepdim=True) + own_weights.sum(-1, keepdim=True)
            mixed = _on_prompt(weights.to(query.dtype), prompt_value[p])
            mixed = mixed + own_weights.to(query.dtype) @ suffix_value[p, :, g]
            output[p, :, g] = mixed / total
            normaliser[p, :, g] = (peak + total.log())[..., 0]
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        *inputs, prompt_bias, suffix_bias, normaliser = ctx.saved_tensors
        query, prompt_key, prompt_value, suffix_key, suffix_value = inputs
        d_query, d_prompt_key, d_prompt_value, d_suffix_key, d_suffix_value = grads = [
            torch.zeros_like(x) for x in inputs
        ]
        for p, g in _parts(query, prompt_key, suffix_key):
            part, d_part = query[p, :, g], grad[p, :, g]
            scores = _prompt_scores(part, prompt_key[p], _rows(prompt_bias, p), ctx.scale, ctx.softcap)
            own_scores = _suffix_scores(part, suffix_key[p, :, g], suffix_bias, ctx.scale, ctx.softcap)
            weights, own_weights = ((x - normaliser[p, :, g, :, None]).exp_() for x in (scores, own_scores))
            d_weights = _widen(_on_prompt(d_part, prompt_value[p].transpose(-1, -2)))
            d_own_weights = _widen(d_part @ suffix_value[p, :, g].transpose(-1, -2))
            mean = torch.linalg.vecdot(weights, d_weights) + torch.linalg.vecdot(own_weights, d_own_weights)
            d_products = _through_softmax(weights, d_weights, mean, scores, ctx).to(query.dtype)
            d_own_products = _through_softmax(own_weights, d_own_weights, mean, own_scores, ctx).to(query.dtype)
            d_prompt_value[p] += _over_group(weights.to(query.dtype), d_part)
            d_prompt_key[p] += _over_group(d_products, part)
            d_suffix_value[p, :, g] = own_weights.to(query.dtype).transpose(-1, -2) @ d_part
            d_suffix_key[p, :, g] = d_own_products.transpose(-1, -2) @ part
            d_query[p, :, g] = _on_prompt(d_products, prompt_key[p]) + d_own_products @ suffix_key[p, :, g]
        return *grads, None, None, None, None


def _through_softmax(weights: Tensor, d_weights: Tensor, mean: Tensor, scores: Tensor, ctx: Any) -> Tensor:
    """From the gradient of the weights to that of the products of queries and keys; ``d_weights`` is overwritten."""
    d_products = d_weights.sub_(mean[..., None]).mul_(weights).mul_(ctx.scale)
    if ctx.softcap is None:
        return d_products
    return d_products * (1 - (scores / ctx.softcap).masked_fill_(scores.isinf(), 0.0) ** 2)


def _over_group(left_PKGMX: Tensor, right_PKGMY: Tensor) -> Tensor:
    """Sum over the rows of a group of the outer products, [P, K, X, Y]."""
    return left_PKGMX.flatten(2, 3).transpose(-1, -2) @ right_PKGMY.flatten(2, 3)


def _prompt_scores(query: Tensor, key: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """[P, K, G, M, L]."""
    return _scores(_on_prompt(query, key.transpose(-1, -2)), bias, scale, softcap)


def _suffix_scores(query: Tensor, key: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """[P, K, G, M, T]."""
    return _scores(query @ key.transpose(-1, -2), bias, scale, softcap)


def _scores(products: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    scores = _widen(products) * scale
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    return scores if bias is None else scores.add_(bias)


def _on_prompt(rows_PKGMX: Tensor, matrix_PKXY: Tensor) -> Tensor:
    """The rows of a whole group times a matrix of their prompt, as one product: [P, K, G, M, Y]."""
    return (rows_PKGMX.flatten(2, 3) @ matrix_PKXY).unflatten(2, rows_PKGMX.shape[2:4])


def _parts(query_PKGMD: Tensor, prompt_key: Tensor, suffix_key: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of prompts and of completions, of at most ``_MAX_SCORES`` scores, or of one completion."""
    P, K, G, M, _ = query_PKGMD.shape
    completion = K * M * (prompt_key.shape[2] + suffix_key.shape[3])
    prompts = max(_MAX_SCORES // (completion * G), 1)
    completions = G if completion * G <= _MAX_SCORES else max(_MAX_SCORES // completion, 1)
    for p in range(0, P, prompts):
        for g in range(0, G, completions):
            yield slice(p, p + prompts), slice(g, g + completions)


def _rows(bias: Tensor | None, p: slice) -> Tensor | None:
    return None if bias is None else bias[p]


def _wide(x: Tensor) -> torch.dtype:
    """float32, or float64 for what is that already."""
    return torch.promote_types(x.dtype, torch.float32)


def _widen(x: Tensor) -> Tensor:
    return x.to(_wide(x))


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
