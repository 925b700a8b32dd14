"""Asks a judge about pairs of texts, each pair once, and keeps the answers.

A pair has no first and no second policy here: its texts are put in an order of their own (*low*, *high*), so that B
against A asks what A against B has asked, and the answers are the same numbers.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from gopo_lightning.evaluation.duels import Orders
from gopo_lightning.rewards import PairComparator, PairwiseSource, RewardSource, Source, SourceConfigError, score
from gopo_lightning.rewards.base import as_tensor
from gopo_lightning.rewards.pairwise import check_wins, content
from gopo_lightning.rewards.verdict_cache import VerdictCache
from gopo_lightning.types import Prompt

Pair = tuple[str, str]
"""Two different contents as text, the lower one first."""


@dataclass(frozen=True)
class Answer:
    """What a judge says of a pair."""

    low_first: float
    """How surely the low text beats the high one, when it is shown first; NaN: not asked so, or abstained."""
    high_first: float
    """How surely the high text beats the low one, when that is shown first."""

    @property
    def low_wins(self) -> float:
        """Both orders joined; NaN where neither has an answer."""
        known = [w for w in (self.low_first, 1.0 - self.high_first) if not math.isnan(w)]
        return sum(known) / len(known) if known else math.nan

    @property
    def first_bias(self) -> float:
        """W_low,high + W_high,low − 1: above 0 where the judge prefers what it reads first. NaN unless asked twice."""
        return self.low_first + self.high_first - 1.0


class Asker:
    """One judge, and its answers.

    Args:
        source: any reward source, set up. A scalar one compares by score. A comparator is asked in both orders where
            its answers may depend on the order (`tolerance` is None). Any other pairwise source sees all texts of a
            prompt at once, as one group.
        cache: of the answers; in memory when None.
        identity: of the judge, for the cache: all that its answers depend on.
        orders: `one` asks a comparator in one order only, by a hash of seed and texts.
        seed: of the orders.
    """

    def __init__(
        self,
        source: Source,
        cache: VerdictCache | None = None,
        identity: str = "",
        orders: Orders = "both",
        seed: int = 0,
    ) -> None:
        self.source, self.identity, self.orders, self.seed = source, identity, orders, seed
        self.cache = VerdictCache(None) if cache is None else cache
        self.asked = 0
        """Pairs that were not in the cache, so far."""

    def name_of(self, text: str) -> str:
        """What tells texts apart: the text, and its ending where the judge reads it."""
        return repr(content(text, self.source.reads_endings))

    def ask(self, prompts: Sequence[Prompt], texts: Sequence[Sequence[Sequence[str]]]) -> list[dict[Pair, Answer]]:
        """For each prompt, the answers about all pairs of different texts that stand in different groups.

        Args:
            prompts: P prompts.
            texts: for each the groups of completions, one a policy.

        Raises:
            SourceConfigError: from the judge, unchanged.
            RuntimeError: the judge raised, or answered something malformed.
        """
        scopes = [self._scope(prompt, groups) for prompt, groups in zip(prompts, texts, strict=True)]
        wanted = [
            {(low, high): (by_name[low], by_name[high]) for low, high in _pairs(groups, self.name_of)}
            for groups, by_name in ((groups, {self.name_of(t): t for g in groups for t in g}) for groups in texts)
        ]
        self._fill(prompts, texts, scopes, wanted)
        return [
            {pair: self._answer(scope, pair) for pair in pairs} for scope, pairs in zip(scopes, wanted, strict=True)
        ]

    def _fill(
        self,
        prompts: Sequence[Prompt],
        texts: Sequence[Sequence[Sequence[str]]],
        scopes: Sequence[str],
        wanted: Sequence[Mapping[Pair, tuple[str, str]]],
    ) -> None:
        """Put what is missing into the cache."""
        missing = [
            {pair: both for pair, both in pairs.items() if self._questions(scope, pair)}
            for scope, pairs in zip(scopes, wanted, strict=True)
        ]
        self.asked += sum(map(len, missing))
        rows = [p for p, pairs in enumerate(missing) if pairs]
        if not rows:
            return
        with _naming(self.source, prompts[rows[0]]):
            if isinstance(self.source, RewardSource):
                found = self._scored(self.source, prompts, scopes, missing)
            elif isinstance(self.source, PairComparator):
                found = self._compared(self.source, prompts, scopes, missing)
            else:
                found = self._ordered(self.source, [(prompts[p], texts[p], scopes[p], missing[p]) for p in rows])
            for key, answer in found:
                if not math.isnan(answer):  # what has no answer may have one another time
                    self.cache.add(key, answer)

    def _scored(
        self,
        source: RewardSource,
        prompts: Sequence[Prompt],
        scopes: Sequence[str],
        missing: Sequence[Mapping[Pair, tuple[str, str]]],
    ) -> Iterator[tuple[str, float]]:
        unique = {
            (p, name): text
            for p, pairs in enumerate(missing)
            for pair, both in pairs.items()
            for name, text in zip(pair, both, strict=True)
        }
        scores = score([source], [prompts[p] for p, _ in unique], list(unique.values()))[:, 0].tolist()
        number = dict(zip(unique, scores, strict=True))
        for p, pairs in enumerate(missing):
            for low, high in pairs:
                a, b = number[p, low], number[p, high]
                wins = math.nan if math.isnan(a) or math.isnan(b) else (a > b) + 0.5 * (a == b)
                yield self._key(scopes[p], low, high), wins

    def _compared(
        self,
        source: PairComparator,
        prompts: Sequence[Prompt],
        scopes: Sequence[str],
        missing: Sequence[Mapping[Pair, tuple[str, str]]],
    ) -> Iterator[tuple[str, float]]:
        asked = [
            (self._key(scopes[p], *order), prompts[p], both if order == pair else both[::-1])
            for p, pairs in enumerate(missing)
            for pair, both in pairs.items()
            for order in self._questions(scopes[p], pair)
        ]
        answers = source.compare([q[1] for q in asked], [q[2][0] for q in asked], [q[2][1] for q in asked])
        values = as_tensor(answers, len(asked))
        if bool((bad := (values < 0) | (values > 1)).any()):
            raise ValueError(f"answered {values[bad][0].item()}; an answer is a probability in [0, 1], or NaN")
        yield from zip([q[0] for q in asked], values.tolist(), strict=True)

    def _ordered(self, source: PairwiseSource, rows: Iterable[Any]) -> Iterator[tuple[str, float]]:
        for prompt, groups, scope, pairs in rows:
            by_name = {self.name_of(text): text for group in groups for text in group}
            names = sorted(by_name)
            wins_GG = check_wins(source([prompt], [[by_name[n] for n in names]]), 1, len(names), source.tolerance)[0]
            place = {name: n for n, name in enumerate(names)}
            for low, high in pairs:
                yield self._key(scope, low, high), wins_GG[place[low], place[high]].item()
                yield self._key(scope, high, low), wins_GG[place[high], place[low]].item()

    def _questions(self, scope: str, pair: Pair) -> list[Pair]:
        """The orders in which the pair has still to be asked."""
        orders = self._orders(scope, pair)
        if not isinstance(self.source, RewardSource | PairComparator):
            known = any(self._key(scope, *order) in self.cache for order in (pair, pair[::-1]))
            return [] if known else orders
        return [order for order in orders if self._key(scope, *order) not in self.cache]

    def _orders(self, scope: str, pair: Pair) -> list[Pair]:
        """Those that it is asked in: one where the other has the opposite answer, or under `orders: one`."""
        if not isinstance(self.source, PairComparator) or self.source.tolerance is not None:
            return [pair]
        drawn = hashlib.sha256(json.dumps([self.seed, scope, *pair]).encode()).digest()[0] % 2
        return [pair, pair[::-1]] if self.orders == "both" else [pair[::-1] if drawn else pair]

    def _scope(self, prompt: Prompt, groups: Sequence[Sequence[str]]) -> str:
        """What an answer depends on beside the pair: the prompt, and of a source that orders groups all its texts."""
        seen: list[Any] = [self.identity, prompt.index, prompt.text, prompt.messages, dict(prompt.columns)]
        if not isinstance(self.source, RewardSource | PairComparator):
            seen.append(sorted({self.name_of(text) for group in groups for text in group}))
        return hashlib.sha256(json.dumps(seen, sort_keys=True, default=repr).encode()).hexdigest()

    def _key(self, scope: str, first: str, second: str) -> str:
        return hashlib.sha256(json.dumps([scope, first, second]).encode()).hexdigest()

    def _answer(self, scope: str, pair: Pair) -> Answer:
        """What is known in each order; under `orders: one` a cached answer in the other order does not count."""
        counted = self._orders(scope, pair) if self.orders == "one" else [pair, pair[::-1]]
        first, second = (
            self.cache.get(self._key(scope, *order)) if order in counted else None for order in (pair, pair[::-1])
        )
        return Answer(math.nan if first is None else first, math.nan if second is None else second)


def _pairs(groups: Sequence[Sequence[str]], name_of: Callable[[str], str]) -> list[Pair]:
    """Pairs of different names that stand in different groups, each once, sorted."""
    names = [{name_of(text) for text in group} for group in groups]
    met = {
        (min(a, b), max(a, b))
        for i, first in enumerate(names)
        for second in names[i + 1 :]
        for a in first
        for b in second
        if a != b
    }
    return sorted(met)


@contextmanager
def _naming(source: Source, prompt: Prompt) -> Iterator[None]:
    """An error says which judge it is, and near which prompt."""
    try:
        yield
    except (SourceConfigError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(source, RewardSource) and isinstance(error, RuntimeError):
            raise  # `score` has said it
        raise RuntimeError(
            f"judge '{source.name}' raised {type(error).__name__}: {error}\nThe first prompt of these: row "
            f"{prompt.index}: {prompt.text!r}"
        ) from error
