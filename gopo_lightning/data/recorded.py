"""Answers that a dataset's row holds beside its prompt, each with a rating: groups that were not sampled.

The columns are those of comparisons (`comparison_formats.FORMATS`): `chosen` and `rejected`, `completions` and `ranks`,
`answers` with their ranks, …
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gopo_lightning.data.cells import Value
from gopo_lightning.data.comparison_formats import FORMATS, PROMPTS, Answers, Format, reading_row, unknown_format
from gopo_lightning.types import Prompt


class Recorded(NamedTuple):
    """M answers to one prompt."""

    texts: tuple[str, ...]
    ratings: tuple[float, ...]
    """The row's own, or the share of comparisons that an answer wins; more is better."""


def has_answers(prompt: Prompt) -> bool:
    """Whether the columns of the prompt's row are those of a known format."""
    return _format(prompt) is not None


def recorded_answers(prompt: Prompt) -> Recorded:
    """The answers of the prompt's row.

    Raises:
        ValueError: columns of no known format, or a row that is malformed; with row and file.
    """
    format_ = _format(prompt)
    if format_ is None:
        raise unknown_format(prompt.place, prompt.columns, "answers")
    prompt_cells = {column: prompt.text for column in format_.columns if column in PROMPTS}  # it is not in `columns`
    with reading_row(prompt.place):
        answers = format_.parse({**prompt_cells, **prompt.columns}, None)
        return Recorded(tuple(_answer(value, prompt) for value in answers.completions), _ratings(answers))


def _format(prompt: Prompt) -> Format | None:
    """The first format whose columns are all there; one of them may be the prompt's own."""
    columns = {*prompt.columns, *PROMPTS}
    return next(
        (f for f in FORMATS if {*f.columns} <= columns and {*f.columns} - {*PROMPTS} <= {*prompt.columns}), None
    )


def _answer(value: Value, prompt: Prompt) -> str:
    """The text of the answer alone: of a conversation its last message, of a text what follows the prompt."""
    if isinstance(value, str):
        return value.removeprefix(prompt.text) if prompt.messages is None else value
    last: Mapping[str, Any] = value[-1]
    if last.get("role") != "assistant" or not isinstance(last.get("content"), str):
        raise ValueError("a conversation does not end with an answer of the assistant")
    return str(last["content"])


def _ratings(answers: Answers) -> tuple[float, ...]:
    if answers.ratings is not None:
        return tuple(answers.ratings)
    return tuple(_mean([share for share in row if not math.isnan(share)]) for row in answers.wins)


def _mean(shares: Sequence[float]) -> float:
    return sum(shares) / len(shares) if shares else math.nan
