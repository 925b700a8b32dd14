"""Completions and groups of several batches as one, whatever their widths."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from gopo_lightning.types import Completions, PromptBatch, Rollout


def joined(first: Rollout, second: Rollout) -> Rollout:
    """The groups of both, as they come from a collector."""
    prompts = [first.prompts, second.prompts]
    changed: dict[str, Any] = {
        name: _rows([getattr(first, name), getattr(second, name)])
        for name in ("rewards_PGK", "rewards_PG", "wins_PGGK")
    }
    return replace(
        first,
        prompts=PromptBatch(
            first.prompts.prompts + second.prompts.prompts,
            _rows([p.tokens_PL for p in prompts], left=True),
            _rows([p.mask_PL for p in prompts], left=True),
        ),
        completions=joined_completions([first.completions, second.completions]),
        **changed,
    )


def joined_completions(parts: Sequence[Completions]) -> Completions:
    """One after the other."""
    return Completions(**{f.name: _rows([getattr(part, f.name) for part in parts]) for f in fields(Completions)})


def _rows(parts: Sequence[Any], *, left: bool = False) -> Any:
    """Rows of all parts: tensors, tuples, or None everywhere.

    Of matrices of several widths the narrower ones are filled up with 0, on the ``left`` or right, which no mask reads.
    """
    if parts[0] is None:
        return None
    if isinstance(parts[0], tuple):
        return sum(parts, ())
    if parts[0].dim() == 2:
        width = max(part.shape[1] for part in parts)
        parts = [_filled_up(part, width - part.shape[1], left) for part in parts]
    return torch.cat(list(parts))


def _filled_up(part: Tensor, missing: int, left: bool) -> Tensor:
    return pad(part, (missing, 0) if left else (0, missing))
