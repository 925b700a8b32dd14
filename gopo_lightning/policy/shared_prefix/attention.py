"""Attention of a group to its prompt: the maths, for any device. Legend in the package's docstring, and:

A  rows that decode        B  batch        M  queries
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gopo_lightning.policy.shared_prefix import partial_softmax as parts


class AttentionRule(NamedTuple):
    """How a layer weighs what a token may see."""

    scale: float
    softcap: float | None = None
    """Scores are brought below it by tanh (Gemma 2)."""
    window: int | None = None
    """A token sees so many tokens, itself among them; None: all before it."""
    sinks_H: Tensor | None = None
    """Scores of something without a value that every token sees beside the keys (GPT-OSS)."""


def attend_prompt(
    query_PHLD: Tensor, key_PKLD: Tensor, value_PKLD: Tensor, mask_P1LL: Tensor | None, rule: AttentionRule
) -> Tensor:
    """Causal attention of the prompts among themselves, [P, H, L, D], under `attention_mask`'s ``mask_P1LL``."""
    is_causal = mask_P1LL is None
    if rule.softcap is None and rule.sinks_H is None:
        return F.scaled_dot_product_attention(
            query_PHLD, key_PKLD, value_PKLD, mask_P1LL, is_causal=is_causal, scale=rule.scale, enable_gqa=True
        )
    bias = None if mask_P1LL is None else parts.bias_of(mask_P1LL)
    whole = parts.attend(query_PHLD, key_PKLD, value_PKLD, bias, rule.scale, rule.softcap, causal=is_causal)
    return beside_sinks(*whole, rule.sinks_H)[0].to(query_PHLD.dtype)


def beside_sinks(output_BHMD: Tensor, normaliser_BHM: Tensor, sinks_H: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same under a softmax that holds the sinks too."""
    if sinks_H is None:
        return output_BHMD, normaliser_BHM
    sinks_H1 = sinks_H.to(normaliser_BHM)[:, None]
    share_BHM1 = (normaliser_BHM - sinks_H1).sigmoid()[..., None]
    return output_BHMD * share_BHM1, torch.logaddexp(normaliser_BHM, sinks_H1)


class Pieces(NamedTuple):
    """Which tokens of a row attend to which."""

    buckets: list[tuple[Tensor, Tensor | None]]
    """The prompts and texts, each attending causally to itself, those of about the same length together: their places
    in the row, int64 [B, M], and where these are real, bool [B, M] or None for everywhere. Of a place that is not, the
    number is any."""
    groups: list[tuple[slice, slice | Tensor, Tensor | None]]
    """A prompt, and the texts that attend to it. With a window: what of both is near enough, and the bias of its pairs,
    float32 [1, 1, M, N]."""


def attend_groups(
    query_1HSD: Tensor, key_1KSD: Tensor, value_1KSD: Tensor, pieces: Pieces, rule: AttentionRule
) -> Tensor:
    """Attention of texts to the prompt of their group and, causally, to themselves under one softmax, [1, H, S, D].

    A prompt's keys meet the queries of its whole group in one product, never expanded.
    """
    tokens_first = (x[0].transpose(0, 1) for x in (query_1HSD, key_1KSD, value_1KSD))
    output_SHD: Tensor = _GroupAttention.apply(*tokens_first, rule.sinks_H, pieces, rule)
    return output_SHD.transpose(0, 1)[None]


class _GroupAttention(torch.autograd.Function):
    """Saves no score: autograd would keep the weights of every layer, more than all else at long prompts."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks_H: Tensor | None,
        pieces: Pieces,
        rule: AttentionRule,
    ) -> Tensor:
        scale, softcap = rule.scale, rule.softcap
        output = torch.empty(*query.shape[:-1], value.shape[-1], dtype=query.dtype, device=query.device)
        normaliser = torch.empty(query.shape[:-1], dtype=parts.wide(query), device=query.device)
        for places_BM, real_BM in pieces.buckets:
            query_BHMD, key_BKMD, value_BKMD = (_heads(x[places_BM]) for x in (query, key, value))
            bias = _window_bias(query_BHMD, rule.window)
            own = parts.attend(query_BHMD, key_BKMD, value_BKMD, bias, scale, softcap, causal=bias is None)
            _put(output, places_BM, real_BM, own[0])
            _put(normaliser, places_BM, real_BM, own[1])
        for prompt, texts, bias in pieces.groups:
            to_prompt = parts.attend(_one(query[texts]), _one(key[prompt]), _one(value[prompt]), bias, scale, softcap)
            whole, normaliser_1HM = parts.merge(to_prompt, (_one(output[texts]), _one(normaliser[texts])))
            output[texts], normaliser[texts] = _heads(whole)[0].to(output.dtype), _heads(normaliser_1HM)[0]
        if sinks_H is not None:
            whole, normaliser_1HS = beside_sinks(_one(output), _one(normaliser), sinks_H)
            output, normaliser = _heads(whole)[0].to(output.dtype), _heads(normaliser_1HS)[0]
        ctx.save_for_backward(query, key, value, sinks_H, output, normaliser)
        ctx.options = pieces, scale, softcap, rule.window  # the sinks are saved above
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, key, value, sinks_H, output, normaliser = ctx.saved_tensors
        pieces, scale, softcap, window = ctx.options
        d_query, d_key, d_value = (torch.empty_like(x) for x in (query, key, value))
        for places_BM, real_BM in pieces.buckets:
            normaliser_BHM = _heads(normaliser[places_BM])
            if real_BM is not None:  # what is not real has weight 0
                normaliser_BHM = normaliser_BHM.masked_fill(~real_BM[:, None], torch.inf)
            grad_BHMD, query_BHMD, output_BHMD = (_heads(x[places_BM]) for x in (grad, query, output))
            whole = parts.Whole(grad_BHMD, query_BHMD, output_BHMD, normaliser_BHM)
            bias = _window_bias(query_BHMD, window)
            key_BKMD, value_BKMD = _heads(key[places_BM]), _heads(value[places_BM])
            own = parts.gradients(whole, key_BKMD, value_BKMD, bias, scale, softcap, causal=bias is None)
            for d_x, d_own in zip((d_query, d_key, d_value), own, strict=True):
                _put(d_x, places_BM, real_BM, d_own)
        for prompt, texts, bias in pieces.groups:
            whole = parts.Whole(_one(grad[texts]), _one(query[texts]), _one(output[texts]), _one(normaliser[texts]))
            found = parts.gradients(whole, _one(key[prompt]), _one(value[prompt]), bias, scale, softcap)
            for d_x, where, d_part in zip((d_query, d_key, d_value), (texts, prompt, prompt), found, strict=True):
                d_x[where] += _heads(d_part)[0]
        d_sinks_H = None
        if sinks_H is not None:  # their values are 0
            weight_SH = (sinks_H - normaliser).exp()
            d_sinks_H = (
                -(weight_SH * torch.linalg.vecdot(parts.widen(grad), parts.widen(output))).sum(0).to(sinks_H.dtype)
            )
        return d_query, d_key, d_value, d_sinks_H, None, None


