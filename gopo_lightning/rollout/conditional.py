"""A bonus for a behaviour, where the group shows that it helps."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from gopo_lightning.objectives.base import Mean
from gopo_lightning.objectives.named import load_callable
from gopo_lightning.rollout.correct import Correct
from gopo_lightning.rollout.transforms import Context, Setting, Transform, mean_of, plus
from gopo_lightning.types import Rollout

R = TypeVar("R", bound=Rollout)


class ConditionalBonus(Transform):
    """r + w · M · [marked], M from the group itself: GCPO of GeometryZero (arXiv 2506.07160, eq. 3 and 4).

    With m₁ the share of correct completions among the marked of a group, and m₀ among the others, M is +1 where
    m₁ − m₀ > ε, −1 where m₀ − m₁ > ε, and else 0; 0 too where all are marked, or none. So a behaviour, such as drawing
    an auxiliary line, is rewarded on prompts where it helps and punished where it hurts. Completions without a valid
    score, or of weight 0, enter neither share.

    Departures: the paper's values of ε and w were not to be read; these are ours. Its rewards for format and length are
    sources of their own. Its groups are not split in advance into marked and unmarked halves.

    Args:
        pattern: a regular expression; a completion is marked where it is found anywhere in its text.
        function: in its place the dotted path of a function of the text, or ``./file.py:name``, that says True or
            False; or the function itself.
        weight: w > 0, in units of the reward.
        epsilon: ε, in shares; -inf gives every marked completion the bonus.
        source: whose score says which completions are correct; the combined reward when null.
        tau: the least score of a correct completion.
    """

    def __init__(
        self,
        pattern: str | None = None,
        function: str | Callable[[str], bool] | None = None,
        weight: float = 0.5,
        epsilon: float = 0.1,
        source: str | None = None,
        tau: float = 0.5,
    ) -> None:
        if not 0 < weight < math.inf:
            raise ValueError(
                f"weight={weight} of ConditionalBonus must be above 0 and finite. Leave the transform out for none."
            )
        if not epsilon < 1:
            raise ValueError(f"epsilon={epsilon} of ConditionalBonus must be below 1, the largest difference. Try 0.1.")
        self._marker = marker(pattern, function)
        self._correct = Correct(source, tau, "ConditionalBonus")
        self.pattern, self.function, self.weight, self.epsilon = pattern, function, weight, epsilon
        self.source, self.tau = source, tau
        self._measured: dict[str, Mean] = {}

    def set_up(self, setting: Setting) -> None:
        """ValueError for a source that the run does not have."""
        self._correct.set_up(setting)

    def __call__(self, rollout: R, context: Context) -> R:
        """Rewards with the bonus."""
        correct_PG = self._correct(rollout)
        marked_PG = torch.tensor([self._marker(text) for text in rollout.completions.texts]).view_as(correct_PG)
        sign_P = helps(correct_PG, marked_PG, self.epsilon)
        self._measured = {
            "marked_fraction": mean_of(marked_PG.double()),
            "marker_helps_fraction": mean_of((sign_P > 0).double()),
            "marker_hurts_fraction": mean_of((sign_P < 0).double()),
        }
        return plus(rollout, self.weight * sign_P[:, None] * marked_PG)

    def metrics(self) -> Mapping[str, Mean]:
        """How many are marked, and in how many groups that helps or hurts."""
        return self._measured


def helps(correct_PG: Tensor, marked_PG: Tensor, epsilon: float) -> Tensor:
    """float64 M_P: +1 where the marked are correct more often by more than ``epsilon``, −1 where less often, else 0.

    NaN enters neither share; where a side is empty nothing is known.

    >>> acc, aux = torch.tensor([[1.0, 1, 0, 1, 0, 0, 0, 1]]), torch.tensor([[True, True, True] + [False] * 4 + [True]])
    >>> helps(acc, aux, 0.1).tolist(), helps(aux.double(), acc.bool(), 0.1).tolist(), helps(1 - acc, aux, 0.1).tolist()
    ([1.0], [1.0], [-1.0])
    """
    gain_P = share_correct(correct_PG, marked_PG) - share_correct(correct_PG, ~marked_PG)
    return torch.where(gain_P > epsilon, 1.0, torch.where(-gain_P > epsilon, -1.0, 0.0)).double()


def share_correct(correct_PG: Tensor, among_PG: Tensor) -> Tensor:
    """The mean of what is known ``among_PG``, NaN where that is nothing."""
    return correct_PG.masked_fill(~among_PG, torch.nan).nanmean(-1)


def marker(pattern: str | None, function: str | Callable[[str], bool] | None) -> Callable[[str], bool]:
    """Says of a text whether it is marked.

    Raises:
        ValueError: not one of the two is given, or it is no regular expression or function.
    """
    if (pattern is None) == (function is None):
        raise ValueError(
            f"pattern={pattern!r} and function={function!r} of ConditionalBonus: give one of them, and not both."
        )
    if pattern is not None:
        expression = _expression(pattern)
        return lambda text: expression.search(text) is not None
    asked: Callable[[str], Any] = load_callable(function) if isinstance(function, str) else function  # type: ignore[assignment]
    return lambda text: _answer(asked(text), text)


def _expression(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"pattern={pattern!r} of ConditionalBonus is no regular expression: {error}. Correct it."
        ) from error


def _answer(answer: Any, text: str) -> bool:
    if not isinstance(answer, bool):
        raise ValueError(
            f"the marker of ConditionalBonus returned {answer!r:.80} for the text {text!r:.80}; it must return True or "
            "False."
        )
    return answer
