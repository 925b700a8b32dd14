"""Rewards (or comparisons) of a group of completions → one advantage per completion.

Shape legend: P prompts, G completions of one prompt (a group). Every function is pure, takes a batch of groups and
returns float32 ``advantages_PG``. Common rules:

- NaN means "no valid score": such a completion leaves the comparison, its advantage is 0, and ``valid`` is
  False there, so that the loss can mask it. A group with fewer than two valid scores is 0 everywhere.
- A group whose valid rewards are all equal is exactly 0 everywhere.
- G < 2 raises ValueError: nothing can be compared with one completion.
- ``ordinal``, ``calibrated`` and ``odrpo`` take ±inf: to them it is the best or the worst there is. The magnitude
  baselines (``grpo``, ``dr_grpo``, ``rloo``, ``batch``, ``qae``, ``maxrl``) compute in float64 and refuse ±inf with a
  ValueError.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gopo_lightning.objectives.advantages.groups import valid
from gopo_lightning.objectives.advantages.magnitudes import batch, dr_grpo, grpo, maxrl, qae, rloo, standardised
from gopo_lightning.objectives.advantages.ranks import (
    calibrated,
    net_wins,
    ordinal,
    ordinal_by_label,
    ordinal_from_wins,
    preferences,
    valid_from_wins,
    without_noise,
)
from gopo_lightning.objectives.advantages.thresholds import odrpo
from gopo_lightning.objectives.named import Kind, Named

__all__ = [
    "KIND",
    "batch",
    "calibrated",
    "dr_grpo",
    "get",
    "grpo",
    "maxrl",
    "net_wins",
    "odrpo",
    "ordinal",
    "ordinal_by_label",
    "ordinal_from_wins",
    "preferences",
    "qae",
    "rloo",
    "standardised",
    "valid",
    "valid_from_wins",
    "without_noise",
]

KIND = Kind(
    noun="advantage",
    argument="rewards_PG",
    axes="prompts, completions",
    known={
        "ordinal": ordinal,
        "calibrated": calibrated,
        "grpo": grpo,
        "dr_grpo": dr_grpo,
        "rloo": rloo,
        "batch": batch,
        "qae": qae,
        "maxrl": maxrl,
        "odrpo": odrpo,
    },
)


def get_advantage(
    name: str,
    *,
    all_reduce: Callable[[Tensor], Tensor] = lambda moments: moments,
    late: Mapping[str, Callable[[], Any]] | None = None,
    **options: Any,
) -> Named:
    """The advantage ``name`` with ``options`` bound: ``rewards_PG → advantages_PG``.

    Ours are tried on one group at once, so that bad values of options stop the run before it starts.

    Args:
        name: one of ordinal, calibrated, grpo, dr_grpo, rloo, batch, qae, maxrl, odrpo, or the dotted path of a
            function of ``rewards_PG``.
        all_reduce: the sum over ranks, handed to a function whose signature asks for it (``batch``); the others need
            no collective.
        late: what gives options that are not known yet, such as a fitted ``tau``; called at every call of a function
            that cannot do without them, unless ``options`` has them.
        options: keyword arguments of the function, checked by its signature.

    Raises:
        ValueError: an unknown name, an unknown option, a missing one, or a value that it refuses.
    """
    advantage = KIND.bind(name, options, offered={"all_reduce": all_reduce}, late=late)
    if name in KIND.known and not late:
        KIND.known[name](torch.tensor([[0.0, 1.0]]), **options)
    return advantage
