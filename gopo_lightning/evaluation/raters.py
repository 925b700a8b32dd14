"""How far people agree who have ordered the same groups."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from gopo_lightning.evaluation.bootstrap import cluster_bootstrap
from gopo_lightning.evaluation.intervals import Interval
from gopo_lightning.human.verdicts import Verdict
from gopo_lightning.rewards.metrics import rank_correlation


@dataclass(frozen=True)
class Agreement:
    """Of two raters, on the groups that both have ordered; intervals are over these."""

    raters: tuple[str, str]
    num_groups: int
    """That both have ordered."""
    tau: Interval | None
    """Kendall's τ-b within a group, in [−1, 1]: none where either ties throughout. None: no group has one."""
    pairs: Interval | None
    """Share of the pairs of completions that both order alike; a tie of one rater counts half, and pairs that both tie
    do not count. Chance gives ½. None: no group has such a pair."""


def agreements(verdicts: Iterable[Verdict]) -> list[Agreement]:
    """Of every two raters who have a group in common.

    Raises:
        ValueError: two verdicts of one rater on one group.
    """
    raters: dict[str, dict[object, Verdict]] = {}
    for verdict in verdicts:
        group = (verdict.group.turns, frozenset(verdict.group.completions))
        own = raters.setdefault(verdict.rater, {})
        if group in own and _ranks(own[group]) != _ranks(verdict):
            raise ValueError(
                f"two different verdicts of rater {verdict.rater!r} on the prompt {verdict.group.turns[-1][1][:60]!r}. "
                "Name each person once, by --rater or in the column `rater`."
            )
        own[group] = verdict
    found = []
    for a, b in combinations(sorted(raters), 2):
        both = [(raters[a][group], raters[b][group]) for group in raters[a] if group in raters[b]]
        if both:
            found.append(_agreement((a, b), both))
    return found


def _agreement(raters: tuple[str, str], both: Sequence[tuple[Verdict, Verdict]]) -> Agreement:
    taus, shares = [], []
    for first, second in both:
        ranks = _ranks(second)
        x_M = torch.tensor(first.ranks, dtype=torch.float64)
        y_M = torch.tensor([ranks[text] for text in first.group.completions], dtype=torch.float64)
        taus.append(float(rank_correlation(x_M[None], y_M[None])))
        shares.append(float(pair_agreement(x_M, y_M)))
    tau = _interval([(value + 1) / 2 for value in taus])
    if tau is not None:
        tau = Interval(2 * tau.mean - 1, 2 * tau.low - 1, 2 * tau.high - 1, tau.n)
    return Agreement(raters, len(both), tau, _interval(shares))


def pair_agreement(x_M: Tensor, y_M: Tensor) -> Tensor:
    """Share of pairs ordered alike; a tie in one is ½, pairs tied in both do not count. NaN where none counts.

    >>> float(pair_agreement(torch.tensor([1, 2, 3]), torch.tensor([1, 3, 3])))  # 1, 1 and a half
    0.8333333333333334
    """
    i, j = torch.triu_indices(len(x_M), len(x_M), 1)
    x, y = (x_M[i] - x_M[j]).sign(), (y_M[i] - y_M[j]).sign()
    return (0.5 + 0.5 * (x * y).double())[(x != 0) | (y != 0)].mean()


def _ranks(verdict: Verdict) -> Mapping[str, float]:
    return dict(zip(verdict.group.completions, verdict.ranks, strict=True))


def _interval(shares: Sequence[float]) -> Interval | None:
    """Over the shares that are numbers."""
    kept = [min(max(share, 0.0), 1.0) for share in shares if share == share]
    return cluster_bootstrap(kept) if kept else None


def as_text(found: Sequence[Agreement]) -> str:
    """A line for every two raters."""
    return "\n".join(
        f"{a.raters[0]} and {a.raters[1]}: Kendall’s τ-b {_said(a.tau, '+.2f')}, pairs ordered alike "
        f"{_said(a.pairs, '.2f')}, on {a.num_groups} prompt{'' if a.num_groups == 1 else 's'}"
        for a in found
    )


def _said(interval: Interval | None, form: str) -> str:
    if interval is None:
        return "–"
    bounds = f" [{interval.low:{form}}, {interval.high:{form}}]" if interval.n > 1 else ""
    return f"{interval.mean:{form}}{bounds}"