def _window_bias(query_BHMD: Tensor, window: int | None) -> Tensor | None:
    """None where every query sees all keys before it."""
    return None if window is None or query_BHMD.shape[2] <= window else parts.causal_bias(query_BHMD, window)


def _heads(x: Tensor) -> Tensor:
    """[B, M, H, ...] as [B, H, M, ...], or back."""
    return x.transpose(1, 2)


def _one(x_MH: Tensor) -> Tensor:
    """[M, H, ...] as a batch of one, [1, H, M, ...]."""
    return x_MH.transpose(0, 1)[None]


def _put(row_SH: Tensor, places_BM: Tensor, real_BM: Tensor | None, value_BHM: Tensor) -> None:
    """Write what is real of ``value_BHM`` to its places in the row."""
    value_BMH = _heads(value_BHM)
    if real_BM is None:
        row_SH[places_BM] = value_BMH
    else:
        row_SH[places_BM[real_BM]] = value_BMH[real_BM]


def attend_token(
    query_AH1D: Tensor,
    prompt: tuple[Tensor, Tensor] | None,
    suffix: tuple[Tensor, Tensor],
    prompt_bias_P11L: Tensor | None,
    rule: AttentionRule,
) -> Tensor:
    """The same for one token of each row, without gradient: to its prompt, [P, K, L, D] each, and to its past.

    The past is [A, K, t, D] each. Rows A = P*G are in the order of their prompts. ``prompt`` None: out of sight.
    """
    A, H, _, D = query_AH1D.shape
    K = suffix[0].shape[1]
    query_AKRD = query_AH1D.reshape(A, K, H // K, D)
    whole_AKR = parts.attend(query_AKRD, *suffix, None, rule.scale, rule.softcap)
    if prompt is not None:
        query_PKMD = query_AKRD.unflatten(0, (len(prompt[0]), -1)).transpose(1, 2).flatten(2, 3)
        to_prompt = parts.attend(query_PKMD, *prompt, prompt_bias_P11L, rule.scale, rule.softcap)
        to_prompt_AKR = [x.unflatten(2, (A // len(x), -1)).transpose(1, 2).flatten(0, 1) for x in to_prompt]
        whole_AKR = parts.merge(to_prompt_AKR, whole_AKR)
    output, normaliser = (x.reshape(A, H, 1, *x.shape[3:]) for x in whole_AKR)
    return beside_sinks(output, normaliser, rule.sinks_H)[0].to(query_AH1D.dtype)


def attention_mask(mask_PL: Tensor, window: int | None = None) -> Tensor | None:
    """bool [P, 1, L, L], causal within ``window``, without padding (which sees itself: no NaN).

    None if none is padded and the window holds all, which is plain causal attention.
    """
    L, device = mask_PL.shape[1], mask_PL.device
    if bool(mask_PL.all()) and (window is None or window >= L):
        return None
    seen_PLL = parts.visible(L, device, window) & mask_PL[:, None]
    return (seen_PLL | torch.eye(L, dtype=torch.bool, device=device))[:, None]


def key_bias(mask_PL: Tensor) -> Tensor | None:
    """float32 [P, 1, 1, L]: 0 where the mask is True, else -inf; None if it is True everywhere."""
    if bool(mask_PL.all()):
        return None
    return parts.bias_of(mask_PL)[:, None, None]
