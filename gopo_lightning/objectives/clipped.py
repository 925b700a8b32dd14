"""The clipped surrogate with its aggregations, importance ratios and KL terms.

Shape legend: N completions, T completion tokens. All functions are pure. Inputs below float32 are raised.

The loss of one optimiser step over M completions, with r the importance ratio, A the advantage, w the token
weight:

    surrogate_nt = min(r_nt A_n w_t, clip(r_nt, 1 - clip_low, 1 + clip_high) A_n w_t)
    loss         = sum_nt scale_n (-surrogate_nt + kl_coef KL_nt) / denominator

The surrogate is eq. 7 of PPO (arXiv 1707.06347).

    aggregation   scale_n            denominator                        from
    token         1                  unmasked tokens                    DAPO, arXiv 2503.14476
    sequence      1 / tokens of n    unmasked completions               GRPO, arXiv 2402.03300
    constant      1                  all completions * max_new_tokens   Dr. GRPO, arXiv 2503.20783

The denominator is that of the whole optimiser minibatch over all ranks: the caller sums ``denominator`` over
micro-batches and ranks once, and passes it with every micro-batch, so that micro-batch losses ADD UP to the
same loss and gradient, however the completions are split. (A wrapper that averages gradients over ranks, as
DDP and FSDP do, wants the sum divided by the world size.)

Departures: clip fractions are counted where the clip acts on the gradient (sign of A included); a KL term is
never multiplied by the token weight. GOPO's code takes the token mean of each micro-batch of 4 completions and the
mean of these, so that a token of a short micro-batch weighs more; ``token`` here is the mean over all tokens.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Aggregation = Literal["token", "sequence", "constant"]
ImportanceSampling = Literal["token", "sequence"]
KLEstimator = Literal["k3", "k2", "k1"]
TokenWeight = Literal["uniform", "log", "poly", "loglog"]


@dataclass(frozen=True)
class LossConfig:
    """The policy loss."""

    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    clip_ceiling: float | None = None
    """Two-sided clip: the ratio never exceeds this where the advantage is negative. Off by default."""
    aggregation: Aggregation = "token"
    """token: sum over tokens / unmasked tokens. sequence: mean over tokens, then over unmasked completions.
    constant: sum over tokens / (completions * max_new_tokens)."""
    importance_sampling: ImportanceSampling = "token"
    """token: a ratio per token. sequence: the geometric mean of a completion's token ratios (GSPO: its paper
    has aggregation sequence and clips of 3e-4 and 4e-4)."""
    kl_coef: float = 0.0
    """Weight of the KL to the frozen reference; with 0 no reference is loaded for the loss."""
    kl_estimator: KLEstimator = "k3"
    """k3: exp(d) - d - 1 with d = log reference - log policy. k2: d^2 / 2. k1 is refused: in a loss its
    expected gradient is zero."""
    mask_truncated: bool = False
    """Leave completions cut off by max_new_tokens out of the loss."""
    sampler_correction_cap: float | None = None
    """Truncated importance sampling: where the sampler's numbers differ from the trainer's (another precision or
    engine), each token counts min(policy / sampler, cap) times. Off by default; 2.0 is common."""
    token_weight: TokenWeight = "uniform"
    """Weight of the advantage at token t = 1, 2, ...: uniform 1, log 1/log(1+t), poly 1/sqrt(t),
    loglog 1/log(log(t+5))."""

    def __post_init__(self) -> None:
        """Raise ValueError on a value out of its range."""
        if self.kl_estimator == "k1":
            raise ValueError(
                "kl_estimator='k1' cannot be a loss: the expected gradient of log policy - log reference "
                "under the policy's own samples is zero, so it would only add noise. Use 'k3' or 'k2'."
            )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {list(choices)}.")
        if not 0 <= self.clip_low <= 1:
            raise ValueError(f"clip_low={self.clip_low} must lie in [0, 1], as ratios are positive. Try 0.2.")
        if not 0 <= self.clip_high < math.inf:
            raise ValueError(f"clip_high={self.clip_high} must be finite and at least 0. Try 0.2.")
        if self.clip_ceiling is not None and not self.clip_ceiling > 1 + self.clip_high:
            raise ValueError(
                f"clip_ceiling={self.clip_ceiling} must be above 1 + clip_high = {1 + self.clip_high}, else "
                "it acts inside the trust region. Raise it (4.0 is common) or leave it null."
            )
        if self.sampler_correction_cap is not None and not self.sampler_correction_cap >= 1:
            raise ValueError(
                f"sampler_correction_cap={self.sampler_correction_cap} must be at least 1, else it also cuts tokens on "
                "which sampler and trainer agree. Use 2.0, or null for none."
            )
        if not 0 <= self.kl_coef < math.inf:
            raise ValueError(f"kl_coef={self.kl_coef} must be finite and at least 0. Use 0 for no KL term.")


_CHOICES = {
    "aggregation": get_args(Aggregation),
    "importance_sampling": get_args(ImportanceSampling),
    "kl_estimator": get_args(KLEstimator),
    "token_weight": get_args(TokenWeight),
}


def loss_mask(mask_NT: Tensor, valid_N: Tensor, truncated_N: Tensor, config: LossConfig) -> Tensor:
    """bool [N, T]: ``mask_NT`` without completions that have no score or that mask_truncated drops."""
    kept_N = valid_N & ~truncated_N if config.mask_truncated else valid_N
    return mask_NT.bool() & kept_N.unsqueeze(-1)


def denominator(mask_NT: Tensor, *, aggregation: Aggregation, max_new_tokens: int, num_completions: int) -> Tensor:
    """float32 scalar: what these completions add to the denominator, to be summed over micro-batches and
    ranks.

    Args:
        mask_NT: the output of ``loss_mask``.
        aggregation: see the module docstring.
        max_new_tokens: read under ``constant`` only.
        num_completions: completions before masking; read under ``constant`` only.
    """
    if aggregation == "constant":
        return torch.tensor(float(num_completions * max_new_tokens), device=mask_NT.device)
    if aggregation == "sequence":
        return mask_NT.any(-1).sum().float()
    if aggregation == "token":
        return mask_NT.sum().float()
    raise ValueError(f"aggregation={aggregation!r} is unknown; choose one of {list(get_args(Aggregation))}.")


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
        mean_N1 = torch.where(mask_NT, log_ratio_NT, 0.0).sum(-1, keepdim=True) / _lengths(mask_NT)
        log_ratio_NT = mean_N1.detach() + logprobs_NT - logprobs_NT.detach()
    beyond_NT = torch.exp(log_ratio_NT.detach()).isinf()  # exp's own gradient would be 0 * inf there
    return torch.exp(log_ratio_NT.masked_fill(beyond_NT, 0.0)).masked_fill(beyond_NT, math.inf)


def clipped_surrogate(ratio_NT: Tensor, advantages_NT: Tensor, config: LossConfig) -> Tensor:
    """min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), PPO eq. 7; asymmetric as in DAPO (arXiv 2503.14476
    eq. 10).

    With ``clip_ceiling`` the first r is min(r, ceiling), which bounds the loss where A < 0 (two-sided clip of
    INTELLECT-2, arXiv 2505.07291 sec. 3.4). It is 0 where A is, also for an infinite ratio.
    """
    capped_NT = ratio_NT if config.clip_ceiling is None else ratio_NT.clamp(max=config.clip_ceiling)
    clipped_NT = ratio_NT.clamp(1 - config.clip_low, 1 + config.clip_high)
    surrogate_NT = torch.minimum(capped_NT * advantages_NT, clipped_NT * advantages_NT)
    return surrogate_NT.masked_fill(advantages_NT == 0, 0.0)


def sampler_correction(old_logprobs_NT: Tensor, sampler_logprobs_NT: Tensor, cap: float) -> Tensor:
    """[N, T] min(old policy / sampler, cap), detached: truncated importance sampling (Ionides 2008)."""
    return torch.exp(old_logprobs_NT - sampler_logprobs_NT).clamp(max=cap).detach()


def policy_loss(
    logprobs_NT: Tensor,
    old_logprobs_NT: Tensor | None,
    reference_logprobs_NT: Tensor | None,
    advantages_N: Tensor,
    mask_NT: Tensor,
    *,
    config: LossConfig,
    denominator: Tensor,
    sampler_logprobs_NT: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one micro-batch (see the module docstring) and its metrics.

    Args:
        logprobs_NT: of the policy, with gradient.
        old_logprobs_NT: of the policy that sampled; None means on-policy, a ratio of 1 that carries the
            gradient.
        reference_logprobs_NT: of the frozen reference; needed if kl_coef > 0, else only logged.
        advantages_N: one per completion.
        mask_NT: the output of ``loss_mask``. Whatever stands outside it (NaN too) reaches neither loss nor
            gradient.
        config: the loss.
        denominator: of the whole optimiser minibatch, over all its micro-batches and ranks. 0 gives a loss of
            0.

    Returns:
        The scalar loss, and detached float32 SUMS over unmasked tokens, to be divided by the number of those:
        ``ratio``, ``clip_low`` and ``clip_high`` (tokens whose gradient the clip stopped), ``clip_ceiling``
        if set, and ``kl`` (k3, whatever the loss uses) if a reference is given.
    """
    if reference_logprobs_NT is None and config.kl_coef > 0:
        raise ValueError(f"kl_coef={config.kl_coef} needs the reference's log-probs, which are missing. Set it to 0.")
    if sampler_logprobs_NT is None and config.sampler_correction_cap is not None:
        raise ValueError(
            f"sampler_correction_cap={config.sampler_correction_cap} needs the sampler's log-probs, which this engine "
            "does not give. Set it to null."
        )
    mask_NT = mask_NT.bool()
    logprobs_NT = _clean(logprobs_NT, mask_NT)
    old_NT = logprobs_NT.detach() if old_logprobs_NT is None else _clean(old_logprobs_NT.detach(), mask_NT)
    advantages_NT = _clean(advantages_N.detach().unsqueeze(-1).expand(mask_NT.shape), mask_NT)
    weights_T = token_weights(mask_NT.shape[1], config.token_weight, device=mask_NT.device)

    ratio_NT = importance_ratio(logprobs_NT, old_NT, mask_NT, config.importance_sampling)
    loss_NT = -clipped_surrogate(ratio_NT, advantages_NT * weights_T, config)
    if sampler_logprobs_NT is not None and config.sampler_correction_cap is not None:
        sampler_NT = _clean(sampler_logprobs_NT, mask_NT)
        loss_NT = loss_NT * sampler_correction(old_NT, sampler_NT, config.sampler_correction_cap)
    metrics_NT = _clip_metrics(ratio_NT.detach(), advantages_NT, config)
    if reference_logprobs_NT is not None:
        reference_NT = _clean(reference_logprobs_NT.detach(), mask_NT)
        metrics_NT["kl"] = kl_k3(logprobs_NT.detach(), reference_NT)
        if config.kl_coef > 0:
            estimator = kl_k3 if config.kl_estimator == "k3" else kl_k2
            loss_NT = loss_NT + config.kl_coef * estimator(logprobs_NT, reference_NT)
    if config.aggregation == "sequence":
        loss_NT = loss_NT / _lengths(mask_NT)
    total = torch.where(mask_NT, loss_NT, 0.0).sum()
    loss = total / torch.where(denominator > 0, denominator, 1.0)
    return loss, {k: torch.where(mask_NT, v.float(), 0.0).sum() for k, v in metrics_NT.items()}


