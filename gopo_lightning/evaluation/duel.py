"""Which of several policies wins, by a judge, on the same prompts. Wiring without a command line.

The share of A on a prompt is the mean over all pairs (a completion of A, one of B) that the judge answers: 1 a win, ½ a
tie, 0 a loss; equal texts tie unasked. A prompt without any answer has no share. The win rate is the mean share.

Suffixes: n prompts, K policies.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gopo_lightning.evaluation.bootstrap import Floats, authors_interval, cluster_bootstrap, on_grid
from gopo_lightning.evaluation.duels.asking import Answer, Asker, Pair
from gopo_lightning.evaluation.intervals import Interval
from gopo_lightning.types import Prompt

FEWEST_PROMPTS = 20


@dataclass(frozen=True)
class DuelResult:
    """A against B."""

    win_rate: Interval
    """Of A, with the 95 % interval over prompts."""
    authors: Interval
    """The interval of the paper's code, of 25 draws of 25 prompts."""
    shares: Mapping[int, float]
    """Of A, by the prompt's index."""
    num_unanswered: int
    """Prompts without a share: the judge abstained on all their pairs."""
    num_pairs: int
    """That have an answer."""
    num_ties: int
    """Of these: equal texts, and what the judge calls a tie or decides by position alone."""
    num_abstained: int
    """Pairs without an answer."""
    first_bias: float
    """Mean of W_xy + W_yx − 1 over the pairs that were asked in both orders: above 0 the judge prefers what it reads
    first. NaN where none was."""


@dataclass(frozen=True)
class _Tally:
    """Pairs of one prompt and two policies, with A as the first."""

    wins: tuple[float, ...]
    biases: tuple[float, ...]
    abstained: int

    @property
    def share(self) -> float:
        """On the grid; NaN without an answer."""
        return float(on_grid(np.array(sum(self.wins) / len(self.wins)))) if self.wins else math.nan


def duels(
    prompts: Sequence[Prompt],
    groups: Sequence[Sequence[Sequence[str]]],
    asker: Asker,
    *,
    prompts_per_call: int = 16,
    draws: int = 4000,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[dict[tuple[int, int], DuelResult], Floats]:
    """Each policy against each other one.

    Args:
        prompts: n prompts.
        groups: for each the completions of K policies; their numbers may differ.
        asker: the judge.
        prompts_per_call: what an interruption loses at most.
        draws: of the bootstrap.
        seed: of the bootstrap.
        progress: called with the number of prompts that are done, and of all.

    Returns:
        Results of (i, j) with i < j, and shares_nKK, NaN where there is no answer.

    Raises:
        ValueError: a judge that answers nothing at all about two policies.
        SourceConfigError: from the judge.
        RuntimeError: the judge raised.
    """
    K = len(groups[0])
    tallies: dict[tuple[int, int], list[_Tally]] = {pair: [] for pair in itertools.combinations(range(K), 2)}
    for start in range(0, len(prompts), prompts_per_call):
        part = slice(start, start + prompts_per_call)
        for texts, answers in zip(groups[part], asker.ask(prompts[part], groups[part]), strict=True):
            names = [[asker.name_of(text) for text in group] for group in texts]
            for (i, j), found in tallies.items():
                found.append(_tally(names[i], names[j], answers))
        progress(min(start + prompts_per_call, len(prompts)), len(prompts))
    if len(prompts) < FEWEST_PROMPTS:
        warnings.warn(
            f"a duel on {len(prompts)} prompts: with fewer than {FEWEST_PROMPTS} the interval is wide, and may be too "
            "narrow all the same. Let the policies answer more prompts; more completions of these help little.",
            stacklevel=2,
        )
    results = {pair: _result(prompts, found, asker.source.name, draws, seed) for pair, found in tallies.items()}
    shares_nKK = np.full((len(prompts), K, K), math.nan)
    for (i, j), found in tallies.items():
        shares_nKK[:, i, j] = [tally.share for tally in found]
        shares_nKK[:, j, i] = 1.0 - shares_nKK[:, i, j]
    return results, shares_nKK


def _tally(first: Sequence[str], second: Sequence[str], answers: Mapping[Pair, Answer]) -> _Tally:
    wins, biases, abstained = [], [], 0
    for a, b in itertools.product(first, second):
        if a == b:
            wins.append(0.5)
            continue
        answer = answers[min(a, b), max(a, b)]
        if math.isnan(low_wins := answer.low_wins):
            abstained += 1
            continue
        low_share = float(on_grid(np.array(low_wins)))  # so 1 − it, and sums of either, are exact
        wins.append(low_share if a < b else 1.0 - low_share)
        if not math.isnan(answer.first_bias):
            biases.append(answer.first_bias)
    return _Tally(tuple(wins), tuple(biases), abstained)


def _result(prompts: Sequence[Prompt], tallies: Sequence[_Tally], judge: str, draws: int, seed: int) -> DuelResult:
    shares = {
        prompt.index: tally.share for prompt, tally in zip(prompts, tallies, strict=True) if not math.isnan(tally.share)
    }
    abstained = sum(tally.abstained for tally in tallies)
    if not shares:
        raise ValueError(
            f"judge '{judge}' abstained on all {abstained} pairs of {len(prompts)} prompts, so there is no win rate. "
            "A LocalJudge abstains on questions longer than its max_length, an LLMJudge where a reply has no verdict, "
            "and scores do so where they are None or NaN."
        )
    values = np.array(list(shares.values()))
    wins = [win for tally in tallies for win in tally.wins]
    biases = [bias for tally in tallies for bias in tally.biases]
    return DuelResult(
        cluster_bootstrap(values, draws, seed),
        authors_interval(values, seed=seed),
        shares,
        len(prompts) - len(shares),
        len(wins),
        wins.count(0.5),
        abstained,
        math.fsum(biases) / len(biases) if biases else math.nan,
    )
