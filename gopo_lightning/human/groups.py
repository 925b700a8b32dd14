"""Groups of completions that a person puts in order: what tells them apart, and files that hold them."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from gopo_lightning.data.cells import Value, as_value, is_blank, listed, text_of
from gopo_lightning.data.comparison_formats import reading_row
from gopo_lightning.data.files import read_local
from gopo_lightning.types import Completion, Prompt

Turns: TypeAlias = tuple[tuple[str, str], ...]
"""Role and content of each message."""


@dataclass(frozen=True)
class Group:
    """A prompt, and M different completions of it.

    >>> Group("2 + 2 =", (" 4", " 5")).key == Group(({"role": "user", "content": "2 + 2 ="},), (" 4", " 5")).key
    True
    """

    prompt: Value
    """A text, or the messages of a conversation."""
    completions: tuple[str, ...]
    truncated: tuple[bool, ...] = field(default=(), compare=False)
    """Whether `max_new_tokens` cut each off; empty where that is not known."""

    @cached_property
    def turns(self) -> Turns:
        """The prompt as a conversation; a plain prompt is a user's message."""
        return turns_of(self.prompt)

    @cached_property
    def key(self) -> str:
        """16 hexadecimal digits, another for every prompt and every list of completions."""
        text = json.dumps([self.turns, self.completions])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def row(self) -> dict[str, Any]:
        """For a file: what `groups_of_file` reads."""
        reasons = {"finish_reasons": ["length" if cut else "stop" for cut in self.truncated]} if self.truncated else {}
        return {"prompt": plain(self.prompt), "completions": list(self.completions), **reasons}


def turns_of(prompt: Value) -> Turns:
    """Roles and contents of ``prompt``."""
    if isinstance(prompt, str):
        return (("user", prompt),)
    return tuple((str(message["role"]), str(message["content"])) for message in prompt)


def plain(prompt: Value) -> str | list[dict[str, Any]]:
    """``prompt`` as JSON has it."""
    return prompt if isinstance(prompt, str) else [dict(message) for message in prompt]


def group_of(prompt: Prompt, completions: Sequence[str]) -> Group:
    """What a person is shown of one prompt's ``completions``: each text once."""
    texts = distinct(completions)
    cut = tuple(isinstance(text, Completion) and text.truncated for text in texts)
    return Group(
        prompt.text if prompt.messages is None else tuple(map(dict, prompt.messages)),
        tuple(map(str, texts)),
        cut if all(isinstance(text, Completion) for text in texts) else (),
    )


def distinct(completions: Iterable[str]) -> list[str]:
    """The first of each text."""
    found: dict[str, str] = {}
    for text in completions:
        found.setdefault(str(text), text)
    return list(found.values())


def groups_of_file(path: Path) -> list[Group]:
    """The groups of a file of `predict`, of verdicts, or of ranked lists, each once: those of two texts or more.

    Columns are ``prompt`` (a text or messages) or ``messages``, ``completions`` (texts), and maybe ``finish_reasons``.

    Raises:
        ValueError: no such file, a malformed row (with its number), or no group of two different texts.
    """
    groups: dict[str, Group] = {}
    for number, row in enumerate(read_local(str(path))):
        with reading_row(f"row {number} (counted from 0) of {path}"):
            group = group_of_row(row)
        if len(group.completions) > 1:
            groups[group.key] = group
    if not groups:
        raise ValueError(f"{path} holds no prompt with two different completions, and nothing else can be ordered.")
    return list(groups.values())


def group_of_row(row: Mapping[str, Any]) -> Group:
    """Of one row of such a file; the error is the second half of a sentence about it."""
    texts = [text_of(text, f"completion {n}") for n, text in enumerate(listed(row, "completions"))]
    column = "prompt" if is_blank(row.get("messages")) else "messages"
    prompt = as_value(row.get(column), f"column '{column}'")
    reasons = row.get("finish_reasons")
    if reasons is None:
        return Group(prompt, tuple(map(str, distinct(texts))))
    if len(reasons) != len(texts):
        raise ValueError(f"{len(texts)} completions have {len(reasons)} finish_reasons")
    cut = dict(zip(reversed(texts), [reason == "length" for reason in reversed(reasons)], strict=True))
    once = distinct(texts)
    return Group(prompt, tuple(once), tuple(cut[text] for text in once))
