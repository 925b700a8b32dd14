"""How many tokens the prompt of each row has: counted in batches, by one process of a node, and kept.

The counts of large datasets stand in `$GOPO_CACHE/token-counts`, in a file named by a digest of all that they depend
on: the rows, the tokenizer, the template and its arguments, and the versions of the libraries. A file that cannot be
read is counted anew; all of them may be deleted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from filelock import FileLock
from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

from gopo_lightning.data.assets import cache_dir
from gopo_lightning.data.fingerprint import Digest
from gopo_lightning.data.json_lines import read_jsonl, write_jsonl
from gopo_lightning.data.rendering import PromptRenderer

BATCH_ROWS = 512
MIN_KEPT_ROWS = 2000
"""Fewer are counted faster than the bookkeeping is worth."""


@dataclass(frozen=True)
class TokenCounts:
    """Of every row of a dataset."""

    counts: list[int]
    """Tokens of the rows' prompts, in order."""
    digest: str
    """Of all those tokens."""


def count_tokens(rows: Sequence[Mapping[str, Any]], render: PromptRenderer, rows_digest: str) -> TokenCounts:
    """Render every row, or read what was counted before.

    Args:
        rows: of the source of ``render``.
        render: row number and row -> prompt.
        rows_digest: of the content of ``rows``.

    Raises:
        ValueError: a malformed row, with its number and file.
    """
    identity = render.identity if len(rows) >= MIN_KEPT_ROWS else None
    if identity is None:
        return _counted(rows, render)
    key = Digest()
    key.add([rows_digest, identity, version("gopo-lightning"), transformers.__version__, tokenizers.__version__])
    path = cache_dir() / "token-counts" / f"{key.value}.jsonl"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if (kept := _kept(path, len(rows))) is not None:
                return kept
            found = _counted(rows, render)
            write_jsonl(path, [asdict(found)])
            return found
    except OSError:  # nothing can be kept there
        return _counted(rows, render)


def _kept(path: Path, num_rows: int) -> TokenCounts | None:
    try:
        kept = TokenCounts(**next(read_jsonl(path)))
    except (OSError, ValueError, TypeError, StopIteration):  # none yet, or not whole
        return None
    return kept if len(kept.counts) == num_rows else None


def _counted(rows: Sequence[Mapping[str, Any]], render: PromptRenderer) -> TokenCounts:
    counts, digest = [], Digest()
    silent = None if rank_zero_only.rank == 0 else True  # type: ignore[attr-defined]  # None: off a terminal
    bar = tqdm(total=len(rows), desc=f"prompts of {render.source.path}", delay=2, leave=False, disable=silent)
    with bar:
        for start in range(0, len(rows), BATCH_ROWS):
            numbers = range(start, min(start + BATCH_ROWS, len(rows)))
            for token_ids in render.token_ids([(number, rows[number]) for number in numbers]):
                counts.append(len(token_ids))
                digest.add(token_ids)
            bar.update(len(numbers))
    return TokenCounts(counts, digest.value)
