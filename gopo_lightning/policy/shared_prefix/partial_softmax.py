"""Attention to one part of the keys that a query sees, the weighing of parts into one softmax, and its gradient.

Pure functions, without autograd. Their own legend: B batch, H query heads, K key heads, M queries, N keys, D width.
Neighbouring query heads, H / K of them, read the same keys.
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
    query_BHMD: Tensor,
    key_BKND: Tensor,
    value_BKND: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    *,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention [B, H, M, D] of the queries to these keys, and the logarithm of its normaliser [B, H, M], float32.

    ``bias``, 0 or -inf and broadcast from [B, 1, M, N], is added to the scores; None adds nothing. ``causal``, in its
    place: a query sees the keys up to its own place, of which there are as many.
    """
    bias = None if bias is None else bias.to(wide(query_BHMD))  # the kernel reads it as that, whatever it is
    if _has_kernel(query_BHMD, softcap):
        return cpu_flash_attention(query_BHMD, key_BKND, value_BKND, bias, scale, causal)
    query_BKMD = _by_key_heads(query_BHMD, key_BKND)
    bias = _bias_by_key_heads(causal_bias(query_BHMD) if causal else bias, query_BHMD, key_BKND)
    output = query_BKMD.new_empty(*query_BKMD.shape[:-1], value_BKND.shape[-1])
    normaliser = query_BKMD.new_empty(query_BKMD.shape[:-1], dtype=wide(query_BKMD))
    for b, m in _chunks(query_BKMD, key_BKND):
        scores = _scores(query_BKMD[b, :, m], key_BKND[b], _at(bias, b, m), scale, softcap)
        output[b, :, m] = scores.softmax(-1).to(value_BKND.dtype) @ value_BKND[b]
        normaliser[b, :, m] = scores.logsumexp(-1)
    return output.view(*query_BHMD.shape[:-1], -1), normaliser.view(query_BHMD.shape[:-1])


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
    whole: Whole,
    key_BKND: Tensor,
    value_BKND: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    *,
    causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """This part's share of the gradients of the queries, keys and values; the scores are computed again.

    ``bias`` and ``causal`` are those of ``attend``.
    """
    query_BHMD = whole.query_BHMD
    bias = None if bias is None else bias.to(wide(query_BHMD))
    if _has_kernel(query_BHMD, softcap) and key_BKND.shape[2] >= _KERNEL_PAYS:
        saved = query_BHMD, key_BKND, value_BKND, whole.output_BHMD, whole.normaliser_BHM
        return cpu_flash_attention_backward(whole.grad_BHMD, *saved, bias=bias, scale=scale, causal=causal)
    bias = _bias_by_key_heads(causal_bias(query_BHMD) if causal else bias, query_BHMD, key_BKND)
    grad_BKMD, query_BKMD, output_BKMD, normaliser_BKM = (_by_key_heads(x, key_BKND) for x in whole)
    mean_BKM1 = torch.linalg.vecdot(widen(grad_BKMD), widen(output_BKMD))[..., None]
    d_query, d_key, d_value = (torch.zeros_like(x) for x in (query_BKMD, key_BKND, value_BKND))
    for b, m in _chunks(query_BKMD, key_BKND):
        query, key, value, grad = query_BKMD[b, :, m], key_BKND[b], value_BKND[b], grad_BKMD[b, :, m]
        scores = _scores(query, key, _at(bias, b, m), scale, softcap)
        slope = None if softcap is None else 1 - (scores / softcap).masked_fill_(scores.isinf(), 0.0) ** 2
        weights = scores.sub_(normaliser_BKM[b, :, m, None]).exp_()
        d_products = widen(grad @ value.mT).sub_(mean_BKM1[b, :, m]).mul_(weights).mul_(scale)
        if slope is not None:
            d_products *= slope
        weights, d_products = weights.to(query.dtype), d_products.to(query.dtype)
        d_value[b] += weights.mT @ grad
        d_key[b] += d_products.mT @ query
        d_query[b, :, m] = d_products @ key
    return d_query.unflatten(2, (-1, query_BHMD.shape[2])).flatten(1, 2), d_key, d_value


def widen(x: Tensor) -> Tensor:
    """In float32, or in float64 what is that already."""
    return x.to(wide(x))


def wide(x: Tensor) -> torch.dtype:
    """float32, or float64 where ``x`` is that."""
    return torch.promote_types(x.dtype, torch.float32)


def _has_kernel(query: Tensor, softcap: float | None) -> bool:
    """Whether torch has a fused kernel that tells the normaliser, takes a bias and whose gradient can be had alone."""
    return HAS_CPU_FLASH_ATTENTION and query.device.type == "cpu" and softcap is None


def _by_key_heads(x_BHM: Tensor, key_BKND: Tensor) -> Tensor:
    """[B, H, M, ...] as [B, K, H / K * M, ...]: the queries that read the same keys side by side."""
    return x_BHM.unflatten(1, (key_BKND.shape[1], -1)).flatten(2, 3)


def _bias_by_key_heads(bias: Tensor | None, query_BHMD: Tensor, key_BKND: Tensor) -> Tensor | None:
    """The bias of `_by_key_heads`' queries: [B, 1, H / K * M, N] of one that has a row for each query."""
    if bias is None or bias.shape[2] == 1:
        return bias
    return bias.repeat(1, 1, query_BHMD.shape[1] // key_BKND.shape[1], 1)


def causal_bias(query_BHMD: Tensor, window: int | None = None) -> Tensor:
    """-inf where the key comes after the query, or ``window`` places or more before it, else 0; [1, 1, M, M]."""
    return bias_of(visible(query_BHMD.shape[2], query_BHMD.device, window))[None, None]


def bias_of(seen: Tensor) -> Tensor:
    """float32, 0 where ``seen`` is True, else -inf."""
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -torch.inf)


def visible(size: int, device: torch.device, window: int | None = None) -> Tensor:
    """bool [size, size], True where the column is at the row's place or one of the ``window`` - 1 before it."""
    earlier = torch.ones(size, size, dtype=torch.bool, device=device).tril()
    return earlier if window is None else earlier.triu(1 - window)


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
