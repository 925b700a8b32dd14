"""The ratings that a dataset's row holds beside its answers."""

import math
from collections.abc import Sequence

from gopo_lightning.data.recorded import Recorded, has_answers, recorded_answers
from gopo_lightning.rewards.base import RewardSource
from gopo_lightning.types import Prompt


class RecordedReward(RewardSource):
    """The row's own rating of an answer, or the share of the row's comparisons that it wins.

    A completion that the row does not hold has no valid score, so in validation, where completions are sampled, another
    source must stand beside it.

    Args:
        name: in logs.
    """

    def __init__(self, name: str = "recorded") -> None:
        self.name = name

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """N ratings."""
        rows = {id(prompt): recorded_answers(prompt) if has_answers(prompt) else None for prompt in prompts}
        return [_rating(rows[id(prompt)], text) for prompt, text in zip(prompts, completions, strict=True)]


def _rating(row: Recorded | None, text: str) -> float:
    """Of the answer that is ``text`` or, cut off, begins with it; NaN where there is none, or no single one."""
    if row is None:
        return math.nan
    found = _ratings(row, [answer == text for answer in row.texts])
    if not found:
        found = _ratings(row, [bool(text) and answer.startswith(text) for answer in row.texts])
    return found.pop() if len(found) == 1 else math.nan


def _ratings(row: Recorded, wanted: Sequence[bool]) -> set[float]:
    """The different ratings of the answers that are ``wanted``."""
    return {rating for rating, is_wanted in zip(row.ratings, wanted, strict=True) if is_wanted}
