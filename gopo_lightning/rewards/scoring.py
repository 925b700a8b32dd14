"""Whole groups through all sources, scalar and pairwise. Shape legend: `types.py`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gopo_lightning.distributed.collectives import all_or_none, all_reduce_sum
from gopo_lightning.objectives.advantages import preferences, without_noise
from gopo_lightning.rewards.base import RewardSource, SourceConfigError, score
from gopo_lightning.rewards.early import EarlyQuestions
from gopo_lightning.rewards.metrics import win_rate, wins_metrics
from gopo_lightning.rewards.pairwise import Groups, PairwiseSource, check_wins, content, tie_copies
from gopo_lightning.rewards.time_limit import time_limit
from gopo_lightning.types import Prompt

Source: TypeAlias = RewardSource | PairwiseSource


@dataclass(frozen=True)
class GroupScores:
    """What the K sources say about P groups of G completions."""

    rewards_PGK: Tensor
    """float64, on the CPU. The column of a pairwise source is each completion's share of wins, in [0, 1]."""
    wins_PGGK: Tensor | None
    """float64 comparison matrices, all NaN for a scalar source; None where no source compared."""


def score_groups(
    sources: Sequence[Source],
    prompts: Sequence[Prompt],
    groups: Groups,
    *,
    compare: bool = True,
    timeout_seconds: float | None = None,
    early: EarlyQuestions | None = None,
) -> GroupScores:
    """Scores and comparisons of P groups.

    Args:
        sources: the K sources.
        prompts: P prompts.
        groups: G completions of each.
        compare: false asks the pairwise sources nothing: their columns are NaN.
        timeout_seconds: longest time for one source; None waits for ever.
        early: where sources that wait are asked about the groups meanwhile, as far as they have not been yet.

    A collective: all ranks ask the same sources.

    Raises:
        TimeoutError: a source took longer.
        PeerError: a source failed on another rank.
        RuntimeError: a source raised or returned something malformed; names the source and a prompt.
    """
    P, G = len(groups), len(groups[0])
    prompts_N = [prompt for prompt in prompts for _ in range(G)]
    texts_N = [text for group in groups for text in group]
    unasked = torch.full((P, G, G), torch.nan, dtype=torch.float64)
    columns, matrices = [], []
    for source in sources:
        with _asking(source, timeout_seconds):
            if early:
                for p, group in enumerate(groups):
                    early.add(p, group)
                early.wait_for(source)
            if isinstance(source, RewardSource):
                columns.append(score([source], prompts_N, texts_N).view(P, G))
                matrices.append(unasked)
            else:
                matrices.append(_wins(source, prompts, groups) if compare else unasked)
                columns.append(win_share(matrices[-1]))
    compared = compare and any(isinstance(source, PairwiseSource) for source in sources)
    return GroupScores(torch.stack(columns, -1), torch.stack(matrices, -1) if compared else None)


def win_share(wins_PGG: Tensor) -> Tensor:
    """float64 share_PG in [0, 1]: the mean preference over the others it was compared with; NaN for none."""
    return without_noise(preferences(wins_PGG).nanmean(-1))


@dataclass(frozen=True)
class Standing:
    """How completions stand against reference completions of the same prompts."""

    rewards_PGK: Tensor
    """The sources' scores; the column of a pairwise source is the share of wins against the references."""
    rewards_PG: Tensor
    """Combined over completions and references as one group, for some combinations rank within the group."""
    win_rate_P: Tensor
    """Share of (completion, reference) pairs that the completion wins, ties half; NaN where none can be compared."""
    win_rate_PK: Tensor
    """The same by each source alone."""


def against_reference(
    sources: Sequence[Source],
    combine: Callable[[Tensor], Tensor],
    prompts: Sequence[Prompt],
    groups: Groups,
    rewards_PGK: Tensor,
    references: Groups,
    references_PRK: Tensor,
    *,
    timeout_seconds: float | None = None,
) -> Standing:
    """Compare completions with references, by combined reward, or directly where the only source is pairwise.

    Args:
        sources: the K sources. A pairwise one is asked about each completion with each reference. Beside other
            sources its score of a reference is the share of wins against the completions.
        combine: rewards_PGK → rewards_PG.
        prompts: P prompts.
        groups: G completions of each.
        rewards_PGK: their scores; the columns of pairwise sources are not read.
        references: R reference completions of each.
        references_PRK: their scores, likewise.
        timeout_seconds: longest time for one source; None waits for ever.

    A collective, like `score_groups`, and with its errors.
    """
    columns = []
    for k, source in enumerate(sources):
        references_PR = references_PRK[..., k]
        if isinstance(source, RewardSource):
            references_PR = _as_copies(rewards_PGK[..., k], groups, references_PR, references, source.reads_endings)
        columns.append(torch.cat([rewards_PGK[..., k], references_PR], dim=1))
    G = rewards_PGK.shape[1]
    win_rates = [win_rate(column[:, :G], column[:, G:]) for column in columns]
    for k, source in enumerate(sources):
        if isinstance(source, PairwiseSource):
            with _asking(source, timeout_seconds):
                wins_PGR = _versus(source, prompts, groups, references).to(rewards_PGK)
            columns[k] = without_noise(torch.cat([wins_PGR.nanmean(2), 1 - wins_PGR.nanmean(1)], dim=1))
            win_rates[k] = without_noise(wins_PGR.nanmean((1, 2)))
    joint_PGK = torch.stack(columns, -1)
    with all_or_none("combining the rewards"):
        joint_PG = combine(joint_PGK)
    direct = len(sources) == 1 and isinstance(sources[0], PairwiseSource)
    win_rate_P = win_rates[0] if direct else win_rate(joint_PG[:, :G], joint_PG[:, G:])
    return Standing(joint_PGK[:, :G], joint_PG[:, :G], win_rate_P, torch.stack(win_rates, -1))


