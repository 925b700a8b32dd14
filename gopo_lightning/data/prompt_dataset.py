"""Rows of a source as prompts, each rendered when it is asked for and checked once before."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch.utils.data import Dataset

from gopo_lightning.data.fingerprint import Digest
from gopo_lightning.data.rendering import PromptRenderer
from gopo_lightning.data.token_counts import count_tokens
from gopo_lightning.types import Prompt, PromptBatch

Overlong = Literal["error", "drop", "truncate_left"]


class PromptDataset(Dataset[tuple[Prompt, bool]]):
    """Rows as prompts, rendered when asked for; every row is checked once at the start.

    Item ``i`` is (prompt, is padding): numbers from ``len`` on are padding, see ``InOrderSampler``.

    Args:
        rows: of the source.
        render: row number and row -> prompt.
        max_prompt_tokens: longer prompts are ``overlong``; None is no limit.
        overlong: what to do with those.

    Attributes:
        num_overlong: how many rows were too long.
        longest: tokens of the longest prompt, and its row.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        render: PromptRenderer,
        *,
        max_prompt_tokens: int | None = None,
        overlong: Overlong = "error",
    ) -> None:
        self.rows, self.render = rows, render
        self.max_prompt_tokens, self.overlong = max_prompt_tokens, overlong
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
                f"{max_prompt_tokens} and were dropped. Raise it, or use overlong: truncate_left."
            )

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, item: int) -> tuple[Prompt, bool]:
        index = self._kept[item % len(self)]
        prompt = self.render(index, self.rows[index])
        if self.max_prompt_tokens is not None and len(prompt.token_ids) > self.max_prompt_tokens:
            prompt = _truncated_left(prompt, self.max_prompt_tokens, self.render.tokenizer.bos_token_id)
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
            "cut_to_tokens": self.max_prompt_tokens if self.num_overlong else None,
        }

    def _keeps(self, index: int, num_tokens: int) -> bool:
        """Count the row if it is overlong, and say whether it stays."""
        if self.max_prompt_tokens is None or num_tokens <= self.max_prompt_tokens:
            self.longest = max(self.longest, (num_tokens, index))
            return True
        self.num_overlong += 1
        if self.overlong == "error":
            raise ValueError(
                f"row {index} (counted from 0) of {self.render.source.path} has {num_tokens} tokens, more than "
                f"max_prompt_tokens={self.max_prompt_tokens}. Raise it, or set overlong to drop or truncate_left."
            )
        if self.overlong == "truncate_left":
            self.longest = max(self.longest, (self.max_prompt_tokens, index))
        return self.overlong == "truncate_left"


def _truncated_left(prompt: Prompt, max_tokens: int, bos_token_id: int | None) -> Prompt:
    """The last ``max_tokens`` tokens; a BOS at the front stays there and counts."""
    ids = prompt.token_ids
    head = ids[:1] if bos_token_id is not None and ids[0] == bos_token_id and max_tokens > 1 else ()
    kept = head + ids[len(ids) - (max_tokens - len(head)) :]
    return replace(prompt, token_ids=kept)
