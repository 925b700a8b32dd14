"""Attention to one part of the keys that a query sees, the weighing of parts into one softmax, and its gradient.

Pure functions, without autograd. Their own legend: B batch, H heads, M queries, N keys, D width.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gopo_lightning._compat import HAS_CPU_FLASH_ATTENTION, cpu_flash_attention, cpu_flash_attention_backward

_MAX_SCORES = 2**20
"""Scores that exist at once where no fused kernel serves."""

_KERNEL_PAYS = 128
"""Keys from which the fused kernel's backward is faster than products of matrices, on CPU."""


def attend(
    query_BHMD: Tensor, key_BHND: Tensor, value_BHND: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Attention [B, H, M, D] of the queries to these keys, and the logarithm of its normaliser [B, H, M], float32.

    ``bias``, 0 or -inf and broadcast from four dimensions, is added to the scores; None adds nothing.
    """
    if _has_kernel(query_BHMD, softcap):
        return cpu_flash_attention(query_BHMD, key_BHND, value_BHND, bias, scale)
    output = query_BHMD.new_empty(*query_BHMD.shape[:-1], value_BHND.shape[-1])
    normaliser = query_BHMD.new_empty(query_BHMD.shape[:-1], dtype=_wide(query_BHMD))
    for b, m in _chunks(query_BHMD, key_BHND):
        scores = _scores(query_BHMD[b, :, m], key_BHND[b], _at(bias, b, m), scale, softcap)
        output[b, :, m] = scores.softmax(-1).to(value_BHND.dtype) @ value_BHND[b]
        normaliser[b, :, m] = scores.logsumexp(-1)
    return output, normaliser


def merge(one: Sequence[Tensor], other: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """One softmax over two parts, from ``attend``'s result for each; in float32."""
    (output, normaliser), (other_output, other_normaliser) = one, other
    share = (normaliser - other_normaliser).sigmoid()[..., None]
    return torch.lerp(widen(other_output), widen(output), share), torch.logaddexp(normaliser, other_normaliser)


class Whole(NamedTuple):
    """Queries and the softmax over all parts of what they see: its gradient, output and log-normaliser."""

    grad_BHMD: Tensor
    query_BHMD: Tensor
    output_BHMD: Tensor
    normaliser_BHM: Tensor


def gradients(
    whole: Whole, key_BHND: Tensor, value_BHND: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """This part's share of the gradients of the queries, keys and values; the scores are computed again."""
    grad_BHMD, query_BHMD, output_BHMD, normaliser_BHM = whole
    if _has_kernel(query_BHMD, softcap) and key_BHND.shape[2] >= _KERNEL_PAYS:
        saved = query_BHMD, key_BHND, value_BHND, output_BHMD, normaliser_BHM
        return cpu_flash_attention_backward(grad_BHMD, *saved, bias=bias, scale=scale)
    mean_BHM1 = torch.linalg.vecdot(widen(grad_BHMD), widen(output_BHMD))[..., None]
    d_query, d_key, d_value = (torch.zeros_like(x) for x in (query_BHMD, key_BHND, value_BHND))
    for b, m in _chunks(query_BHMD, key_BHND):
        query, key, value, grad = query_BHMD[b, :, m], key_BHND[b], value_BHND[b], grad_BHMD[b, :, m]
        scores = _scores(query, key, _at(bias, b, m), scale, softcap)
        slope = None if softcap is None else 1 - (scores / softcap).masked_fill_(scores.isinf(), 0.0) ** 2
        weights = scores.sub_(normaliser_BHM[b, :, m, None]).exp_()
        d_products = widen(grad @ value.mT).sub_(mean_BHM1[b, :, m]).mul_(weights).mul_(scale)
        if slope is not None:
            d_products *= slope
        weights, d_products = weights.to(query.dtype), d_products.to(query.dtype)
        d_value[b] += weights.mT @ grad
        d_key[b] += d_products.mT @ query
        d_query[b, :, m] = d_products @ key
    return d_query, d_key, d_value


def widen(x: Tensor) -> Tensor:
    """In float32, or in float64 what is that already."""
    return x.to(_wide(x))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _has_kernel(query: Tensor, softcap: float | None) -> bool:
    """Whether torch has a fused kernel that tells the normaliser, takes a bias and whose gradient can be had alone."""
    return HAS_CPU_FLASH_ATTENTION and query.device.type == "cpu" and softcap is None


def _scores(query: Tensor, key: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    scores = widen(query @ key.mT) * scale
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    return scores if bias is None else scores.add_(bias)


def _chunks(query_BHMD: Tensor, key_BHND: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of the batch and of the queries, of at most ``_MAX_SCORES`` scores, or of one query."""
    B, H, M, _ = query_BHMD.shape
    rows = max(_MAX_SCORES // (H * key_BHND.shape[2]), 1)
    batch = max(rows // M, 1)
    for b in range(0, B, batch):
        for m in range(0, M, rows):
            yield slice(b, b + batch), slice(m, m + rows)


def _at(bias: Tensor | None, b: slice, m: slice) -> Tensor | None:
    if bias is None:
        return None
    bias = bias if len(bias) == 1 else bias[b]
    return bias if bias.shape[2] == 1 else bias[:, :, m]
