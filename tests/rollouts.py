"""Small rollouts by hand."""

from collections.abc import Sequence
from typing import Any

import torch

from gopo_lightning.rollout.transforms import Setting
from gopo_lightning.types import Completions, Experience, Prompt, PromptBatch, Rollout
from tests.conftest import byte_tokenizer


def rollout_of(
    rewards: Sequence[Sequence[float]],
    lengths: Sequence[int] | None = None,
    *,
    indices: Sequence[int] | None = None,
    texts: Sequence[str] | None = None,
    **fields: Any,
) -> Rollout:
    """A group of completions a row of ``rewards``; one token each, or ``lengths``; ``texts`` or empty ones; rows of
    the dataset 0, 1, …."""
    rewards_PG = torch.tensor(rewards, dtype=torch.float64)
    lengths_N = torch.tensor([1] * rewards_PG.numel() if lengths is None else lengths)
    mask_NT = torch.arange(int(lengths_N.max())) < lengths_N[:, None]
    texts_N = ("",) * len(mask_NT) if texts is None else tuple(texts)
    rows = range(len(rewards)) if indices is None else indices
    return Rollout(
        PromptBatch.collate([Prompt(row, (1,), "") for row in rows], 0),
        Completions(mask_NT.long(), mask_NT, torch.zeros(len(mask_NT), dtype=torch.bool), texts_N),
        rewards_PG[..., None],
        rewards_PG,
        mask_NT.shape[1],
        **fields,
    )


def setting_of(*sources: Any, group_size: int = 4, max_new_tokens: int = 20) -> Setting:
    """Of a run, as a transform gets to know it."""
    return Setting(sources, group_size, max_new_tokens, byte_tokenizer)


def experience_of(
    rewards: Sequence[Sequence[float]],
    lengths: Sequence[int] | None = None,
    *,
    advantages: Sequence[Sequence[float]] | None = None,
    **fields: Any,
) -> Experience:
    """The same with ``advantages``, or 0."""
    rollout = rollout_of(rewards, lengths, **fields)
    if advantages is None:
        return rollout.with_advantages(torch.zeros_like(rollout.rewards_PG).float())
    return rollout.with_advantages(torch.tensor(advantages))
