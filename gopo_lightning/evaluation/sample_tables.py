"""Sampled groups, read back from the tables of the `SampleTable` callback. Pure; the texts are what a policy wrote."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

_PROMPT = re.compile(r"\*\*Prompt, row (-?\d+):\*\* (.*)", re.DOTALL)
_CHARACTER = re.compile(r"&#(\d+);")
_EMPTY = "*(empty)*"
_REST = re.compile(r" \*\((\d+) more characters\)\*\Z")


@dataclass(frozen=True)
class Sample:
    """One completion; the numbers are as they were written, ``none`` where there is no valid reward."""

    rank: str
    reward: str
    advantage: str
    tokens: str
    text: str


@dataclass(frozen=True)
class SampledGroup:
    """The completions of one prompt, the best first."""

    row: int
    """Of the prompt, in its data."""
    prompt: str
    samples: Sequence[Sample]


def plain(cell: str) -> str:
    """What `samples.escape` was given, but for its line breaks: those of the table are in it too."""
    rest = _REST.search(cell)
    text = cell[: rest.start()] if rest else cell
    if text == _EMPTY:
        return ""
    lines = text.split("<br>")
    shown = "\n".join(_CHARACTER.sub(lambda match: chr(int(match[1])), line) for line in lines)
    return f"{shown} … ({rest[1]} more characters)" if rest else shown


def parse(table: str) -> SampledGroup | None:
    """The group of a table; None if it is not one of ours."""
    head, _, body = table.partition("\n\n")
    prompt = _PROMPT.fullmatch(head)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.split("\n") if line.startswith("|")]
    names = ("rank", "reward", "advantage", "tokens", "completion")
    if prompt is None or len(rows) < 3 or not set(names) <= set(rows[0]):
        return None
    columns = [rows[0].index(name) for name in names]
    samples = [Sample(*(plain(row[c]) for c in columns)) for row in rows[2:] if len(row) == len(rows[0])]
    return SampledGroup(int(prompt[1]), plain(prompt[2]), samples)
