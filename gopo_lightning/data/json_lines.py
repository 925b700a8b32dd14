"""JSON lines that any program reads: strictly RFC 8259, one line a row whatever its text holds.

JSON has no number that is not finite. A reward of ±∞ is an ordinary rank here, NaN is no reward: they are written as
the texts "Infinity" and "-Infinity" and as null, and `number` reads them back.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_SURROGATE = re.compile("[\ud800-\udfff]")


def dumps(row: Any) -> str:
    """``row`` as one line of JSON, without the line end.

    >>> dumps({"rewards": [0.5, math.inf, -math.inf, math.nan]})
    '{"rewards": [0.5, "Infinity", "-Infinity", null]}'
    """
    text = json.dumps(_finite(row), ensure_ascii=False, allow_nan=False)
    return _SURROGATE.sub(lambda half: f"\\u{ord(half[0]):04x}", text)  # UTF-8 has no half of a pair


def number(value: float | str | None) -> float:
    """What ``dumps`` has made of a number: "Infinity" → ∞, null → NaN."""
    return math.nan if value is None else float(value)


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Put a line a row into ``path``; a file that is there is replaced when the new one is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.writing")
    with aside.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(dumps(row) + "\n" for row in rows)
    aside.replace(path)


def read_jsonl(path: Path) -> Iterator[Any]:
    """The rows of ``path``; blank lines are skipped.

    Only the line feed ends a line. (``str.splitlines`` also breaks at U+0085, U+2028 and U+2029, which JSON leaves as
    they are in text.)

    Raises:
        ValueError: a line that is not JSON, with its number.
    """
    with path.open(encoding="utf-8", newline="\n") as file:
        for line_number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {line_number}: not JSON ({error}). Fix or delete it.") from error


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
