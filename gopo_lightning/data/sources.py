"""Where prompts come from: a hub dataset, a local file, or the packaged ratings -> rows (one mapping a prompt)."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from gopo_lightning.data import ratings

PACKAGED: dict[str, Callable[[Any], list[dict[str, Any]]]] = {"packaged:movie-ratings": ratings.prompts}
"""Data sets that the app fetches by itself: name -> rows of a split."""

_LOCAL_SUFFIXES = (".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class PromptSource:
    """One data set of prompts."""

    path: str
    """A hub name (trl-lib/tldr), a local .jsonl, .csv or .parquet file, or packaged:movie-ratings."""
    name: str | None = None
    """Configuration of a hub dataset."""
    split: str | None = None
    """Split of a hub or packaged dataset, train by default. A local file has none."""
    prompt_column: str = "prompt"
    """Column of the prompt: a string, or a conversation (a list of messages with role and content)."""
    messages_column: str | None = None
    """Column of a conversation, read instead of prompt_column. Trailing assistant messages are the answer of
    the dataset and are dropped, so ultrachat's messages become the dialogue up to the last user turn."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    limit: int | None = None
    """Use the first this many rows."""

    def __post_init__(self) -> None:
        """Raise ValueError on options that this kind of source cannot have."""
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit} must be at least 1. Use null for all rows.")
        if not self.is_hub:
            allowed = {"split"} if self.path in PACKAGED else set()
            given = {k for k in ("name", "split", "revision") if getattr(self, k) is not None}
            if given - allowed:
                raise ValueError(
                    f"{self.path} is not a hub dataset and has no {', '.join(sorted(given - allowed))}. Remove it."
                )
        if self.path.startswith("packaged:") and self.path not in PACKAGED:
            raise ValueError(f"unknown data set '{self.path}'; the packaged ones are {sorted(PACKAGED)}.")

    @property
    def is_hub(self) -> bool:
        """Neither a local file nor packaged."""
        return not self.path.startswith("packaged:") and Path(self.path).suffix not in _LOCAL_SUFFIXES

    @property
    def column(self) -> str:
        """The column that holds the prompt."""
        return self.messages_column or self.prompt_column


def load_rows(source: PromptSource) -> Sequence[Mapping[str, Any]]:
    """The rows of ``source``: at least one, each with its prompt column.

    Raises:
        ValueError: a missing file, malformed JSON (line number), an empty dataset, a missing column.
    """
    rows = read_rows(source)
    columned = [(0, rows.column_names)] if isinstance(rows, datasets.Dataset) else enumerate(map(list, rows))
    for number, columns in columned:
        if source.column not in columns:
            raise ValueError(
                f"{source.path} has no column '{source.column}' in row {number}; it has {sorted(columns)}. Set "
                "prompt_column or messages_column to one of them."
            )
    return rows


def read_rows(source: PromptSource) -> Any:
    """The rows of ``source``, whatever their columns: at least one.

    Raises:
        ValueError: a missing file, malformed JSON (line number), an empty dataset.
    """
    rows = _load(source)
    if source.limit is not None:
        rows = (
            rows.select(range(min(source.limit, len(rows))))
            if isinstance(rows, datasets.Dataset)
            else rows[: source.limit]
        )
    if not len(rows):
        raise ValueError(f"{source.path} has no rows; at least one is needed. Check path and split.")
    return rows


def _load(source: PromptSource) -> Any:
    if source.path in PACKAGED:
        return PACKAGED[source.path](source.split or "train")
    if source.is_hub:
        split = source.split or "train"
        return datasets.load_dataset(source.path, source.name, split=split, revision=source.revision)
    file = Path(source.path).expanduser()
    if not file.is_file():
        raise ValueError(f"there is no file {source.path} (from {Path.cwd()}). Correct the path of the prompts.")
    if file.suffix == ".jsonl":
        return read_jsonl(file)
    if not file.stat().st_size:
        raise ValueError(f"{source.path} is empty; at least one prompt is needed.")
    return datasets.load_dataset(file.suffix[1:], data_files=str(file), split="train")


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; blank lines are skipped.

    Raises:
        ValueError: a line that is not UTF-8, not JSON, or not an object, with its number.
    """
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except ValueError as error:  # of the decoder or of JSON
            raise ValueError(
                f"{file}, line {number}: not JSON ({error}). A line is one object. Fix or delete it."
            ) from error
        if not isinstance(row, dict):
            raise ValueError(f"{file}, line {number}: a {type(row).__name__}, but a line must be a JSON object.")
        rows.append(row)
    return rows
