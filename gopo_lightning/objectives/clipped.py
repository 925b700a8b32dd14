"""The clipped surrogate with its aggregations, importance ratios and KL terms.

Shape legend: N completions, T completion tokens. All functions are pure. Inputs below float32 are raised.

The loss of one optimiser step over M completions, with r the importance ratio, A the advantage, w the token
weight:

    surrogate_nt = min(r_nt A_n w_t, clip(r_nt, 1 - clip_low, 1 + clip_high) A_n w_t)
    loss         = sum_nt scale_n (-surrogate_nt + kl_coef KL_nt) / denominator

The surrogate is eq. 7 of PPO (arXiv 1707.06347).

    aggregation   scale_n                denominator                        from
    token         v_n                    sum of v_n over unmasked tokens    DAPO, arXiv 2503.14476
    sequence      v_n / tokens of n      sum of v_n                         GRPO, arXiv 2402.03300
    constant      v_n                    all completions * max_new_tokens   Dr. GRPO, arXiv 2503.20783

v_n is the completion's weight, 1 where nothing has weighed it. The denominator is that of the whole optimiser
minibatch over all ranks, see `Objective`. (A wrapper that averages gradients over ranks, as DDP and FSDP do, wants the
sum divided by the world size.)

Departures: clip fractions are counted where the clip acts on the gradient (sign of A included); a KL term is
never multiplied by the token weight. GOPO's code takes the token mean of each micro-batch of 4 completions and the
mean of these, so that a token of a short micro-batch weighs more; ``token`` here is the mean over all tokens.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from gopo_lightning.objectives.base import Loss, Mean, Needed, Objective
from gopo_lightning.objectives.estimators import (
    ImportanceSampling,
    SamplerCorrection,
    TokenWeight,
    clean,
    importance_ratio,
    kl_k2,
    kl_k3,
    lengths,
    sampler_correction,
    token_weights,
)
from gopo_lightning.types import Experience

Aggregation = Literal["token", "sequence", "constant"]
KLEstimator = Literal["k3", "k2", "k1"]


@dataclass(frozen=True)
class ClippedSurrogate(Objective):
    """PPO's clipped surrogate with a KL penalty: the loss of GOPO, GRPO, Dr. GRPO, DAPO and GSPO."""

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
    """Weight of the KL to ``kl_anchor``; with 0 no reference is loaded for the loss."""
    kl_anchor: Literal["reference", "iterate"] = "reference"
    """What the KL penalty holds the policy near: reference, the policy of step 0; or iterate, the policy some updates
    ago (`objective.iterate_every`), as in mirror descent (MDPO, arXiv 2005.09814)."""
    kl_estimator: KLEstimator = "k3"
    """k3: exp(d) - d - 1 with d = log reference - log policy. k2: d^2 / 2. k1 is refused: in a loss its
    expected gradient is zero."""
    mask_truncated: bool = False
    """Leave completions cut off by max_new_tokens out of the loss."""
    sampler_correction_cap: float | None = None
    """Importance sampling where the sampler's numbers differ from the trainer's (another precision or engine): each
    token counts policy / sampler times, and ``sampler_correction`` says what happens above this cap. Off by default;
    2.0 is common."""
    sampler_correction: SamplerCorrection = "token_truncate"
    """token_truncate: a token's ratio is at most the cap. token_mask: a token above it leaves the loss. The same of the
    whole completion's ratio, the product over its tokens: sequence_truncate, and sequence_mask, under which a
    completion that the trainer finds far likelier than the sampler did leaves the loss."""
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
        if self.sampler_correction_cap is None and self.sampler_correction != "token_truncate":
            raise ValueError(
                f"sampler_correction={self.sampler_correction} has no effect without a cap. Set "
                "sampler_correction_cap, or leave sampler_correction out."
            )
        if not 0 <= self.kl_coef < math.inf:
            raise ValueError(f"kl_coef={self.kl_coef} must be finite and at least 0. Use 0 for no KL term.")
        if self.kl_anchor == "iterate" and self.kl_coef == 0:
            raise ValueError("kl_anchor=iterate has no effect with kl_coef=0. Set kl_coef, or leave kl_anchor out.")

    @property
    def reads_sampler(self) -> bool:  # type: ignore[override]  # of the class
        """For the correction."""
        return self.sampler_correction_cap is not None

    @property
    def needs(self) -> frozenset[Needed]:  # type: ignore[override]  # of the class
        """The old policy's log-probs, and those of the KL's anchor."""
        return frozenset({"old", self.kl_anchor}) if self.kl_coef > 0 else frozenset({"old"})

    def mask(self, experience: Experience) -> Tensor:
        """Also without completions that were cut off, under ``mask_truncated``."""
        mask_NT = super().mask(experience)
        return mask_NT & ~experience.completions.truncated_N[:, None] if self.mask_truncated else mask_NT

    def active(self, experience: Experience) -> Tensor:
        """Without a KL term only groups that have an advantage."""
        if self.kl_coef > 0:
            return super().active(experience)
        return experience.advantages.reshape(len(experience), -1).ne(0).any(-1).cpu()

    def denominator(self, experience: Experience, mask_NT: Tensor) -> Tensor:
        """See the module docstring."""
        if self.aggregation == "constant":
            return torch.tensor(float(len(mask_NT) * experience.max_new_tokens), device=mask_NT.device)
        if self.aggregation == "sequence":
            return (mask_NT.any(-1) * experience.weights_N).sum()
        return super().denominator(experience, mask_NT)

    def __call__(self, logprobs_NT: Tensor, experience: Experience, mask_NT: Tensor, total: Tensor) -> Loss:
        """See ``policy_loss``."""
        loss, sums = policy_loss(
            logprobs_NT,
            experience.old_logprobs_NT,
            experience.reference_logprobs_NT,
            experience.advantages,
            mask_NT,
            config=self,
            denominator=total,
            sampler_logprobs_NT=experience.completions.sampler_logprobs_NT,
            iterate_logprobs_NT=experience.iterate_logprobs_NT,
            weights_N=experience.weights_N,
        )
        return Loss(loss, {name: Mean(value, mask_NT.sum()) for name, value in sums.items()})


