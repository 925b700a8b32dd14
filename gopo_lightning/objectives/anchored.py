"""Log-ratios of whole completions to a frozen policy, and the metrics of objectives that read them. Pure.

Shape legend: see `types.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from gopo_lightning.objectives.base import Mean, Needed
from gopo_lightning.objectives.estimators import clean, kl_k3, lengths
from gopo_lightning.objectives.pairing import GroupObjective
from gopo_lightning.types import Experience

Anchor = Literal["reference", "old", "iterate"]


@dataclass(frozen=True)
class AnchoredObjective(GroupObjective):
    """A `GroupObjective` of log-ratios to an anchor."""

    anchor: Anchor = "reference"
    """What log-ratios are taken to: reference, the policy of step 0; old, the policy that sampled; or iterate, the
    policy some updates ago (`objective.iterate_every`)."""
    reference_share: float = 0.0
    """The anchor is a geometric mean of reference and ``anchor``, with this exponent for the reference: INPO's τ/η."""
    length_normalised: bool = False
    """Divide a completion's log-ratio by its tokens."""

    def __post_init__(self) -> None:
        """Raise ValueError on a value out of its range."""
        check_choices(self, {"anchor": get_args(Anchor)})
        if not 0 <= self.reference_share <= 1:
            raise ValueError(f"reference_share={self.reference_share} must lie in [0, 1]; use 0 for the anchor alone.")
        if self.anchor == "reference" and self.reference_share:
            raise ValueError(
                f"reference_share={self.reference_share} has no effect with anchor=reference. Leave it out, or use "
                "anchor: old or iterate."
            )

    @property
    def needs(self) -> frozenset[Needed]:  # type: ignore[override]  # of the class
        """The log-probs of the anchors."""
        return frozenset(name for name, share in self.shares.items() if share > 0)

    @property
    def shares(self) -> dict[Anchor, float]:
        """What each anchor counts."""
        return {self.anchor: 1 - self.reference_share} | (
            {"reference": self.reference_share} if self.anchor != "reference" else {}
        )

    def logratios(self, logprobs_NT: Tensor, experience: Experience, mask_NT: Tensor) -> Tensor:
        """d_PG."""
        old_NT = experience.old_logprobs_NT
        anchors: dict[str, Tensor | None] = {
            "old": logprobs_NT.detach() if old_NT is None else old_NT,
            "reference": experience.reference_logprobs_NT,
            "iterate": experience.iterate_logprobs_NT,
        }
        shares = {str(name): share for name, share in self.shares.items()}
        d_N = logratios(logprobs_NT, anchors, shares, mask_NT, length_normalised=self.length_normalised)
        return d_N.view(-1, experience.group_size)


def logratios(
    logprobs_NT: Tensor,
    anchors_NT: Mapping[str, Tensor | None],
    shares: Mapping[str, float],
    mask_NT: Tensor,
    *,
    length_normalised: bool = False,
) -> Tensor:
    """[N] Σ_t (log policy − Σ_a share_a · log anchor_a) over a completion's unmasked tokens.

    Args:
        logprobs_NT: of the policy, with gradient.
        anchors_NT: log-probs of frozen policies by name.
        shares: what each counts; they sum to 1 where there is an anchor at all.
        mask_NT: bool.
        length_normalised: divide by the number of tokens.

    Raises:
        ValueError: an anchor with a share is missing.
    """
    ratio_NT = clean(logprobs_NT, mask_NT)
    for name, share in shares.items():
        if share == 0:
            continue
        anchor_NT = anchors_NT[name]
        if anchor_NT is None:
            raise ValueError(f"the objective needs the {name}'s log-probs, which are missing. Give them.")
        ratio_NT = ratio_NT - share * clean(anchor_NT.detach(), mask_NT)
    return ratio_NT.sum(-1) / (lengths(mask_NT).squeeze(-1) if length_normalised else 1)


def pair_metrics(m_PGG: Tensor, prefers_PGG: Tensor, weights_PGG: Tensor) -> dict[str, Mean]:
    """Over the pairs that count and have a better side: how often and by how many nats its log-ratio is the higher."""
    better_PGG = ((prefers_PGG > 0.5) & (weights_PGG > 0)).to(m_PGG.device)
    right_PGG = ((m_PGG > 0).double() + (m_PGG >= 0).double()) / 2
    count = better_PGG.sum()
    return {
        "pair_accuracy": Mean(right_PGG[better_PGG].sum(), count),
        "pair_margin": Mean(m_PGG[better_PGG].sum(), count),
    }


def token_metrics(logprobs_NT: Tensor, experience: Experience, mask_NT: Tensor) -> dict[str, Mean]:
    """``logprob``, mean over unmasked tokens, and ``kl`` to the reference (k3), if one is given."""
    count, logprobs_NT = mask_NT.sum(), clean(logprobs_NT.detach(), mask_NT)
    metrics = {"logprob": Mean(logprobs_NT.sum(), count)}
    if experience.reference_logprobs_NT is not None:
        reference_NT = clean(experience.reference_logprobs_NT, mask_NT)
        metrics["kl"] = Mean(kl_k3(logprobs_NT, reference_NT).sum(), count)
    return metrics


def check_choices(config: object, choices: Mapping[str, tuple[str, ...]]) -> None:
    """ValueError for a field that is none of its choices."""
    for name, values in choices.items():
        if getattr(config, name) not in values:
            raise ValueError(f"{name}={getattr(config, name)!r} is unknown; choose one of {list(values)}.")