def _as_copies(
    rewards_PG: Tensor, groups: Groups, references_PR: Tensor, references: Groups, reads_endings: bool
) -> Tensor:
    """references_PR, where a reference that equals a completion has its score.

    A model that scored both in different batches gives numbers that differ in the last digits, and nobody wins there.
    """
    references_PR = references_PR.clone()
    for p, (group, others) in enumerate(zip(groups, references, strict=True)):
        number = {content(text, reads_endings): g for g, text in enumerate(group)}
        for r, text in enumerate(others):
            if (g := number.get(content(text, reads_endings))) is not None:
                references_PR[p, r] = rewards_PG[p, g]
    return references_PR


@contextmanager
def _asking(source: Source, timeout_seconds: float | None) -> Iterator[None]:
    """All calls of ``source`` for a batch: they do not hang, and an error on one rank is one on all. A collective."""
    what = f"reward source '{source.name}'"
    waits = isinstance(source, PairwiseSource) and source.waits_for_people
    with all_or_none(what), time_limit(None if waits else timeout_seconds, what):
        yield


def _wins(source: PairwiseSource, prompts: Sequence[Prompt], groups: Groups) -> Tensor:
    def ask() -> Tensor:
        wins_PGG = check_wins(source(prompts, groups), len(groups), len(groups[0]), source.tolerance)
        return tie_copies(wins_PGG, groups, source.reads_endings)

    return _guarded(source, prompts, ask)


def _versus(source: PairwiseSource, prompts: Sequence[Prompt], groups: Groups, references: Groups) -> Tensor:
    return _guarded(source, prompts, lambda: source.versus(prompts, groups, references))


def _guarded(source: PairwiseSource, prompts: Sequence[Prompt], call: Callable[[], Tensor]) -> Tensor:
    """``call``; an exception names the source. No prompt is singled out: asking again may cost money."""
    try:
        return call()
    except SourceConfigError:
        raise
    except Exception as error:
        raise RuntimeError(
            f"pairwise source '{source.name}' raised {type(error).__name__}: {error}\nThe batch's first prompt: row "
            f"{prompts[0].index}: {prompts[0].text!r}"
        ) from error


def reads_wins(
    sources: Sequence[Source],
    advantage: str,
    options: Mapping[str, Any] | None,
    combine: str = "weighted_sum",
    combine_options: Mapping[str, Any] | None = None,
) -> bool:
    """Whether the ordinal advantage reads comparison matrices: the only source is pairwise.

    Raises:
        ValueError: it does, and options are given, or a combination, which would act on the reward alone.
    """
    if len(sources) != 1 or not isinstance(sources[0], PairwiseSource) or advantage != "ordinal":
        return False
    if options:
        raise ValueError(
            f"objective.advantage has init_args {dict(options)}: comparisons have no such option, ties are ½. "
            "Remove them."
        )
    if combine != "weighted_sum" or combine_options:
        raise ValueError(
            f"rewards.combine={combine} with init_args {dict(combine_options or {})}: the only source, "
            f"'{sources[0].name}', gives comparisons, and the ordinal advantage reads these: nothing is to be "
            "combined. Remove it, or turn the source's own answers round for a negative weight."
        )
    return True


def comparison_metrics(sources: Sequence[Source], wins_PGGK: Tensor) -> dict[str, Tensor]:
    """Ties, cycles and running totals of every pairwise source. A collective: sums over ranks."""
    metrics: dict[str, Tensor] = {}
    for k, source in enumerate(sources):
        if isinstance(source, PairwiseSource):
            metrics |= wins_metrics(wins_PGGK[..., k], source.name) | counter_metrics(source, wins_PGGK.device)
    return metrics


def counter_metrics(source: Source, device: torch.device) -> dict[str, Tensor]:
    """Running totals of ``source``. A collective: sums over ranks, on ``device``."""
    counts = source.counters()
    totals = all_reduce_sum(torch.tensor(list(counts.values()), dtype=torch.float64, device=device)) if counts else ()
    return {f"reward/{source.name}/{key}": total for key, total in zip(counts, totals, strict=True)}