_CHOICES = {
    "kl_anchor": ("reference", "iterate"),
    "aggregation": get_args(Aggregation),
    "importance_sampling": get_args(ImportanceSampling),
    "kl_estimator": get_args(KLEstimator),
    "token_weight": get_args(TokenWeight),
    "sampler_correction": get_args(SamplerCorrection),
}


def clipped_surrogate(ratio_NT: Tensor, advantages_NT: Tensor, config: ClippedSurrogate) -> Tensor:
    """min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), PPO eq. 7; asymmetric as in DAPO (arXiv 2503.14476
    eq. 10).

    With ``clip_ceiling`` the first r is min(r, ceiling), which bounds the loss where A < 0 (two-sided clip of
    INTELLECT-2, arXiv 2505.07291 sec. 3.4). It is 0 where A is, also for an infinite ratio.
    """
    capped_NT = ratio_NT if config.clip_ceiling is None else ratio_NT.clamp(max=config.clip_ceiling)
    clipped_NT = ratio_NT.clamp(1 - config.clip_low, 1 + config.clip_high)
    surrogate_NT = torch.minimum(capped_NT * advantages_NT, clipped_NT * advantages_NT)
    return surrogate_NT.masked_fill(advantages_NT == 0, 0.0)


def policy_loss(
    logprobs_NT: Tensor,
    old_logprobs_NT: Tensor | None,
    reference_logprobs_NT: Tensor | None,
    advantages: Tensor,
    mask_NT: Tensor,
    *,
    config: ClippedSurrogate,
    denominator: Tensor,
    sampler_logprobs_NT: Tensor | None = None,
    iterate_logprobs_NT: Tensor | None = None,
    weights_N: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one micro-batch (see the module docstring) and its metrics.

    Args:
        logprobs_NT: of the policy, with gradient.
        old_logprobs_NT: of the policy that sampled; None means on-policy, a ratio of 1 that carries the
            gradient.
        reference_logprobs_NT: of the frozen reference; needed if the KL holds to it, else only logged.
        advantages: one per completion [N] or per token [N, T].
        mask_NT: the output of ``Objective.mask``. Whatever stands outside it (NaN too) reaches neither loss nor
            gradient.
        config: the loss.
        denominator: of the whole optimiser minibatch, over all its micro-batches and ranks. 0 gives a loss of
            0.
        iterate_logprobs_NT: of the policy some updates ago; needed if the KL holds to it.
        weights_N: how much each completion counts; None: in full.

    Returns:
        The scalar loss, and detached float32 SUMS over unmasked tokens, to be divided by the number of those:
        ``ratio``, ``clip_low_fraction`` and ``clip_high_fraction`` (tokens whose gradient the clip stopped),
        ``clip_ceiling_fraction`` if set, ``sampler_ratio`` (the correction) with a cap, and ``kl`` (k3 to the
        reference, whatever the loss uses) if one is given.
    """
    anchor_NT = reference_logprobs_NT if config.kl_anchor == "reference" else iterate_logprobs_NT
    if anchor_NT is None and config.kl_coef > 0:
        raise ValueError(
            f"kl_coef={config.kl_coef} needs the {config.kl_anchor}'s log-probs, which are missing. Set it to 0."
        )
    if sampler_logprobs_NT is None and config.sampler_correction_cap is not None:
        raise ValueError(
            f"sampler_correction_cap={config.sampler_correction_cap} needs the sampler's log-probs, which this engine "
            "does not give. Set it to null."
        )
    mask_NT = mask_NT.bool()
    logprobs_NT = clean(logprobs_NT, mask_NT)
    old_NT = logprobs_NT.detach() if old_logprobs_NT is None else clean(old_logprobs_NT.detach(), mask_NT)
    advantages_NT = advantages.unsqueeze(-1).expand(mask_NT.shape) if advantages.dim() == 1 else advantages
    advantages_NT = clean(advantages_NT.detach(), mask_NT)
    weights_T = token_weights(mask_NT.shape[1], config.token_weight, device=mask_NT.device)

    ratio_NT = importance_ratio(logprobs_NT, old_NT, mask_NT, config.importance_sampling)
    loss_NT = -clipped_surrogate(ratio_NT, advantages_NT * weights_T, config)
    sampled_NT = None
    if sampler_logprobs_NT is not None and config.sampler_correction_cap is not None:
        sampler_NT = clean(sampler_logprobs_NT, mask_NT)
        correction = config.sampler_correction_cap, config.sampler_correction
        sampled_NT = sampler_correction(old_NT, sampler_NT, mask_NT, *correction).expand_as(loss_NT)
        loss_NT = loss_NT * sampled_NT
    metrics_NT = _clip_metrics(ratio_NT.detach(), advantages_NT, config)
    if sampled_NT is not None:
        metrics_NT["sampler_ratio"] = sampled_NT
    if reference_logprobs_NT is not None:
        metrics_NT["kl"] = kl_k3(logprobs_NT.detach(), clean(reference_logprobs_NT.detach(), mask_NT))
    if anchor_NT is not None and config.kl_coef > 0:
        estimator = kl_k3 if config.kl_estimator == "k3" else kl_k2
        loss_NT = loss_NT + config.kl_coef * estimator(logprobs_NT, clean(anchor_NT.detach(), mask_NT))
    if config.aggregation == "sequence":
        loss_NT = loss_NT / lengths(mask_NT)
    if weights_N is not None:
        loss_NT = loss_NT * weights_N[:, None]
    total = torch.where(mask_NT, loss_NT, 0.0).sum()
    loss = total / torch.where(denominator > 0, denominator, 1.0)
    return loss, {k: torch.where(mask_NT, v.float(), 0.0).sum() for k, v in metrics_NT.items()}


def _clip_metrics(ratio_NT: Tensor, advantages_NT: Tensor, config: ClippedSurrogate) -> dict[str, Tensor]:
    """[N, T] each: the ratio, and where a clip stops the gradient."""
    metrics_NT = {
        "ratio": ratio_NT,
        "clip_low_fraction": (ratio_NT < 1 - config.clip_low) & (advantages_NT < 0),
        "clip_high_fraction": (ratio_NT > 1 + config.clip_high) & (advantages_NT > 0),
    }
    if config.clip_ceiling is not None:
        metrics_NT["clip_ceiling_fraction"] = (ratio_NT > config.clip_ceiling) & (advantages_NT < 0)
    return metrics_NT
