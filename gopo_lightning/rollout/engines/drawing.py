"""The draw of one token per row: filters and inverse-CDF sampling, vectorised over rows. All pure.

Suffixes: N rows, V vocabulary, C candidates (the vocabulary, or its most likely part in descending order).
"""

import torch
from torch import Tensor

from gopo_lightning.policy.lm_head import row_blocks
from gopo_lightning.rollout.engines.base import SamplingConfig

_BLOCK = 256
_NUCLEUS = 1024


def draw_tokens(
    logits_NV: Tensor, uniforms_N: Tensor, config: SamplingConfig, banned: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One token per row, int64 [N], and its log-probability, float32 [N].

    The log-probability is the policy's own: at the temperature (at 1 if that is 0), before ``banned`` token ids and
    filters cut anything away. It is not finite where the logits are no distribution (NaN, +inf, nothing but -inf), or
    none without ``banned``; the token means nothing then.
    """
    blocks = row_blocks(logits_NV, uniforms_N)
    drawn = [_draw_block(block_NV, block_N, config, banned) for block_NV, block_N in blocks]
    tokens, logprobs = zip(*drawn, strict=True)
    return torch.cat(tokens), torch.cat(logprobs)


def _draw_block(
    logits_NV: Tensor, uniforms_N: Tensor, config: SamplingConfig, banned: Tensor | None
) -> tuple[Tensor, Tensor]:
    logits_NV = logits_NV.to(torch.float32, copy=True).div_(config.temperature or 1.0)
    peak_N1, weights_NV = _weights(logits_NV)
    normaliser_N1 = peak_N1 + weights_NV.sum(-1, keepdim=True).log()
    allowed_NV = logits_NV if banned is None else logits_NV.index_fill(-1, banned, -torch.inf)
    if config.temperature == 0:
        tokens_N1 = allowed_NV.argmax(-1, keepdim=True)
    else:
        if banned is not None:  # under the peak of a banned token all others may round to 0
            _, weights_NV = _weights(allowed_NV)
        kept_NC, ids_NC = candidates(weights_NV, config)
        tokens_N1 = inverse_cdf(kept_NC, uniforms_N)[:, None]
        tokens_N1 = tokens_N1 if ids_NC is None else ids_NC.gather(-1, tokens_N1)
    return tokens_N1[:, 0], (allowed_NV.gather(-1, tokens_N1) - normaliser_N1)[:, 0]


def _weights(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit [N, 1], and unnormalised probabilities [N, V] that are 1 there."""
    peak_N1 = logits_NV.amax(-1, keepdim=True)
    return peak_N1, (logits_NV - peak_N1).exp_()


def candidates(weights_NV: Tensor, config: SamplingConfig) -> tuple[Tensor, Tensor | None]:
    """Unnormalised probabilities [N, C], 0 where top-k, top-p or min-p cut away, and ids [N, C] (None: all of V)."""
    kept_NC, ids_NC = weights_NV, None
    if config.top_k and config.top_k < weights_NV.shape[-1]:
        kept_NC, ids_NC = weights_NV.topk(config.top_k)
    if config.top_p < 1:
        kept_NC, ids_NC = _nucleus(kept_NC, ids_NC, config.top_p)
    if config.min_p > 0:
        kept_NC = kept_NC.masked_fill(kept_NC < config.min_p * kept_NC.amax(-1, keepdim=True), 0.0)
    return kept_NC, ids_NC


def _nucleus(weights_NC: Tensor, ids_NC: Tensor | None, top_p: float) -> tuple[Tensor, Tensor]:
    """Sorted candidates, cut where the mass before a token already reaches ``top_p``; sorts no more than it must."""
    target_N1 = top_p * weights_NC.sum(-1, keepdim=True)
    if ids_NC is None:
        sorted_NC, ids_NC = weights_NC.topk(min(_NUCLEUS, weights_NC.shape[-1]))
        if bool((sorted_NC.sum(-1, keepdim=True) < target_N1).any()):
            sorted_NC, ids_NC = weights_NC.sort(-1, descending=True)
        weights_NC = sorted_NC
    before_NC = weights_NC.cumsum(-1) - weights_NC
    before_NC[:, 0] = 0.0  # the most likely token always stays
    return weights_NC.masked_fill(before_NC >= target_N1, 0.0), ids_NC


def inverse_cdf(weights_NC: Tensor, uniforms_N: Tensor) -> Tensor:
    """int64 [N]: the first column where the running sum of ``weights_NC`` exceeds u times its total.

    Weights are >= 0 with a positive sum; a column of weight 0 is never drawn. Two levels, both with a running sum in
    float64: first the block of columns, then the column. In float32 over a large vocabulary it would lose unlikely
    tokens. The blocks themselves are short, so float32 sums them.
    """
    if pad := -weights_NC.shape[-1] % _BLOCK:
        weights_NC = torch.nn.functional.pad(weights_NC, (0, pad))
    blocks_NBC = weights_NC.unflatten(-1, (-1, _BLOCK))
    block_N, rest_N = _locate(blocks_NBC.sum(-1).double(), uniforms_N)
    inside_NC = blocks_NBC.take_along_dim(block_N[:, None, None], 1)[:, 0].double()
    column_N, _ = _locate(inside_NC, rest_N)
    return block_N * _BLOCK + column_N


def _locate(weights_NC: Tensor, fraction_N: Tensor) -> tuple[Tensor, Tensor]:
    """The column where the running sum passes ``fraction_N`` of the total, and how far into that column, in [0, 1)."""
    cdf_NC = weights_NC.cumsum(-1)
    target_N1 = fraction_N[:, None] * cdf_NC[:, -1:]
    column_N1 = torch.searchsorted(cdf_NC, target_N1, right=True)
    last_N1 = (weights_NC > 0).to(torch.int8).cumsum(-1, dtype=torch.int64).argmax(-1, keepdim=True)
    column_N1 = torch.minimum(column_N1, last_N1)  # rounding may carry the target to the total
    weight_N1 = weights_NC.gather(-1, column_N1)
    into_N1 = 1 - (cdf_NC.gather(-1, column_N1) - target_N1) / weight_N1
    return column_N1[:, 0], into_N1[:, 0].clamp(0.0, 1.0)
