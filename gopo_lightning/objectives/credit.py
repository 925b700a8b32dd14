"""Credit: from one advantage a completion to one a token. All pure.

A credit is a function `Experience → advantages_NT`, float32 [N, T], or None where each token has the advantage of its
completion. It is named in YAML by a name below, or by the dotted path of your own function.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gopo_lightning.objectives.estimators import clean
from gopo_lightning.objectives.named import load_callable
from gopo_lightning.types import Experience

Credit = Callable[[Experience], Tensor | None]


def broadcast(experience: Experience) -> None:
    """Every token has the advantage of its completion, as in GRPO and GOPO."""


def reward_to_go(experience: Experience, *, gamma: float = 1.0) -> Tensor:
    """A_nt = A_n + Σ_{u ≥ t} γ^(u−t) x_nu − the mean of that over the group, x the rewards of single tokens.

    What a token earns counts for it and for those before it. The baseline at t is the mean over the completions of the
    group that have a reward, whatever their weights, and still run at t, so it needs no critic; where one is left alone
    it earns 0 there.

    Raises:
        ValueError: nothing gave token rewards, or γ is not in [0, 1].
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma={gamma} of reward_to_go must lie in [0, 1].")
    if experience.token_rewards_NT is None:
        raise ValueError(
            "credit=reward_to_go reads rewards of single tokens, which nothing gives here. Add a transform that does, "
            "such as KLInReward with per: token, or use credit: broadcast."
        )
    mask_NT = experience.completions.mask_NT
    mask_NT = mask_NT & ~experience.rewards_PG.isnan().flatten().to(mask_NT.device)[:, None]
    returns_NT = discounted(clean(experience.token_rewards_NT, mask_NT).double(), gamma)
    mask_PGT = mask_NT.unflatten(0, (-1, experience.group_size))
    returns_PGT = returns_NT.unflatten(0, (-1, experience.group_size))
    mean_P1T = returns_PGT.sum(1, keepdim=True) / mask_PGT.sum(1, keepdim=True).clamp(min=1)
    centred_NT = (returns_PGT - mean_P1T).flatten(0, 1)
    return clean(experience.advantages_PG.flatten()[:, None] + centred_NT, mask_NT).float()


def discounted(rewards_NT: Tensor, gamma: float) -> Tensor:
    """Σ_{u ≥ t} γ^(u−t) x_nu at every t, from the back.

    >>> discounted(torch.tensor([[1.0, 2.0, 4.0]]), 0.5).tolist()
    [[3.0, 4.0, 4.0]]
    """
    columns: list[Tensor] = []
    after_N = torch.zeros_like(rewards_NT[:, 0])
    for rewards_N in reversed(rewards_NT.unbind(-1)):
        after_N = rewards_N + gamma * after_N
        columns.append(after_N)
    return torch.stack(columns[::-1], -1)


_BY_NAME: dict[str, Callable[..., Tensor | None]] = {"broadcast": broadcast, "reward_to_go": reward_to_go}


def get_credit(name: str, /, **options: Any) -> Credit:
    """The credit ``name`` (one of the above, or a dotted path) with ``options`` bound.

    Raises:
        ValueError: there is none of this name, or it does not take these options.
    """
    if name not in _BY_NAME and "." not in name:
        raise ValueError(f"unknown credit '{name}'. Use one of {sorted(_BY_NAME)} or the dotted path of a function.")
    function = _BY_NAME.get(name) or load_callable(name)
    try:
        inspect.signature(function).bind(None, **options)
    except TypeError as error:
        raise ValueError(
            f"credit '{name}' with init_args {options}: {error}. Its signature is {name.rpartition('.')[2]}("
            "experience: Experience, **options) -> Tensor [N, T]; options without a default stand in its init_args."
        ) from error
    return functools.partial(function, **options)
