"""Comparisons on a budget: the pairs whose answers matter most for the order, in rounds, and the rest by inference."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gopo_lightning.distributed.fsdp import is_sharded
from gopo_lightning.objectives.strengths import expected_change, posterior, surely_better
from gopo_lightning.rewards.base import HoldsModels, SourceConfigError
from gopo_lightning.rewards.learning import refuse_learner
from gopo_lightning.rewards.pairwise import Groups, PairComparator, PairwiseSource, content
from gopo_lightning.types import Prompt


class BudgetedComparisons(PairwiseSource):
    """Asks a comparator about some pairs of a group only, chosen by what the answers so far leave open.

    In each round it takes disjoint pairs, those first whose answer would change the ordinal advantages most in
    expectation, under Bradley and Terry's model (`objectives/strengths.py`); all groups of a batch ask their round
    together. A group is done when ``budget`` pairs were asked, or no answer is expected to change its advantages by
    more than ``settled``. Pairs that were not asked have the probability that the answers imply. A completion about
    which every answer abstained is compared with nobody.

    Args:
        comparator: what is asked, such as an LLMJudge; without `num_opponents`, which would choose pairs too.
        budget: most pairs of a group. G/2 · log₂ G, 12 for 8 completions, is a fair start; all are G (G − 1) / 2.
        settled: of the sum of all advantages' changes, each between −2 and 2; 0 spends the budget.
        per_round: most pairs of a group in a round; G / 2 when null. Fewer choose better and take more rounds.
        spread: standard deviation of the completions' strengths in the judge's log-odds, before any answer.
        name: in logs and error messages; the comparator's own when null.
    """

    def __init__(
        self,
        comparator: PairComparator,
        budget: int,
        settled: float = 0.0,
        per_round: int | None = None,
        spread: float = 1.5,
        name: str | None = None,
    ) -> None:
        refuse_learner(comparator, "BudgetedComparisons")
        if not isinstance(comparator, PairComparator):
            raise ValueError(
                f"BudgetedComparisons asks about single pairs, and {type(comparator).__name__} orders whole groups. "
                "Use it without a budget, or another comparator."
            )
        if comparator.num_opponents is not None:
            raise ValueError(
                f"num_opponents={comparator.num_opponents} of the comparator has no effect: BudgetedComparisons "
                "chooses the pairs. Remove it and set `budget`."
            )
        if budget < 1 or settled < 0 or (per_round is not None and per_round < 1) or not 0 < spread < math.inf:
            raise ValueError(
                f"budget={budget}, settled={settled}, per_round={per_round}, spread={spread}: they must be at least 1, "
                "at least 0, null or at least 1, and above 0. Use 12, 0, null and 1.5."
            )
        self.name, self.reads_endings = name or comparator.name, comparator.reads_endings
        self.comparator, self.budget, self.settled = comparator, budget, settled
        self.per_round, self.spread = per_round, spread
        self._asked = 0

    def setup(self, device: torch.device) -> None:
        """Set up the comparator."""
        self.comparator.setup(device)

    def models(self) -> list[nn.Module]:
        """Those of the comparator."""
        return self.comparator.models() if isinstance(self.comparator, HoldsModels) else []

    def counters(self) -> dict[str, int]:
        """Those of the comparator, and the pairs asked about so far."""
        return {**self.comparator.counters(), "asked_pairs": self._asked}

    def versus(self, prompts: Sequence[Prompt], groups: Groups, references: Groups) -> Tensor:
        """As the comparator does, without a budget."""
        return self.comparator.versus(prompts, groups, references)

    def __call__(self, prompts: Sequence[Prompt], groups: Groups) -> Tensor:
        """float64 wins_PGG: preferences of the pairs that were asked, and what these imply for the others.

        Raises:
            SourceConfigError: the comparator's model is sharded: ranks take different numbers of rounds.
        """
        if any(map(is_sharded, self.models())):
            raise SourceConfigError(
                f"pairwise source '{self.name}': its model is sharded, so all ranks would have to ask equally often. "
                "Set model.init_args.placement.frozen_models: replicate."
            )
        contests = [
            Contest(prompt, self._different(group), self) for prompt, group in zip(prompts, groups, strict=True)
        ]
        while chosen := [(contest, pair) for contest in contests for pair in contest.next_round()]:
            questions = [(contest.prompt, contest.texts[i], contest.texts[j]) for contest, (i, j) in chosen]
            self._asked += len(questions)
            for (contest, pair), answer in zip(chosen, self.comparator.answers(questions), strict=True):
                contest.learn(pair, answer)
        return torch.stack([self._whole(contest, group) for contest, group in zip(contests, groups, strict=True)])

    def _different(self, group: Sequence[str]) -> list[str]:
        return list({content(text, self.reads_endings): text for text in group}.values())

    def _whole(self, contest: "Contest", group: Sequence[str]) -> Tensor:
        """The matrix of the group, in which copies of a text tie."""
        place = {content(text, self.reads_endings): n for n, text in enumerate(contest.texts)}
        rows = [place[content(text, self.reads_endings)] for text in group]
        same_GG = torch.tensor(rows)[:, None] == torch.tensor(rows)
        return torch.where(same_GG, 0.5, contest.completed()[rows][:, rows])


class Contest:
    """What is known of the different texts of one group."""

    def __init__(self, prompt: Prompt, texts: Sequence[str], rules: BudgetedComparisons) -> None:
        self.prompt, self.texts, self.rules = prompt, texts, rules
        self.wins_GG = torch.full((len(texts), len(texts)), math.nan, dtype=torch.float64)
        self.open_GG = torch.ones(len(texts), len(texts), dtype=torch.bool).triu(1)
        self.left = rules.budget

    def next_round(self) -> list[tuple[int, int]]:
        """Disjoint pairs to ask next; none where the order is settled or the budget is spent."""
        pairs_Q2 = self.open_GG.nonzero()
        if not self.left or not len(pairs_Q2):
            return []
        change_Q = expected_change(*posterior(self.wins_GG, self.rules.spread), pairs_Q2)
        most = min(self.left, self.rules.per_round or len(self.texts) // 2)
        chosen: list[tuple[int, int]] = []
        for q in change_Q.sort(descending=True, stable=True).indices.tolist():
            i, j = pairs_Q2[q].tolist()
            if len(chosen) == most or change_Q[q] <= self.rules.settled:
                break
            if not {i, j} & {n for pair in chosen for n in pair}:
                chosen.append((i, j))
        self.left -= len(chosen)
        return chosen

    def learn(self, pair: tuple[int, int], answer: tuple[float, float]) -> None:
        """The answers with the first of ``pair`` shown first and last; NaN: not asked so, or abstained."""
        i, j = pair
        self.open_GG[i, j] = False
        known = [p for p in (answer[0], 1 - answer[1]) if not math.isnan(p)]
        if known:
            self.wins_GG[i, j] = sum(known) / len(known)
            self.wins_GG[j, i] = 1 - self.wins_GG[i, j]

    def completed(self) -> Tensor:
        """float64 [G, G]: the answers, and in their place where there is none what they imply."""
        return with_inferred(self.wins_GG, self.rules.spread)


def with_inferred(wins_GG: Tensor, spread: float) -> Tensor:
    """The answers, W_ij + W_ji = 1, and what they imply of pairs without one; NaN about who has no answer at all."""
    implied_GG = surely_better(*posterior(wins_GG, spread))
    answered_G = ~(wins_GG.isnan() | torch.eye(len(wins_GG), dtype=torch.bool)).all(-1)
    known_GG = answered_G[:, None] & answered_G
    return torch.where(wins_GG.isnan(), torch.where(known_GG, implied_GG, math.nan), wins_GG)
