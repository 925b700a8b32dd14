"""Comparisons by Python callables: of pairs, and of whole groups by an oracle that only ranks."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gopo_lightning.rewards.base import HoldsModels, RewardSource, Scores, score
from gopo_lightning.rewards.function import ENDINGS, DatasetFunction
from gopo_lightning.rewards.learning import refuse_learner
from gopo_lightning.rewards.pairwise import Groups, PairComparator, PairwiseSource, content
from gopo_lightning.types import Prompt

_ORDER = (
    "an order is a list of completion numbers from 0 on, the best first, and of lists of those that tie: [2, [0, 1]]"
)


class FunctionComparator(PairComparator):
    """Compares pairs of completions with a Python callable.

    The callable gets keyword arguments, each a list: `prompts` (their text), `first`, `second`, how these ended
    (`first_truncated`, `second_truncated`: bool, cut off by `max_new_tokens`; `first_num_tokens`,
    `second_num_tokens`: int, EOS included), and the dataset's other columns; only those that its signature names. It
    returns for each pair the probability in [0, 1] that the first beats the second (½ is a tie), None or NaN to
    abstain:

        def shorter(first: list[str], second: list[str]) -> list[float]:
            return [0.5 if len(a) == len(b) else float(len(a) < len(b)) for a, b in zip(first, second)]

    Args:
        function: dotted path of the callable, or the callable itself.
        name: in logs and error messages; the callable's own name when null.
        options: more keyword arguments, the same in every call.
        num_opponents: others of its group that each completion meets, by a round-robin; all when null.
        both_orders: ask each pair in both orders and average, for callables that depend on the order.
        seed: decides which of the two orders is asked otherwise.
    """

    def __init__(
        self,
        function: str | Callable[..., Any],
        name: str | None = None,
        options: Mapping[str, Any] | None = None,
        num_opponents: int | None = None,
        both_orders: bool = False,
        seed: int = 0,
    ) -> None:
        endings = [prefix + name for prefix in ("first_", "second_") for name in ENDINGS]
        read = ("first", "second", *endings)
        self._function = DatasetFunction(function, ("prompts", *read), read, options)
        super().__init__(name or self._function.name, num_opponents, both_orders, seed)
        self._function.name = self.name
        self.reads_endings = self._function.reads_endings
        self.tolerance = None  # both orders may disagree, that is why they are asked

    def compare(self, prompts: Sequence[Prompt], firsts: Sequence[str], seconds: Sequence[str]) -> Scores:
        """What the callable returns."""
        endings = self._function.endings(firsts, "first_") | self._function.endings(seconds, "second_")
        return self._function(prompts, first=list(map(str, firsts)), second=list(map(str, seconds)), **endings)


class RewardModelComparator(PairComparator):
    """A pairwise reward model: P(first wins) = σ(s_first − s_second), as Bradley–Terry reward models are trained.

    It turns any scalar source into comparisons. With `hard` it answers like a person asked once: the first or the
    second, drawn with that probability, always the same for the same pair.

    Args:
        reward: the scalar source, such as a SequenceClassifierReward. A text without a valid score abstains.
        hard: draw a verdict of 0 or 1 instead of giving the probability.
        name: in logs and error messages; the scalar source's own name when null.
        num_opponents: others of its group that each completion meets, by a round-robin; all when null.
        seed: of the draws.
    """

    def __init__(
        self,
        reward: RewardSource,
        hard: bool = False,
        name: str | None = None,
        num_opponents: int | None = None,
        seed: int = 0,
    ) -> None:
        refuse_learner(reward, "RewardModelComparator")
        super().__init__(name or reward.name, num_opponents, False, seed)
        self.reward, self.hard, self.reads_endings = reward, hard, reward.reads_endings

    def setup(self, device: torch.device) -> None:
        """Set up the scalar source."""
        self.reward.setup(device)

    def models(self) -> list[nn.Module]:
        """Those of the scalar source."""
        return self.reward.models() if isinstance(self.reward, HoldsModels) else []

    def compare(self, prompts: Sequence[Prompt], firsts: Sequence[str], seconds: Sequence[str]) -> Tensor:
        """float64 [Q]; each text is scored once, however often it is compared."""
        pairs = list(zip([*prompts, *prompts], [*firsts, *seconds], strict=True))
        rows = [(prompt.index, content(text, self.reads_endings)) for prompt, text in pairs]
        unique = dict(zip(rows, pairs, strict=True))
        scores = score([self.reward], *map(list, zip(*unique.values(), strict=True)))[:, 0]
        number = {row: n for n, row in enumerate(unique)}
        scores_2Q = scores[[number[row] for row in rows]]
        answers_Q = (scores_2Q[: len(prompts)] - scores_2Q[len(prompts) :]).sigmoid()
        if not self.hard:
            return answers_Q
        draws = [self._draw(p, a, b) for p, a, b in zip(prompts, firsts, seconds, strict=True)]
        drawn_Q = torch.tensor(draws, dtype=answers_Q.dtype) < answers_Q
        return torch.where(answers_Q.isnan(), math.nan, drawn_Q.to(answers_Q))

    def _draw(self, prompt: Prompt, first: str, second: str) -> float:
        """Uniform in [0, 1), by a hash of seed and texts."""
        text = repr((self.seed, prompt.index, prompt.text, first, second)).encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.sha256(text).digest()[:6], "big") / 2**48


class RankingOracle(PairwiseSource):
    """Asks a Python callable to put the completions of a prompt in order, with ties. It never gives a number.

    Equal texts tie: each is shown once. The callable is called once a group (of two texts or more) with `prompt` (its
    text), `completions` (a list of G), `truncated` and `num_tokens` (lists of G: whether `max_new_tokens` cut a
    completion off, and its length, EOS included), and the dataset's other columns (each the value of this prompt); only
    those that its signature names. It returns the numbers of the completions, the best first; those in an inner list
    tie; those left out are not ranked and leave the loss:

        def oracle(completions: list[str]) -> list[int | list[int]]:
            return [2, [0, 1]]  # number 2 is best, 0 and 1 tie, and any others are not ranked

    Args:
        function: dotted path of the callable, or the callable itself.
        name: in logs and error messages; the callable's own name when null.
        options: more keyword arguments, the same in every call.
    """

    def __init__(
        self, function: str | Callable[..., Any], name: str | None = None, options: Mapping[str, Any] | None = None
    ) -> None:
        read = ("completions", *ENDINGS)
        self._function = DatasetFunction(function, ("prompt", *read), read, options)
        self.name = self._function.name = name or self._function.name
        self.reads_endings = self._function.reads_endings

    def __call__(self, prompts: Sequence[Prompt], groups: Groups) -> Tensor:
        """wins_PGG of 1, ½ and 0; NaN where either completion was left out.

        Raises:
            ValueError: an order with a number that is no completion's, or twice the same.
        """
        return torch.stack([self._wins(prompt, group) for prompt, group in zip(prompts, groups, strict=True)])

    def _wins(self, prompt: Prompt, group: Sequence[str]) -> Tensor:
        contents = [content(completion, self.reads_endings) for completion in group]
        asked = dict(zip(contents, group, strict=True))  # each once, in the order in which they come
        places = self._places(prompt, list(asked.values())) if len(asked) > 1 else [0.0]
        place_of = dict(zip(asked, places, strict=True))
        places_G = torch.tensor([place_of[c] for c in contents], dtype=torch.float64)
        before_GG = places_G[:, None] - places_G[None, :]
        return torch.where(before_GG.isnan(), math.nan, 0.5 - 0.5 * before_GG.sign())

    def _places(self, prompt: Prompt, group: Sequence[str]) -> list[float]:
        """The place of each completion, NaN where it was left out."""
        endings = self._function.endings(group)
        order = self._function.once(prompt, prompt=prompt.text, completions=list(map(str, group)), **endings)
        if not isinstance(order, list | tuple):
            raise ValueError(f"returned {type(order).__name__}; {_ORDER}")
        places = [math.nan] * len(group)
        for place, tied in enumerate(order):
            for number in tied if isinstance(tied, list | tuple) else [tied]:
                if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(group):
                    raise ValueError(f"ranked {number!r}; {_ORDER}, here below {len(group)}")
                if not math.isnan(places[number]):
                    raise ValueError(f"ranked completion {number} twice in {order}; name each at most once")
                places[number] = place
        return places
