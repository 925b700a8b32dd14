"""Rows of a source as prompts, each rendered when it is asked for and checked once before."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch.utils.data import Dataset

from gopo_lightning.data.fingerprint import Digest
from gopo_lightning.data.rendering import PromptRenderer
from gopo_lightning.data.token_counts import count_tokens
from gopo_lightning.types import Prompt, PromptBatch

Overlong = Literal["error", "drop", "truncate_left"]


@dataclass(frozen=True)
class Limit:
    """How long prompts may be, and what becomes of longer ones."""

    max_tokens: int | None = None
    """None is no limit."""
    overlong: Overlong = "error"

    def exceeded_by(self, num_tokens: int, row: int, path: str) -> bool:
        """Whether a prompt is too long; ValueError where that is an error."""
        if self.max_tokens is None or num_tokens <= self.max_tokens:
            return False
        if self.overlong == "error":
            raise ValueError(
                f"row {row} (counted from 0) of {path} has {num_tokens} tokens, more than max_prompt_tokens="
                f"{self.max_tokens}. Raise it, or set overlong to drop or truncate_left."
            )
        return True

    def __call__(self, prompt: Prompt, render: PromptRenderer) -> Prompt | None:
        """``prompt`` as it may be, or None where it is dropped; ValueError where it is an error."""
        if not self.exceeded_by(len(prompt.token_ids), prompt.index, render.source.path):
            return prompt
        assert self.max_tokens is not None
        bos = render.tokenizer.bos_token_id
        return _truncated_left(prompt, self.max_tokens, bos) if self.overlong == "truncate_left" else None


class PromptDataset(Dataset[tuple[Prompt, bool]]):
    """Rows as prompts, rendered when asked for; every row is checked once at the start.

    Item ``i`` is (prompt, is padding): numbers from ``len`` on are padding, see ``InOrderSampler``.

    Args:
        rows: of the source.
        render: row number and row -> prompt.
        limit: of the tokens of a prompt.

    Attributes:
        num_overlong: how many rows were too long.
        longest: tokens of the longest prompt, and its row.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], render: PromptRenderer, limit: Limit = Limit()) -> None:
        self.rows, self.render, self.limit = rows, render, limit
        self.num_overlong, self.longest = 0, (0, 0)
        content = Digest()
        for row in rows:
            content.add(row)
        found = count_tokens(rows, render, content.value)
        self._digests = {"rows": content.value, "tokens": found.digest}
        self._kept = [index for index, count in enumerate(found.counts) if self._keeps(index, count)]
        if not self._kept:
            raise ValueError(
                f"all {len(rows)} prompts of {render.source.path} are longer than max_prompt_tokens="
                f"{limit.max_tokens} and were dropped. Raise it, or use overlong: truncate_left."
            )

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, item: int) -> tuple[Prompt, bool]:
        index = self._kept[item % len(self)]
        prompt = self.limit(self.render(index, self.rows[index]), self.render)
        assert prompt is not None, "it was kept"
        return prompt, item >= len(self)

    def batch(self, rows: Sequence[int]) -> PromptBatch:
        """The prompts of ``rows``, as a step gets them."""
        return PromptBatch.collate([self[row][0] for row in rows], self.render.tokenizer.pad_token_id)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Tells whether another process reads the same prompts."""
        return {
            "path": self.render.source.path,
            "num_prompts": len(self),
            **self._digests,
            "cut_to_tokens": self.limit.max_tokens if self.num_overlong else None,
        }

    def _keeps(self, index: int, num_tokens: int) -> bool:
        """Count the row if it is overlong, and say whether it stays."""
        if self.limit.exceeded_by(num_tokens, index, self.render.source.path):
            self.num_overlong += 1
            if self.limit.overlong == "drop":
                return False
            num_tokens = self.limit.max_tokens or 0
        self.longest = max(self.longest, (num_tokens, index))
        return True


def _truncated_left(prompt: Prompt, max_tokens: int, bos_token_id: int | None) -> Prompt:
    """The last ``max_tokens`` tokens; a BOS at the front stays there and counts."""
    ids = prompt.token_ids
    head = ids[:1] if bos_token_id is not None and ids[0] == bos_token_id and max_tokens > 1 else ()
    kept = head + ids[len(ids) - (max_tokens - len(head)) :]
    return replace(prompt, token_ids=kept)
