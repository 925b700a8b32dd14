"""Smaller steps on prompts whose completions scatter in meaning."""

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from gopo_lightning.objectives.base import Mean, Needed
from gopo_lightning.objectives.named import check_choice
from gopo_lightning.rollout.clusters import Clusters, SameText
from gopo_lightning.rollout.transforms import Context, Transform, mean_of
from gopo_lightning.types import Experience, Rollout

R = TypeVar("R", bound=Rollout)
Mass = Literal["count", "likelihood"]
Estimator = Literal["shannon", "monte_carlo"]
Form = Literal["linear", "exp", "focal"]


class SemanticEntropy(Transform):
    """A · f(α · SE / log G), SE the entropy of a group over clusters of the same meaning: SEED-GRPO (arXiv 2505.12346).

    The factor is one a group and never negative: it turns no sign and changes no order. A group that agrees has SE 0,
    and its advantages stay bit for bit; one of all different meanings has SE log G. Completions without a valid reward,
    or of weight 0, are not counted, in G neither: this stands before transforms that filter.

    Departures: the paper's formulas were read in others' accounts of it. Its α was not to be read; ½ is ours, and so
    are the forms of f under its names. ``monte_carlo`` gives rare clusters the weight of large ones: of 7 and 1 it
    makes 0.53 log 8, Shannon's entropy 0.18 log 8.

    Args:
        clusters: which completions mean the same; those of the same text when null.
        mass: probability of a cluster: ``count``, its share of the completions, or ``likelihood``, its share of their
            probabilities under the policy that sampled, as means over tokens (else the shortest has it all).
        estimator: ``shannon``, −Σ p log p, or ``monte_carlo``, −mean of log p over the clusters.
        form: f(x): ``linear`` 1 − x, ``exp`` e^−x, ``focal`` (1 − x)^γ.
        alpha: α in (0, 1].
        gamma: γ > 0 of focal; 2 when null.
    """

    position = "advantages"

    def __init__(
        self,
        clusters: Clusters | None = None,
        mass: Mass = "count",
        estimator: Estimator = "shannon",
        form: Form = "linear",
        alpha: float = 0.5,
        gamma: float | None = None,
    ) -> None:
        for name, value, kind in (("mass", mass, Mass), ("estimator", estimator, Estimator), ("form", form, Form)):
            check_choice(name, value, get_args(kind))
        if not 0 < alpha <= 1:
            raise ValueError(
                f"alpha={alpha} of SemanticEntropy must lie in (0, 1]. Leave the transform out for none; above 1 "
                "advantages would change their sign."
            )
        if gamma is not None and (form != "focal" or not 0 < gamma < math.inf):
            raise ValueError(f"gamma={gamma} of SemanticEntropy is an exponent above 0 of form: focal. Leave it out.")
        self.clusters = SameText() if clusters is None else clusters
        self.mass, self.estimator, self.form = mass, estimator, form
        self.alpha, self.gamma = alpha, gamma
        self._measured: dict[str, Mean] = {}

    @property
    def needs(self) -> frozenset[Needed]:  # type: ignore[override]  # of the class
        """The sampler's log-probs, for likelihood."""
        return frozenset({"old"} if self.mass == "likelihood" else ())

    def __call__(self, rollout: R, context: Context) -> R:
        """Smaller advantages."""
        assert isinstance(rollout, Experience)
        G, counts_N = rollout.group_size, (rollout.weights_N > 0).tolist()
        groups = rollout.completions.groups(G)
        labels_PG = self.clusters.labels(rollout.prompts.prompts, groups, rollout.completions.mask_NT.device)
        masses_N = self._masses(rollout)
        shares, sizes = [], []
        for p, labels in enumerate(labels_PG):
            counted = [g for g in range(G) if counts_N[p * G + g]]
            p_K = cluster_masses([labels[g] for g in counted], [masses_N[p * G + g] for g in counted])
            shares.append(entropy_share(p_K, len(counted), self.estimator))
            sizes.append(len(p_K))
        share_P = torch.tensor(shares, dtype=torch.float64)
        self._measured = {
            "semantic_entropy": mean_of(share_P),
            "semantic_clusters": mean_of(torch.tensor(sizes, dtype=torch.float64)),
        }
        scale_P = factor(share_P, self.form, self.alpha, 2.0 if self.gamma is None else self.gamma)
        return replace(rollout, advantages_PG=rollout.advantages_PG * scale_P[:, None].to(rollout.advantages_PG))

    def metrics(self) -> Mapping[str, Mean]:
        """Mean SE / log G and number of clusters of all groups."""
        return self._measured

    def _masses(self, experience: Experience) -> list[float]:
        """N numbers above 0, in proportion to the completions' masses within their groups."""
        if self.mass == "count":
            return [1.0] * len(experience.completions)
        assert experience.old_logprobs_NT is not None
        mask_NT = experience.completions.mask_NT
        logprob_N = experience.old_logprobs_NT.masked_fill(~mask_NT, 0.0).sum(-1) / mask_NT.sum(-1).clamp(min=1)
        logprob_PG = logprob_N.cpu().double().view(-1, experience.group_size)
        return (logprob_PG - logprob_PG.amax(-1, keepdim=True)).exp().flatten().tolist()


def cluster_masses(labels: Sequence[Hashable | None], masses: Sequence[float]) -> list[float]:
    """Probabilities of the clusters, which add up to 1; None is a cluster of its own.

    >>> cluster_masses(["a", "b", "a", None, None], [1.0] * 5)
    [0.4, 0.2, 0.2, 0.2]
    """
    members: dict[Hashable, list[float]] = defaultdict(list)
    for n, (label, mass) in enumerate(zip(labels, masses, strict=True)):
        members[(n,) if label is None else (None, label)].append(mass)
    total = math.fsum(masses)
    return [math.fsum(cluster) / total for cluster in members.values()]


def entropy_share(p_K: Sequence[float], num_completions: int, estimator: Estimator) -> float:
    """SE / log G in [0, 1], G = ``num_completions``; 0 for fewer than two.

    >>> round(entropy_share([5 / 8, 2 / 8, 1 / 8], 8, "shannon"), 6), entropy_share([1.0], 8, "shannon")
    (0.432932, 0.0)
    """
    if len(p_K) < 2:
        return 0.0
    weights_K = p_K if estimator == "shannon" else [1 / len(p_K)] * len(p_K)
    entropy = -math.fsum(w * math.log(max(p, 1e-300)) for w, p in zip(weights_K, p_K, strict=True))
    return min(entropy / math.log(num_completions), 1.0)


def factor(share_P: Tensor, form: Form, alpha: float, gamma: float) -> Tensor:
    """f(α · share) in [0, 1]."""
    x_P = alpha * share_P
    return (-x_P).exp() if form == "exp" else (1 - x_P) ** (1.0 if form == "linear" else gamma)
