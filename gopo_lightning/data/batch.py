"""What a loader of prompts gives the hooks of a step."""

from collections.abc import Callable
from typing import Any

import torch

from gopo_lightning.types import Prompt, PromptBatch


class Batch:
    """``{"prompts": PromptBatch, "is_padding": bool [P]}``, to which hooks add keys by ``batch[key] = value``.

    Not a ``dict``: the precision plugins of Lightning for FSDP and for true half precision rebuild every
    mapping of a batch field by field, and refuse the frozen structs in it.
    """

    def __init__(self, **items: Any) -> None:
        self._items = items

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._items[key] = value

    def __contains__(self, key: str) -> bool:
        return key in self._items

    def get(self, key: str, default: Any = None) -> Any:
        """``batch[key]``, or ``default`` where there is none."""
        return self._items.get(key, default)

    def to(self, device: torch.device | str, **kwargs: Any) -> "Batch":
        """A copy on ``device``; Lightning calls it."""
        return Batch(**{k: v.to(device, **kwargs) for k, v in self._items.items()})


def collate_with(pad_token_id: int) -> Callable[[list[tuple[Prompt, bool]]], Batch]:
    """A function that pads the prompts of a batch."""

    def collate(items: list[tuple[Prompt, bool]]) -> Batch:
        prompts, is_padding = zip(*items, strict=True)
        return Batch(prompts=PromptBatch.collate(prompts, pad_token_id), is_padding=torch.tensor(is_padding))

    return collate
