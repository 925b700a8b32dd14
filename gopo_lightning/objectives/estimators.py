"""Estimators that objectives share: importance ratios, KL terms, token weights. All pure.

Shape legend: see `types.py`. Inputs below float32 are raised by ``clean``.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

ImportanceSampling = Literal["token", "sequence"]
TokenWeight = Literal["uniform", "log", "poly", "loglog"]
SamplerCorrection = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


def token_weights(num_tokens: int, kind: TokenWeight, *, device: torch.device | None = None) -> Tensor:
    """float32 [T]: the weight of the advantage at token t = 1 ... T (ablation in the GOPO authors' code)."""
    t = torch.arange(1, num_tokens + 1, dtype=torch.float64, device=device)
    if kind == "uniform":
        return torch.ones_like(t).float()
    if kind == "log":
        return (1 / torch.log(1 + t)).float()
    if kind == "poly":
        return (1 / torch.sqrt(t)).float()
    if kind == "loglog":
        return (1 / torch.log(torch.log(t + 5))).float()
    raise ValueError(f"token_weight={kind!r} is unknown; choose one of {list(get_args(TokenWeight))}.")


def kl_k2(logprobs_NT: Tensor, reference_logprobs_NT: Tensor) -> Tensor:
    """d^2 / 2, d = log reference - log policy (Schulman 2020). Its on-policy gradient is the KL's."""
    return 0.5 * (reference_logprobs_NT - logprobs_NT) ** 2


def kl_k3(logprobs_NT: Tensor, reference_logprobs_NT: Tensor) -> Tensor:
    """exp(d) - d - 1, d = log reference - log policy (Schulman 2020; GRPO, arXiv 2402.03300 eq. 4)."""
    d_NT = reference_logprobs_NT - logprobs_NT
    return torch.exp(d_NT) - d_NT - 1


def importance_ratio(logprobs_NT: Tensor, old_logprobs_NT: Tensor, mask_NT: Tensor, kind: ImportanceSampling) -> Tensor:
    """[N, T] policy / old policy; inputs are finite outside ``mask_NT``.

    ``token``: exp(log policy - log old). ``sequence``: s_n = exp(mean over tokens of the same) at every
    token, GSPO (arXiv 2507.18071 eq. 7), written as GSPO-token (ibid., sec. 4.3): ``s_nt = sg[s_n] policy_t /
    sg[policy_t]``. The value is that of GSPO and so is the gradient, as a completion has one advantage; with
    token weights each token keeps its own.

    Beyond the range of the type a ratio is inf, without gradient: 0 where a clip acts, and else the loss is inf.
    """
    log_ratio_NT = logprobs_NT - old_logprobs_NT
    if kind == "sequence":
        mean_N1 = torch.where(mask_NT, log_ratio_NT, 0.0).sum(-1, keepdim=True) / lengths(mask_NT)
        log_ratio_NT = mean_N1.detach() + logprobs_NT - logprobs_NT.detach()
    beyond_NT = torch.exp(log_ratio_NT.detach()).isinf()  # exp's own gradient would be 0 * inf there
    return torch.exp(log_ratio_NT.masked_fill(beyond_NT, 0.0)).masked_fill(beyond_NT, math.inf)


def sampler_correction(
    old_logprobs_NT: Tensor, sampler_logprobs_NT: Tensor, mask_NT: Tensor, cap: float, kind: SamplerCorrection
) -> Tensor:
    """[N, T] or [N, 1] old policy / sampler, detached: of each token, or the product over a completion's tokens.

    Beyond ``cap`` it is the cap (truncated importance sampling, Ionides 2008), or 0 where ``kind`` masks. The four are
    those of TRL 1.16 (`vllm_importance_sampling_mode`). Inputs are finite outside ``mask_NT``.
    """
    log_ratio = torch.where(mask_NT, old_logprobs_NT - sampler_logprobs_NT, 0.0)
    if kind in ("sequence_truncate", "sequence_mask"):
        log_ratio = log_ratio.sum(-1, keepdim=True)
    ratio = torch.exp(log_ratio).detach()
    if kind in ("token_truncate", "sequence_truncate"):
        return ratio.clamp(max=cap)
    return ratio.masked_fill(ratio > cap, 0.0)


def clean(values_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """``values_NT`` in float32 or better, 0 outside the mask (0 * NaN is NaN, so a product would not do)."""
    if values_NT.shape != mask_NT.shape:
        raise ValueError(f"a tensor of shape {tuple(values_NT.shape)} does not fit the mask {tuple(mask_NT.shape)}.")
    dtype = torch.promote_types(values_NT.dtype, torch.float32)
    return torch.where(mask_NT, values_NT.to(dtype), 0.0)


def lengths(mask_NT: Tensor) -> Tensor:
    """int64 [N, 1]: unmasked tokens of each completion, 1 where there is none."""
    return mask_NT.sum(-1, keepdim=True).clamp(min=1)
