"""Sources that compare completions with each other instead of giving each one a number. Shape legend: `types.py`.

A comparison matrix W [G, G] holds the answers about one group: W_ij in [0, 1] is how surely completion i beats
completion j when i is shown first (½ is a tie; NaN is not asked or abstained; the diagonal is not read). A pair may be
answered in one order or in both; `advantages.preferences` joins the two.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gopo_lightning.distributed.gathering import forward_is_collective
from gopo_lightning.rewards.base import HoldsModels, Scores, as_tensor
from gopo_lightning.types import Completion, Prompt

Groups: TypeAlias = Sequence[Sequence[str]]
"""P groups of completions, the texts of one prompt each."""


class PairwiseSource(ABC):
    """Compares the completions of a group with each other. It needs no scalar reward, and none is made up.

    Whatever it answers, copies of a text tie (if ``reads_endings``, those that also ended alike), and share their
    answers.
    """

    name: str
    """In logs and error messages."""
    reads_endings: bool = False
    """Whether an answer may depend on how a completion ended, not only on its text."""
    tolerance: float | None = 1e-3
    """Where both orders are answered, |W_ij + W_ji − 1| must not exceed this. None: answers may depend on the order."""
    waits_for_people: bool = False
    """Whether it takes as long as somebody needs: `rewards.timeout_seconds` does not hold."""

    def setup(self, device: torch.device) -> None:  # noqa: B027 - most sources need none
        """Load what is needed and place it on ``device``. Called once, before the first completion."""

    @abstractmethod
    def __call__(self, prompts: Sequence[Prompt], groups: Groups) -> Tensor:
        """wins_PGG of P groups of G completions; in a run each is a ``types.Completion``."""

    def versus(self, prompts: Sequence[Prompt], groups: Groups, references: Groups) -> Tensor:
        """float64 [P, G, R], how surely each completion beats each of R reference completions of its prompt.

        By default the source compares all G + R texts as one group. Both orders count.
        """
        joint = [[*g, *r] for g, r in zip(groups, references, strict=True)]
        joint_PGG = tie_copies(self(prompts, joint), joint, self.reads_endings)
        G = len(groups[0])
        return _joined(joint_PGG[:, :G, G:], joint_PGG[:, G:, :G].mT)

    def counters(self) -> dict[str, int]:
        """Running totals of this process for the log, such as calls."""
        return {}


class PairComparator(PairwiseSource):
    """A pairwise source that answers one pair at a time.

    Equal texts tie without being asked (if ``reads_endings``, those that also ended alike). `compare` is called once
    for all pairs of a batch.

    Args:
        name: in logs and error messages.
        num_opponents: each completion meets this many others of its group, by a round-robin (one fewer for some
            where G is odd); all of them when null.
        both_orders: ask each pair in both orders, and average. Otherwise one of them, by a hash of `seed` and texts,
            so that the same pair is always asked in the same order, whoever asks.
        seed: of the order.
    """

    waits: bool = False
    """Whether it spends its time waiting for other machines, and has an ``ask_pairs``."""

    def __init__(self, name: str, num_opponents: int | None = None, both_orders: bool = False, seed: int = 0) -> None:
        if num_opponents is not None and num_opponents < 1:
            raise ValueError(f"num_opponents={num_opponents}: a completion meets at least 1 other. Use null for all.")
        self.name, self.num_opponents, self.both_orders, self.seed = name, num_opponents, both_orders, seed

    @abstractmethod
    def compare(self, prompts: Sequence[Prompt], firsts: Sequence[str], seconds: Sequence[str]) -> Scores:
        """Q probabilities in [0, 1] that the first text beats the second; None or NaN abstains."""

    def __call__(self, prompts: Sequence[Prompt], groups: Groups) -> Tensor:
        """wins_PGG over the pairs of the round-robin.

        Raises:
            ValueError: as many opponents asked for as there are completions, or more; an answer that is no
                probability, or a wrong number of answers.
        """
        G = len(groups[0])
        cells = self._cells(groups)
        answers = self.answers([(prompts[p], groups[p][i], groups[p][j]) for p, i, j in cells])
        wins_PGG = torch.full((len(groups), G, G), math.nan, dtype=torch.float64)
        for (p, i, j), (i_first, j_first) in zip(cells, answers, strict=True):
            wins_PGG[p, i, j], wins_PGG[p, j, i] = i_first, j_first
        return wins_PGG

    def versus(self, prompts: Sequence[Prompt], groups: Groups, references: Groups) -> Tensor:
        """All G · R pairs of a completion and a reference are asked, none within either."""
        P, G, R = len(groups), len(groups[0]), len(references[0])
        questions = [(prompts[p], groups[p][g], references[p][r]) for p in range(P) for g in range(G) for r in range(R)]
        first, second = torch.tensor(self.answers(questions), dtype=torch.float64).unbind(-1)
        return _joined(first, second).view(P, G, R)

    def answers(self, pairs: Sequence[tuple[Prompt, str, str]]) -> list[tuple[float, float]]:
        """For each pair (x, y) the answers with x first and with y first; NaN where that was not asked."""
        questions = self.questions(pairs)
        if not questions and pairs and self._asks_in_step():
            prompt, x, y = pairs[0]
            self.compare([prompt], [x], [y])  # other ranks may have questions
        scores = self.compare(*map(list, zip(*questions.values(), strict=True))) if questions else []
        known = dict(zip(questions, self._checked(scores, len(questions)), strict=True))
        answers = []
        for prompt, x, y in pairs:
            asked, a, b = _key(prompt), content(x, self.reads_endings), content(y, self.reads_endings)
            answers.append(
                (0.5, math.nan) if a == b else (known.get((asked, a, b), math.nan), known.get((asked, b, a), math.nan))
            )
        return answers

    async def ask(self, prompts: Sequence[Prompt], groups: Groups) -> None:
        """See `early.AsksEarly`."""
        await self.ask_pairs([(prompts[p], groups[p][i], groups[p][j]) for p, i, j in self._cells(groups)])

    async def ask_pairs(self, pairs: Sequence[tuple[Prompt, str, str]]) -> None:
        """Ask about pairs before ``answers`` is called for them; a comparator that ``waits`` does."""

    def _cells(self, groups: Groups) -> list[tuple[int, int, int]]:
        """The pairs of the round-robin of each group."""
        G = len(groups[0])
        if self.num_opponents is not None and self.num_opponents >= G:
            raise ValueError(
                f"num_opponents={self.num_opponents}, but a completion of a group of {G} has only {G - 1} opponents. "
                "Lower num_opponents, or raise the number of completions."
            )
        return [(p, i, j) for p in range(len(groups)) for i, j in round_robin(G, self.num_opponents)]

    def questions(
        self, pairs: Sequence[tuple[Prompt, str, str]]
    ) -> dict[tuple[str, Any, Any], tuple[Prompt, str, str]]:
        """What is asked about ``pairs``, in the orders in which it is, each once."""
        questions: dict[tuple[str, Any, Any], tuple[Prompt, str, str]] = {}
        for prompt, x, y in pairs:
            for first, second in self._orders(prompt, x, y):
                key = (_key(prompt), content(first, self.reads_endings), content(second, self.reads_endings))
                questions.setdefault(key, (prompt, first, second))
        return questions

    def _asks_in_step(self) -> bool:
        """Whether a forward of its models needs all ranks."""
        return isinstance(self, HoldsModels) and any(map(forward_is_collective, self.models()))

    def _orders(self, prompt: Prompt, x: str, y: str) -> list[tuple[str, str]]:
        """The orders in which to ask a pair."""
        (a, low), (b, high) = sorted((content(text, self.reads_endings), text) for text in (x, y))
        if a == b:
            return []
        if self.both_orders:
            return [(x, y), (y, x)]
        digest = hashlib.sha256(repr((self.seed, _key(prompt), a, b)).encode("utf-8", "surrogatepass")).digest()
        return [(low, high) if digest[0] % 2 else (high, low)]

    def _checked(self, scores: Scores, count: int) -> list[float]:
        """The answers as numbers in [0, 1] or NaN."""
        values = as_tensor(scores, count)
        if bool((bad := (values < 0) | (values > 1)).any()):
            raise ValueError(
                f"answered {values[bad][0].item()}; an answer is the probability in [0, 1] that the first text wins, "
                "or NaN to abstain"
            )
        return values.tolist()


def round_robin(G: int, num_opponents: int | None) -> list[tuple[int, int]]:
    """Pairs i < j of the first rounds of a round-robin tournament by the circle method; all pairs when None.

    In each round everybody meets one other (with an odd G one rests), and no pair meets twice.

    >>> round_robin(4, 1)
    [(0, 3), (1, 2)]
    """
    seats = G + G % 2  # with an odd G the last seat is empty
    pairs = []
    for turn in range(seats - 1 if num_opponents is None else min(num_opponents, seats - 1)):
        circle = [0, *(1 + (turn + k) % (seats - 1) for k in range(seats - 1))]
        met = [(circle[k], circle[-1 - k]) for k in range(seats // 2)]
        pairs += [(min(pair), max(pair)) for pair in met if max(pair) < G]
    return sorted(pairs)


def check_wins(wins_PGG: Tensor, num_prompts: int, num_completions: int, tolerance: float | None) -> Tensor:
    """float64 on the CPU, unchanged otherwise.

    Raises:
        ValueError: another shape than [P, G, G], an answer outside [0, 1], or W_ij + W_ji farther than ``tolerance``
            from 1.
    """
    shape = (num_prompts, num_completions, num_completions)
    if not isinstance(wins_PGG, Tensor) or tuple(wins_PGG.shape) != shape:
        got = tuple(wins_PGG.shape) if isinstance(wins_PGG, Tensor) else type(wins_PGG).__name__
        raise ValueError(f"returned {got} for {num_prompts} groups of {num_completions}; return a tensor of {shape}")
    wins_PGG = wins_PGG.detach().cpu().double()
    off_GG = ~torch.eye(num_completions, dtype=torch.bool)
    if bool((outside := ((wins_PGG < 0) | (wins_PGG > 1)) & off_GG).any()):
        raise ValueError(f"returned the comparison {wins_PGG[outside][0].item()}; it must lie in [0, 1], or be NaN")
    gap_PGG = ((wins_PGG + wins_PGG.mT - 1).abs() * off_GG).nan_to_num(0)
    if tolerance is not None and float(gap_PGG.max()) > tolerance:
        p, i, j = (int(x) for x in (gap_PGG == gap_PGG.max()).nonzero()[0])
        raise ValueError(
            f"returned W[{i},{j}]={wins_PGG[p, i, j].item():g} and W[{j},{i}]={wins_PGG[p, j, i].item():g} in group "
            f"{p}; they must sum to 1 within {tolerance:g}. Return one of them as NaN, or set the source's tolerance"
        )
    return wins_PGG


def tie_copies(wins_PGG: Tensor, groups: Groups, with_ending: bool) -> Tensor:
    """The matrices with ½ between copies of a text, and for any other answer its mean over the copies on both sides."""
    wins_PGG = wins_PGG.to(torch.float64, copy=True)
    for wins_GG, group in zip(wins_PGG, groups, strict=True):
        contents = [content(completion, with_ending) for completion in group]
        if len(set(contents)) == len(contents):
            continue
        same_GG = torch.tensor([[a == b for b in contents] for a in contents])
        asked_GG = ~wins_GG.isnan() & ~torch.eye(len(contents), dtype=torch.bool)
        copies_GG, counted_GG = same_GG.double(), asked_GG.double()
        total_GG = copies_GG @ torch.where(asked_GG, wins_GG, 0.0) @ copies_GG
        mean_GG = total_GG / (copies_GG @ counted_GG @ copies_GG)
        wins_GG.copy_(torch.where(asked_GG, torch.where(same_GG, 0.5, mean_GG), wins_GG))
    return wins_PGG


def _joined(first: Tensor, second: Tensor) -> Tensor:
    """Mean of W_xy and 1 − W_yx, or the one of them that is known."""
    return torch.stack([first, 1 - second]).nanmean(0)


def content(completion: str, with_ending: bool) -> Any:
    """What tells completions of a prompt apart: the text, and with its ending whether it was cut off and its length."""
    if not with_ending or not isinstance(completion, Completion):
        return str(completion)
    return str(completion), completion.truncated, completion.num_tokens


def _key(prompt: Prompt) -> str:
    """Tells prompts apart: all that a judge may see of it."""
    return repr((prompt.index, prompt.text, prompt.messages))
