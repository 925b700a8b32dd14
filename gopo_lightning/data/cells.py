"""Cells of a row as texts, conversations and numbers; a ValueError says which column holds something else.

A CSV file has texts only, so a text may spell a number or a list of messages.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from gopo_lightning.data.conversations import Conversation, messages_of, parsed_messages

Row: TypeAlias = Mapping[str, Any]
Value: TypeAlias = str | Conversation


def is_blank(value: Any) -> bool:
    """Null, an empty text or an empty list."""
    return value is None or (isinstance(value, str) and not value.strip()) or value == []


def as_number(value: Any, what: str, rule: str = "a finite number") -> float | None:
    """``value`` as a finite float; None for null and blank text."""
    if is_blank(value):
        return None
    try:
        result = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        result = math.nan
    if not math.isfinite(result):
        raise ValueError(f"{what} is {value!r:.80}, but must be {rule}")
    return result


def number(row: Row, column: str) -> float | None:
    """The finite number of a cell; None where it is null, empty or absent."""
    return as_number(row.get(column), f"column '{column}'", "a finite number, or null where it is not known")


def known(row: Row, column: str) -> float:
    """The finite number of a cell that may not be empty."""
    value = number(row, column)
    if value is None:
        raise ValueError(f"column '{column}' is {row.get(column)!r}, but must be a finite number")
    return value


def numbers(row: Row, column: str) -> tuple[float, ...]:
    """The finite numbers of a list."""
    values = [as_number(value, f"{column}[{n}]") for n, value in enumerate(listed(row, column))]
    if None in values:
        raise ValueError(f"{column}[{values.index(None)}] is null; each completion needs a number")
    return tuple(value for value in values if value is not None)


def listed(row: Row, column: str) -> Sequence[Any]:
    """A cell that is a list."""
    if not isinstance(row.get(column), list | tuple):
        raise ValueError(f"column '{column}' is {row.get(column)!r:.80}, but must be a list")
    return row[column]


def text_of(value: Any, what: str) -> str:
    """``value``, which must be a text."""
    if not isinstance(value, str):
        raise ValueError(f"{what} is {value!r:.80}, but must be a text")
    return value


def as_value(value: Any, what: str) -> Value:
    """A text, or the messages of a list, of a single one, or of JSON text."""
    if isinstance(value, str):
        try:
            messages = parsed_messages(value)
        except ValueError as error:
            raise ValueError(f"{what} {error}") from error
        if messages is None:
            return value
        value = messages
    if not isinstance(value, list | tuple | Mapping) or not value:
        raise ValueError(f"{what} is {value!r:.80}, but must be a text or messages")
    try:
        return messages_of(value)
    except ValueError as error:
        raise ValueError(f"{what} {error}") from error


def value_of(row: Row, column: str) -> Value:
    """The text or the messages of a cell."""
    return as_value(row.get(column), f"column '{column}'")
