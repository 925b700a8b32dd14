"""Comparisons: rows of a hub dataset or local file → `ComparisonRow`, in which the prompt is read exactly once.

The columns tell the format (`comparison_formats.FORMATS`). A dataset may or may not repeat its prompt in the answers:

- Messages are the same if role and text are, white space aside (`conversations.continued`).
- Texts repeat a prompt if what all texts of the row begin with holds it, and either most rows are so, or the prompt has
  at least 32 characters. ("Hello" is no repeated prompt just because both answers are polite.)
- A prompt that is a user's message (`question`, …), or that has a system message, makes a conversation of texts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from lightning.pytorch.utilities import rank_zero_info

from gopo_lightning.data.cells import Value
from gopo_lightning.data.comparison_formats import (
    FORMATS,
    Answers,
    Format,
    order,
    preference,
    reading_row,
    unknown_format,
)
from gopo_lightning.data.conversations import Conversation, continued, normalised, repeats
from gopo_lightning.data.sources import PromptSource, columns_of, read_rows

Text: TypeAlias = str | tuple[Mapping[str, Any], ...]
"""A text, or a conversation that the reward model's own template renders."""

_SURELY_REPEATED = 32
"""Characters of a prompt with which answers do not begin by chance."""


@dataclass(frozen=True)
class ComparisonRow:
    """M texts that are answers to one prompt, and which of them people like better.

    >>> nan = float("nan")
    >>> ComparisonRow(("good", "bad"), ((nan, 1.0), (0.0, nan))).wins
    ((nan, 1.0), (0.0, nan))
    """

    texts: tuple[Text, ...]
    wins: tuple[tuple[float, ...], ...]
    """W_ij, how surely i beats j; NaN on the diagonal."""
    ratings: tuple[float, ...] | None = None
    """A score of each text, where there are any."""
    margin: float | None = None
    """How much better the first of two texts is, where the data say so."""
    number: int = field(default=0, repr=False, compare=False)
    """Of the first row of the source that it comes from."""


def load_comparisons(source: PromptSource, prompt_column: str | None = None) -> list[ComparisonRow]:
    """All comparisons of ``source``; an info line says which columns were read.

    Args:
        source: hub dataset or local file.
        prompt_column: the column of the prompt, where several might be or its name is none of the known ones.

    Raises:
        ValueError: a missing file, malformed JSON, columns of no known format, or a malformed row (with its number).
    """
    rows = read_rows(source)
    columns = columns_of(rows)
    format_ = next((known for known in FORMATS if {*known.columns} <= {*columns}), None)
    if format_ is None:
        raise unknown_format(str(source.path), columns, "comparisons")
    _check_prompt_column(prompt_column, format_, columns, source)
    answers = [_parsed(format_, prompt_column, source, number, row) for number, row in enumerate(rows)]
    parsed = _texts(answers, source)
    compared = _joined_raters(parsed) if format_.joins_raters else parsed
    compared = _joined_rated(answers, parsed) if format_.joins_rated else compared
    kept = [row for row in compared if len(row.texts) > 1]
    if not kept:
        raise ValueError(f"{source.path}: no prompt has two answers to compare. Give at least two of a prompt.")
    _say(source, len(kept), len(compared) - len(kept), columns, format_.used(prompt_column))
    return kept


def _check_prompt_column(
    prompt_column: str | None, format_: Format, columns: Sequence[str], source: PromptSource
) -> None:
    if prompt_column is None:
        return
    if not format_.reads_prompt:
        raise ValueError(
            f"prompt_column={prompt_column!r} has no effect: the prompt of {format_.columns} is known. Remove it."
        )
    if prompt_column not in columns:
        raise ValueError(f"prompt_column={prompt_column!r} is no column of {source.path}; it has {sorted(columns)}.")


