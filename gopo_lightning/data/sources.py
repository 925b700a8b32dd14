"""Where prompts come from: a hub dataset, a local file, or the packaged ratings -> rows (one mapping a prompt)."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets

from gopo_lightning.data import ratings
from gopo_lightning.data.files import has_splits, looks_local, read_local, stream_local

PACKAGED: dict[str, Callable[[Any], list[dict[str, Any]]]] = {"packaged:movie-ratings": ratings.prompts}
"""Data sets that the app fetches by itself: name -> rows of a split."""


@dataclass(frozen=True)
class PromptSource:
    """One data set of prompts."""

    path: str
    """A hub name (trl-lib/tldr), local data, or packaged:movie-ratings. Local data are a file (.jsonl, .ndjson, .json,
    .csv, .tsv, .txt, maybe compressed, or .parquet), a pattern (data/*.jsonl), a folder of such files, or one that
    Dataset.save_to_disk made. What exists here is never looked for on the hub."""
    name: str | None = None
    """Configuration of a hub dataset."""
    split: str | None = None
    """Split of a hub or packaged dataset or of a saved DatasetDict, train by default. A local file has none. Of a hub
    dataset also a part of one, in rows or percent: `train[:-500]` and `train[-500:]`, `train[:90%]`."""
    prompt_column: str = "prompt"
    """Column of the prompt: a string, or a conversation (a list of messages with role and content)."""
    messages_column: str | None = None
    """Column of a conversation (messages with role and content, or from and value, or such a list as JSON text), read
    instead of prompt_column. Trailing assistant messages are the answer of the dataset and are dropped, so ultrachat's
    messages become the dialogue up to the last user turn."""
    system_column: str | None = None
    """Column of a system message that is put before each prompt; rows where it is blank have none."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    limit: int | None = None
    """Use the first this many rows."""
    stream_buffer: int | None = None
    """Of training prompts: read the rows while training, one after the other, and draw them from a buffer of this many
    (1 keeps their order); for data that do not fit into memory, or that are not to be downloaded whole. Null: all rows
    are read, checked and shuffled at the start."""

    def __post_init__(self) -> None:
        """Raise ValueError on options that this kind of source cannot have."""
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit} must be at least 1. Use null for all rows.")
        if self.stream_buffer is not None and self.stream_buffer < 1:
            raise ValueError(f"stream_buffer={self.stream_buffer} must be at least 1. Use null to read all rows first.")
        if "://" in self.path:
            raise ValueError(f"{self.path} is an address, which is not fetched. Download it and name the file.")
        if not self.is_hub:
            allowed = {"split"} if self.path in PACKAGED or has_splits(self.path) else set()
            given = {k for k in ("name", "split", "revision") if getattr(self, k) is not None}
            if given - allowed:
                raise ValueError(
                    f"{self.path} is not a hub dataset and has no {', '.join(sorted(given - allowed))}. Remove it."
                )
        if self.path.startswith("packaged:") and self.path not in PACKAGED:
            raise ValueError(f"unknown data set '{self.path}'; the packaged ones are {sorted(PACKAGED)}.")

    @property
    def is_hub(self) -> bool:
        """Neither local nor packaged."""
        return not self.path.startswith("packaged:") and not looks_local(self.path)

    @property
    def column(self) -> str:
        """The column that holds the prompt."""
        return self.messages_column or self.prompt_column


def load_rows(source: PromptSource) -> Sequence[Mapping[str, Any]]:
    """The rows of ``source``: at least one, each with the columns that any of them has (null where it has not).

    Raises:
        ValueError: a missing file, a malformed one (line number), an empty dataset, a missing column; a source that is
            to be streamed.
    """
    if source.stream_buffer is not None:
        raise ValueError(
            f"stream_buffer={source.stream_buffer} of {source.path}: only training prompts can be streamed, and these "
            "rows are read as a whole. Set it to null."
        )
    rows = read_rows(source)
    columns = columns_of(rows)
    for wanted in [source.column] + ([source.system_column] if source.system_column else []):
        lacking = [0] if wanted not in columns else []
        if not isinstance(rows, datasets.Dataset) and wanted == source.column:
            lacking = [number for number, row in enumerate(rows) if wanted not in row][:1]
        if lacking:
            has = columns if isinstance(rows, datasets.Dataset) else rows[lacking[0]]
            raise _lacks(source, wanted, lacking[0], has)
    if isinstance(rows, datasets.Dataset):
        return rows
    return [row if len(row) == len(columns) else {**dict.fromkeys(columns), **row} for row in rows]


def stream_rows(source: PromptSource) -> Iterator[Mapping[str, Any]]:
    """The rows of ``source`` one after the other, with the columns of the first ones (null where one has not).

    The first ones are as many as are read ahead for the shuffle.

    Raises:
        ValueError: as `load_rows`, a malformed row when its turn comes.
    """
    rows = islice(_stream(source), source.limit)
    first = list(islice(rows, source.stream_buffer or 1))
    if not first:
        raise ValueError(f"{source.path} has no rows; at least one is needed. Check path and split.")
    columns = columns_of(first)
    if source.system_column and source.system_column not in columns:
        raise _lacks(source, source.system_column, 0, columns)
    for number, row in enumerate(chain(first, rows)):
        if source.column not in row:
            raise _lacks(source, source.column, number, row)
        yield {**dict.fromkeys(columns), **row}


def columns_of(rows: Any) -> list[str]:
    """The columns that any of ``rows`` has, in the order in which they come."""
    return list(
        rows.column_names if isinstance(rows, datasets.Dataset) else dict.fromkeys(c for row in rows for c in row)
    )


def read_rows(source: PromptSource) -> Any:
    """The rows of ``source``, whatever their columns: at least one.

    Raises:
        ValueError: a missing file, a malformed one (line number), an empty dataset.
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


def _lacks(source: PromptSource, column: str, row: int, columns: Iterable[str]) -> ValueError:
    return ValueError(
        f"{source.path} has no column '{column}' in row {row}; it has {sorted(columns)}. Set prompt_column, "
        "messages_column or system_column to one of them."
    )


def _load(source: PromptSource) -> Any:
    if source.path in PACKAGED:
        return PACKAGED[source.path](source.split or "train")
    return _from_hub(source) if source.is_hub else read_local(source.path, source.split)


def _stream(source: PromptSource) -> Iterator[Mapping[str, Any]]:
    if source.path in PACKAGED:
        return iter(_load(source))
    return iter(_from_hub(source, streaming=True)) if source.is_hub else stream_local(source.path, source.split)


def _from_hub(source: PromptSource, **options: Any) -> Any:
    split, revision = source.split or "train", source.revision
    try:
        return datasets.load_dataset(source.path, source.name, split=split, revision=revision, **options)
    except (FileNotFoundError, ConnectionError) as error:  # what is not found or offline; a local path may be meant
        raise ValueError(
            f"there is no file or folder {source.path} in {Path.cwd()}, and as a dataset of the hub it cannot be read: "
            f"{error}. Correct the path."
        ) from error