def _clip_metrics(ratio_NT: Tensor, advantages_NT: Tensor, config: LossConfig) -> dict[str, Tensor]:
    """[N, T] each: the ratio, and where a clip stops the gradient."""
    metrics_NT = {
        "ratio": ratio_NT,
        "clip_low": (ratio_NT < 1 - config.clip_low) & (advantages_NT < 0),
        "clip_high": (ratio_NT > 1 + config.clip_high) & (advantages_NT > 0),
    }
    if config.clip_ceiling is not None:
        metrics_NT["clip_ceiling"] = (ratio_NT > config.clip_ceiling) & (advantages_NT < 0)
    return metrics_NT


def _clean(values_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """``values_NT`` in float32 or better, 0 outside the mask (0 * NaN is NaN, so a product would not do)."""
    if values_NT.shape != mask_NT.shape:
        raise ValueError(f"a tensor of shape {tuple(values_NT.shape)} does not fit the mask {tuple(mask_NT.shape)}.")
    dtype = torch.promote_types(values_NT.dtype, torch.float32)
    return torch.where(mask_NT, values_NT.to(dtype), 0.0)


def _lengths(mask_NT: Tensor) -> Tensor:
    """int64 [N, 1]: unmasked tokens of each completion, 1 where there is none."""
    return mask_NT.sum(-1, keepdim=True).clamp(min=1)
