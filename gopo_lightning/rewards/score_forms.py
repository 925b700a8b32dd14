"""What a judge of single responses is asked, and the number that its answer makes."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CRITERION = "How well does the response answer the prompt?"
_ENDS = "Then end your reply with one line in exactly this form, where"


@dataclass(frozen=True)
class ScoreForm:
    """One number, from ``lowest`` to ``highest``."""

    criterion: str
    lowest: float
    highest: float

    @property
    def example(self) -> str:
        """Of the answer in the last line."""
        return f'"score": {self.lowest:g}'

    def question(self, fence: str) -> str:
        """What follows the fenced texts."""
        return (
            f"{self.criterion}\nThink as much as you need. {_ENDS} score is a number from {self.lowest:g} (worst) to "
            f'{self.highest:g} (best):\n{{"id": {json.dumps(fence)}, {self.example}}}'
        )

    def verdict(self, row: Mapping[str, Any]) -> float | None:
        """The score; None where it is no number within the range.

        >>> form = ScoreForm(CRITERION, 1, 10)
        >>> [form.verdict({"score": score}) for score in (7, 7.5, 11, "7", True, None)]
        [7.0, 7.5, None, None, None, None]
        """
        return _within(row.get("score"), self.lowest, self.highest)


@dataclass(frozen=True)
class RubricForm:
    """A whole number for each item of a rubric; their sum counts."""

    items: tuple[str, ...]
    lowest: int
    highest: int

    @property
    def example(self) -> str:
        """Of the answers in the last line."""
        return f'"scores": {json.dumps([self.lowest] * len(self.items))}'

    def question(self, fence: str) -> str:
        """What follows the fenced texts."""
        listed = "\n".join(f"{number}. {item}" for number, item in enumerate(self.items, start=1))
        return (
            f"Judge the response by each item of this rubric:\n{listed}\nFor each item, say in a sentence how the "
            f"response does, and give it a whole number from {self.lowest} (worst) to {self.highest} (best). {_ENDS} "
            f'scores has the {len(self.items)} numbers in the order of the items:\n{{"id": {json.dumps(fence)}, '
            f"{self.example}}}"
        )

    def verdict(self, row: Mapping[str, Any]) -> float | None:
        """The sum of the scores; None unless there is a whole number within the range for each item.

        >>> form = RubricForm(("It is kind.", "It is brief."), 0, 5)
        >>> [form.verdict({"scores": scores}) for scores in ([5, 2], [5], [5, 2.5], [5, 6], "52")]
        [7.0, None, None, None, None]
        """
        scores = row.get("scores")
        if not isinstance(scores, list) or len(scores) != len(self.items):
            return None
        known = [_within(score, self.lowest, self.highest) for score in scores]
        return None if any(s is None or s % 1 for s in known) else sum(s for s in known if s is not None)


def check_range(lowest: float, highest: float) -> None:
    """ValueError unless it has two ends."""
    if not (math.isfinite(lowest) and math.isfinite(highest) and lowest < highest):
        raise ValueError(f"lowest={lowest} and highest={highest}: the range needs two finite ends. Use 1 and 10.")


def rubric_of(items: Sequence[str]) -> tuple[str, ...]:
    """The items without surrounding space, each once, in their order.

    >>> rubric_of(["It is kind.", " It is brief.", "It is kind. "])
    ('It is kind.', 'It is brief.')

    Raises:
        ValueError: there is none, or one is empty.
    """
    rubric = tuple(dict.fromkeys(" ".join(item.split()) for item in items))
    if isinstance(items, str) or not rubric or not all(rubric):
        raise ValueError(f"rubric={items!r:.200} must be a list of at least one sentence, none of them empty")
    return rubric


def _within(score: Any, lowest: float, highest: float) -> float | None:
    """A number of JSON within the range, or None."""
    is_number = isinstance(score, int | float) and not isinstance(score, bool)
    return float(score) if is_number and lowest <= score <= highest else None