def _say(source: PromptSource, num_rows: int, num_alone: int, columns: Sequence[str], used: set[str]) -> None:
    ignored = sorted({*columns} - used)
    rank_zero_info(
        f"{source.path}: {num_rows} comparisons from the columns {sorted({*columns} & used)}"
        + (f"; not read: {ignored}" if ignored else "")
        + (f"; {num_alone} prompts with fewer than two answers were left out" if num_alone else "")
    )


def _parsed(format_: Format, prompt_column: str | None, source: PromptSource, number: int, row: Any) -> Answers:
    with reading_row(place(source, number)):
        return format_.parse(row, prompt_column)


def place(source: PromptSource, number: int) -> str:
    """Where a row stands, for messages."""
    return f"row {number} (counted from 0) of {source.path}"


def _texts(answers: Sequence[Answers], source: PromptSource) -> list[ComparisonRow]:
    """Each prompt and answer as one text."""
    repeated = [_is_repeated(row) for row in answers]
    known = [is_repeated for is_repeated in repeated if is_repeated is not None]
    most = 2 * sum(known) >= len(known)
    as_chat = any(row.is_turn or row.system for row in answers)
    rows = []
    for number, (row, is_repeated) in enumerate(zip(answers, repeated, strict=True)):
        is_whole = bool(is_repeated) and (most or len(normalised(str(row.prompt))) >= _SURELY_REPEATED)
        try:
            texts = tuple(_text(row, completion, is_whole, as_chat) for completion in row.completions)
        except ValueError as error:
            raise ValueError(f"{place(source, number)}: {error}. Fix or delete it.") from error
        rows.append(ComparisonRow(texts, row.wins, row.ratings, row.margin, number))
    return rows


def _is_repeated(row: Answers) -> bool | None:
    """Whether texts repeat a plain prompt; None where there is no such prompt, or a conversation."""
    texts = [completion for completion in row.completions if isinstance(completion, str)]
    if not isinstance(row.prompt, str) or not row.prompt.strip() or len(texts) < max(len(row.completions), 2):
        return None
    return repeats(row.prompt, texts)


def _text(row: Answers, completion: Value, is_whole: bool, as_chat: bool) -> Text:
    prompt = row.prompt
    if isinstance(completion, str) and (is_whole or (not as_chat and not isinstance(prompt, tuple))):
        text = completion if is_whole else f"{prompt or ''}{completion}"
        if not text.strip():
            raise ValueError("a text is empty")
        return text
    if isinstance(completion, str):
        if not prompt:
            raise ValueError("the prompt is empty")
        completion = ({"role": "assistant", "content": completion},)
    before: Conversation = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt or ()
    if row.system:
        before = continued(({"role": "system", "content": row.system},), before)
    return continued(before, completion)


def _joined_raters(rows: Sequence[ComparisonRow]) -> list[ComparisonRow]:
    """One row for each pair, W the mean over its raters, whichever order they saw it in."""
    answers: dict[tuple[Text, ...], list[float]] = {}
    numbers: dict[tuple[Text, ...], int] = {}
    for row in rows:
        first, second = row.texts
        flipped = (second, first) in answers
        texts = (second, first) if flipped else (first, second)
        answers.setdefault(texts, []).append(row.wins[1][0] if flipped else row.wins[0][1])
        numbers.setdefault(texts, row.number)
    return [
        ComparisonRow(texts, preference(sum(wins) / len(wins)), number=numbers[texts])
        for texts, wins in answers.items()
    ]


def _joined_rated(answers: Sequence[Answers], rows: Sequence[ComparisonRow]) -> list[ComparisonRow]:
    """One row for each prompt, with all its answers."""
    groups: dict[str, list[ComparisonRow]] = {}
    for answer, row in zip(answers, rows, strict=True):
        groups.setdefault(repr(answer.prompt), []).append(row)
    joined = []
    for group in groups.values():
        ratings = tuple(rating for row in group for rating in row.ratings or ())
        texts = tuple(text for row in group for text in row.texts)
        joined.append(ComparisonRow(texts, order(ratings), ratings, number=group[0].number))
    return joined
